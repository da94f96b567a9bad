"""The tables of errors and close codes agree with each other and with PROTOCOL.md."""

import msgspec
import pytest

from deltawire.close_codes import CloseCode, may_come_back
from deltawire.errors import ERRORS, DeltawireError, ErrorKind, GapError, WireError

CODES = pytest.mark.parametrize(("code", "kind"), ERRORS.items(), ids=ERRORS)
PASSING_4XX = {
    *("upstream_rate_limit", "request_timeout"),
    *("connection_limit", "rate_limited", "tenant_queue_full"),
}
"""The only 4xx that time mends: the upstream's 429, a line that was too slow, and our own limits."""
WITH_ANOTHER = {"token_expired", "connection_limit"}
"""What is mended by another token, or by another connection's end: not by the same request, or not soon."""


@CODES
def test_a_close_code_is_in_the_table_and_in_its_range(code: str, kind: ErrorKind) -> None:
    """A CloseCode only closes a socket, 40xx if and only if the error is retryable (but for WITH_ANOTHER)."""
    assert code == code.lower()
    if kind.close_code is not None:
        assert kind.close_code in CloseCode
        assert may_come_back(kind.close_code) is kind.retryable or code in WITH_ANOTHER


@CODES
def test_the_status_agrees_with_the_type(code: str, kind: ErrorKind) -> None:
    """4xx is the peer's to mend, 5xx is ours or the upstream's; 401, 403 and 404 have types of their own."""
    assert 400 <= kind.status < 600
    if kind.status < 500:
        assert kind.type not in {"server_error", "upstream_error"}
        assert kind.retryable is (code in PASSING_4XX)
    else:
        assert kind.type in {"server_error", "upstream_error"}
    own_types = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        429: "rate_limit_error",
    }
    assert (kind.type in own_types.values()) is (kind.status in own_types)
    assert kind.type == own_types.get(kind.status, kind.type)


@pytest.mark.parametrize("code", [*CloseCode, 1001, 1005, 1006, 1011, 1012, 1013, 1014, 4000, 4499, 4600])
def test_a_client_may_come_back_unless_the_code_is_45xx(code: int) -> None:
    """Every code that is not ours to forbid is passing, the network's and unknown 40xx ones too."""
    assert may_come_back(code) is not (4500 <= code <= 4599)


def test_a_normal_end_is_an_end() -> None:
    """After 1000 nothing is to be had, and the ends of the 45xx range belong to it."""
    assert not may_come_back(1000)
    assert not may_come_back(4500)
    assert not may_come_back(4599)


def test_close_codes_are_private_and_of_one_of_two_kinds() -> None:
    """RFC 6455 §7.4.2 leaves 4000 to 4999 to applications; ours are 40xx or 45xx, each once."""
    assert all(code // 100 in {40, 45} for code in CloseCode)
    assert len(set(CloseCode)) == len(CloseCode.__members__)


def test_a_wire_error_has_the_one_shape() -> None:
    """The six fields of the one error shape, with the table's type and retryable."""
    error = WireError("redis_unavailable", "no Redis", retry_after_s=1.5)
    assert msgspec.to_builtins(error.error) == {
        "message": "no Redis",
        "type": "server_error",
        "param": None,
        "code": "redis_unavailable",
        "retryable": True,
        "retry_after_s": 1.5,
    }
    assert (error.code, error.status) == ("redis_unavailable", 503)
    assert str(error) == "redis_unavailable: no Redis"
    assert isinstance(error, DeltawireError)


def test_a_status_can_be_given_and_a_code_must_be_known() -> None:
    """A route may choose another status; a code outside the table is a programming error."""
    assert WireError("invalid_request", "x", status=422).status == 422
    with pytest.raises(KeyError):
        WireError("no_such_code", "x")


def test_a_gap_error_is_ours() -> None:
    """Whoever catches DeltawireError catches a gap, and its numbers can be read."""
    error = GapError(5, 9)
    assert isinstance(error, DeltawireError)
    assert (error.expected, error.got) == (5, 9)
