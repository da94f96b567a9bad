"""How a job's end looks to a client of the OpenAI API (PROTOCOL §9.4)."""

from typing import Any

import pytest

from deltawire.errors import ERRORS, Error
from deltawire.events import Failed, UpstreamErrorDetails
from deltawire_relay.openai_errors import PASSED_ON, Failure, failure_of
from tests.support.sample_events import TIMINGS


def failed(code: str, **fields: Any) -> Failure:
    """What a client sees of a job that has failed so."""
    kind = ERRORS.get(code, ERRORS["internal_error"])
    error = Error(
        message="no", type=kind.type, code=code, retryable=kind.retryable, param=fields.pop("param", None)
    )
    event = Failed(
        job_id="job",
        sequence_number=3,
        attempt=1,
        created_at=1.0,
        completion=None,
        usage=None,
        usage_source="unavailable",
        timings=TIMINGS,
        error=error,
        **{"source": "upstream", **fields},
    )
    failure = failure_of(event)
    assert failure is not None
    return failure


@pytest.mark.parametrize("status", range(400, 600))
def test_an_upstreams_status_is_passed_on_where_the_client_can_mend_it(status: int) -> None:
    """Any other is the table's, since 401 and 403 are about our credentials, not the client's."""
    code = "upstream_invalid_request" if status < 500 else "upstream_server_error"
    expected = status if status in PASSED_ON else ERRORS[code].status
    assert failed(code, status_code=status).status == expected


@pytest.mark.parametrize("code", ERRORS)
def test_every_code_has_its_status(code: str) -> None:
    """That of the table, where no upstream gave one."""
    failure = failed(code, source="worker", status_code=429)
    assert (failure.status, failure.error.code) == (ERRORS[code].status, code)


def test_a_code_of_a_newer_worker_is_our_fault() -> None:
    """Its text still gets through."""
    failure = failed("something_new")
    assert (failure.status, failure.error.code, failure.error.message) == (500, "something_new", "no")


def test_what_the_upstream_said_of_itself_comes_first() -> None:
    """Each field that it gave; the others are ours."""
    said = UpstreamErrorDetails(type="x_error", param="messages.0")
    error = failed("upstream_invalid_request", status_code=400, upstream_error=said).error
    assert (error.type, error.code, error.param) == ("x_error", "upstream_invalid_request", "messages.0")


def test_what_it_said_of_our_credentials_does_not() -> None:
    """A client that reads `invalid_api_key` would look for the fault in its own."""
    said = UpstreamErrorDetails(type="authentication_error", code="invalid_api_key")
    failure = failed("upstream_authentication", status_code=401, upstream_error=said)
    assert (failure.status, failure.error.code) == (502, "upstream_authentication")


def test_a_workers_param_is_named_as_in_the_body() -> None:
    """A job's option is a field of `deltawire` here."""
    assert failed("unknown_upstream", source="request", param="options.upstream").error.param == (
        "deltawire.upstream"
    )
