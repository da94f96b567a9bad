"""Options and requests are checked at the door, with errors that name the field."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.errors import WireError
from deltawire.options import Options, check_request, parse_options

DURATIONS = (
    *("queue_timeout_s", "timeout_s", "first_delta_timeout_s", "idle_timeout_s"),
    *("retention_s", "max_retry_wait_s"),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


def refused(value: Any, **kwargs: bool) -> WireError:  # whatever JSON somebody sent
    with pytest.raises(WireError) as caught:
        parse_options(value, **kwargs)
    return caught.value


def test_the_defaults_are_those_of_the_protocol() -> None:
    """No options, and none at all, mean the documented defaults."""
    assert parse_options(None) == parse_options({}) == Options()
    assert Options() == Options(
        queue_timeout_s=3600,
        timeout_s=600,
        first_delta_timeout_s=120,
        idle_timeout_s=60,
        retention_s=3600,
        max_attempts=2,
        max_retries=3,
        max_retry_wait_s=600,
        restart="before_first_delta",
        upstream="default",
        tenant="default",
        metadata={},
    )


def test_metadata_is_not_shared_between_jobs() -> None:
    """Two jobs' default metadata are two objects."""
    assert Options().metadata is not Options().metadata


def test_a_whole_number_may_have_a_point() -> None:
    """As some languages write all of their numbers; half a try is none."""
    assert parse_options({"max_attempts": 3.0}).max_attempts == 3
    assert refused({"max_attempts": 2.5}).code == "invalid_request"
    assert refused({"max_attempts": float("inf")}).code == "invalid_request"


def test_options_are_taken_as_sent() -> None:
    """Every option can be set; whole numbers are fine for durations."""
    options = parse_options({"timeout_s": 5, "restart": "never", "metadata": {"a": "b"}, "tenant": "t"})
    assert (options.timeout_s, options.restart, options.metadata, options.tenant) == (
        5.0,
        "never",
        {"a": "b"},
        "t",
    )


def test_an_unknown_option_is_named() -> None:
    """A misspelt option is an error that says which and lists the known ones, not a silent default."""
    error = refused({"time_out_s": 5})
    assert (error.code, error.error.param, error.status) == ("unknown_option", "options.time_out_s", 400)
    assert "timeout_s" in error.error.message


def test_over_http_the_credential_says_the_tenant() -> None:
    """`tenant` in an HTTP body is refused: a caller cannot choose whose job it is."""
    error = refused({"tenant": "other"}, from_http=True)
    assert (error.code, error.error.param) == ("unknown_option", "options.tenant")
    assert "credential" in error.error.message
    assert parse_options({"timeout_s": 1}, from_http=True).timeout_s == 1


def test_a_grace_may_be_none_at_all() -> None:
    """`abandon_grace_s: 0` is at once; below that it is as wrong as any duration."""
    assert parse_options({"abandon_grace_s": 0}).abandon_grace_s == 0
    error = refused({"abandon_grace_s": -0.1})
    assert error.error.message == "options.abandon_grace_s must be 0 or more and at most 86400 seconds"


@pytest.mark.parametrize("name", DURATIONS)
@pytest.mark.parametrize("value", [0, -1, 86_400.5, float("nan"), float("inf"), float("-inf"), 1e300])
def test_durations_are_above_zero_and_at_most_a_day(name: str, value: float) -> None:
    """A duration outside its range is refused by name; NaN too."""
    error = refused({name: value})
    assert (error.code, error.error.param) == ("invalid_request", f"options.{name}")


@pytest.mark.parametrize("name", DURATIONS)
def test_the_ends_of_the_range_pass(name: str) -> None:
    """A day is allowed, and so is a fraction of a second."""
    for value in (86_400, 0.001):
        assert getattr(parse_options({name: value}), name) == value


@pytest.mark.parametrize("retries", [-1, 11])
def test_retries_are_none_to_ten(retries: int) -> None:
    """Other numbers are refused by name; none is a number, too."""
    assert refused({"max_retries": retries}).error.param == "options.max_retries"
    assert parse_options({"max_retries": 0}).max_retries == 0


@pytest.mark.parametrize("attempts", [0, -1, 11])
def test_attempts_are_one_to_ten(attempts: int) -> None:
    """Other numbers of attempts are refused by name."""
    assert refused({"max_attempts": attempts}).error.param == "options.max_attempts"


@pytest.mark.parametrize(
    "value",
    [
        [],
        "x",
        1,
        {"timeout_s": "5"},
        {"timeout_s": True},
        {"timeout_s": None},
        {"max_attempts": 1.5},
        {"restart": "sometimes"},
        {"metadata": {"a": 1}},
        {"metadata": []},
        {"upstream": 1},
        {"timeout_s": 10**400},
    ],
)
def test_wrong_types_are_refused(value: Any) -> None:  # as above
    """A value of another type is invalid_request, never a coercion and never another exception."""
    error = refused(value)
    assert error.code == "invalid_request"
    assert (error.error.param or "").startswith("options")


@given(st.dictionaries(st.sampled_from(Options.__struct_fields__) | st.text(max_size=5), JSON) | JSON)
def test_whatever_is_sent_is_options_or_a_wire_error(value: Any) -> None:  # as above
    """No JSON value makes parse_options or check_request raise anything but WireError."""
    for check in (parse_options, check_request):
        with suppress(WireError):
            check(value)


REQUEST = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_a_request_is_passed_on_as_it_is() -> None:
    """What we do not rely on is the gateway's to judge: unknown fields stay."""
    request = {**REQUEST, "vendor": {"x": 1}}
    assert check_request(request) is request


@pytest.mark.parametrize(
    ("request_body", "param"),
    [
        (None, "request"),
        ([], "request"),
        ({}, "request.model"),
        ({**REQUEST, "model": ""}, "request.model"),
        ({**REQUEST, "model": 1}, "request.model"),
        ({"model": "m"}, "request.messages"),
        ({**REQUEST, "messages": []}, "request.messages"),
        ({**REQUEST, "messages": "hi"}, "request.messages"),
    ],
)
def test_a_request_without_model_or_messages_is_refused(request_body: Any, param: str) -> None:  # as above
    """The error names the field to mend."""
    with pytest.raises(WireError) as caught:
        check_request(request_body)
    assert (caught.value.code, caught.value.error.param) == ("invalid_request", param)


@pytest.mark.parametrize(
    "name", ["restart", "on_abandon", "timeout_s", "max_retries", "metadata", "upstream"]
)
def test_a_wrong_value_is_not_repeated(name: str) -> None:
    """Somebody may have put a prompt there, and an error goes to all who watch the job."""
    error = refused({name: ["a prompt"]} if name == "upstream" else {name: "a prompt"})
    assert name in str(error)
    assert "prompt" not in str(error)
