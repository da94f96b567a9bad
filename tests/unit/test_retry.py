"""Whether a gateway is asked again and when: the decision, its budget, and what `Retry-After` says."""

from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.errors import ERRORS
from deltawire_worker.refusal import UpstreamError, refusal
from deltawire_worker.retry import MAX_BACKOFF_S, MAX_SLEEP_S, Budget, GiveUp, Park, Wait, decide
from deltawire_worker.retry_after import MAX_S, retry_after_s

NOW = 1_764_000_000.0  # Mon, 24 Nov 2025 16:00:00 GMT


def error(status: int = 503, *, code: str = "", **headers: str) -> UpstreamError:
    """As the gateway's answer would be read."""
    body = b'{"error":{"code":"%s","message":"m","type":"t"}}' % code.encode()
    return refusal(status, httpx.Headers({k.replace("_", "-"): v for k, v in headers.items()}), body, now=NOW)


def decision(failure: UpstreamError, **given_: Any) -> Wait | Park | GiveUp:
    usual: dict[str, Any] = {
        "retries": 0,
        "max_retries": 3,
        "max_wait_s": 600.0,
        "waited_s": 0.0,
        "left_s": 600.0,
        "queue_left_s": 600.0,
        "budget": Budget(),
        "jitter": 1.0,
    }
    return decide(failure, **{**usual, **given_})


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529, 599])
def test_what_passes_is_tried_again(status: int) -> None:
    """What OpenAI's SDKs try again, and 425."""
    assert decision(error(status)) == Wait(0.5)


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 401, 402, 403, 404, 405, 413, 415, 422, 451])
def test_what_stays_as_it_is_is_not(status: int) -> None:
    """The same request would have the same answer."""
    assert decision(error(status, Retry_After="1")) == GiveUp()


@pytest.mark.parametrize("code", ["insufficient_quota", "billing_hard_limit_reached"])
def test_a_quota_that_is_spent_is_not_waited_for(code: str) -> None:
    """OpenAI says 429 to that as well, and waiting brings no money."""
    failure = error(429, code=code)
    assert failure.code == "upstream_quota"
    assert not failure.error.retryable
    assert decision(failure) == GiveUp()


def test_a_gateway_that_cannot_be_reached_is_tried_again() -> None:
    """Nothing was asked yet."""
    for code in ("connect_timeout", "upstream_unreachable", "upstream_eof", "upstream_malformed"):
        assert decision(UpstreamError(code, "m")) == Wait(0.5)


@pytest.mark.parametrize("code", [code for code in ERRORS if code.startswith("upstream_")])
def test_by_default_the_table_decides(code: str) -> None:
    """What a client is told can be tried again is what we try again ourselves."""
    assert isinstance(decision(UpstreamError(code, "m")), Wait) == ERRORS[code].retryable


def test_a_header_of_openais_beats_the_table() -> None:
    """`x-should-retry`, as its SDKs read it."""
    assert decision(error(500, x_should_retry="false")) == GiveUp()
    assert decision(error(400, x_should_retry="true", Retry_After="2")) == Wait(2.2)
    assert decision(error(500, x_should_retry="perhaps")) == Wait(0.5)


def test_backoff_doubles_up_to_its_bound_and_is_jittered() -> None:
    """Half a second, one, two, four, eight; each between half of it and all of it."""
    delays = [decision(error(), retries=n, max_retries=10) for n in range(7)]
    assert delays == [Wait(0.5), Wait(1.0), Wait(2.0), Wait(4.0), Wait(8.0), Wait(8.0), Wait(8.0)]
    assert decision(error(), retries=2, jitter=0.0) == Wait(1.0)


def test_there_are_so_many_retries_and_no_more() -> None:
    """And none where the job wants none."""
    assert decision(error(), retries=2) == Wait(2.0)
    assert decision(error(), retries=3) == GiveUp()
    assert decision(error(), max_retries=0) == GiveUp()


def test_a_gateway_that_has_waited_itself_is_asked_twice_more_at_the_most() -> None:
    """504: each try costs its whole time-out."""
    assert [decision(error(504), retries=n, max_retries=10) for n in (1, 2)] == [Wait(1.0), GiveUp()]
    assert decision(error(504), retries=1, max_retries=1) == GiveUp()


def test_retry_after_says_when_and_a_long_wait_gives_the_slot_back() -> None:
    """Never earlier than told; a tenth later at the most."""
    assert decision(error(429, Retry_After="7"), jitter=0.0) == Wait(7.0)
    assert decision(error(429, Retry_After="7"), jitter=1.0) == Wait(7.7)
    assert decision(error(503, Retry_After="0"), jitter=1.0) == Wait(0.5)
    assert decision(error(503, retry_after_ms="20"), jitter=0.0) == Wait(0.02)
    assert decision(error(429, Retry_After=f"{MAX_SLEEP_S:.0f}"), jitter=0.0) == Wait(MAX_SLEEP_S)
    assert decision(error(429, Retry_After="30"), jitter=0.0) == Park(30.0)


def test_a_wait_longer_than_allowed_is_no_wait() -> None:
    """The job fails at once, and its caller is told how long it would have been."""
    failure = error(429, Retry_After="601")
    assert decision(failure) == GiveUp()
    assert failure.error.retry_after_s == 601
    assert decision(error(429, Retry_After="11"), max_wait_s=10) == GiveUp()
    assert isinstance(decision(error(429, Retry_After="600"), left_s=1e9, queue_left_s=1e9), Park)


def test_all_waits_together_are_bounded() -> None:
    """Who can wait for ten seconds cannot wait for six and then for six more."""
    assert decision(error(429, Retry_After="6"), max_wait_s=10, waited_s=0.0) == Wait(6.6)
    assert decision(error(429, Retry_After="6"), max_wait_s=10, waited_s=6.6) == GiveUp()
    assert decision(error(), max_wait_s=1.0, waited_s=0.5) == Wait(0.5)
    assert decision(error(), max_wait_s=1.0, waited_s=0.6) == GiveUp()


def test_a_wait_that_the_jobs_time_does_not_allow_is_no_wait() -> None:
    """Nobody sleeps up to a deadline to fail then."""
    assert decision(error(429, Retry_After="20"), left_s=20.0) == GiveUp()
    assert decision(error(), left_s=0.5) == GiveUp()
    assert decision(error(), left_s=0.6) == Wait(0.5)


def test_the_time_in_the_queue_bounds_what_is_waited_there() -> None:
    """A job that a worker has taken in the last moment may sleep all the same."""
    assert decision(error(429, Retry_After="20"), queue_left_s=20.0) == GiveUp()
    assert decision(error(429, Retry_After="5"), queue_left_s=-1.0) == Wait(5.5)


def test_a_dead_gateway_gets_a_burst_and_then_no_more_than_its_jobs() -> None:
    """Not four times the load; and what is decided against costs nothing."""
    budget = Budget()
    answers = [decision(error(), budget=budget) for _ in range(1_000)]
    assert answers.count(Wait(0.5)) == Budget.MAX_TOKENS
    assert answers[-1] == GiveUp()
    for _ in range(10):
        budget.succeeded()
    assert decision(error(404), budget=budget) == GiveUp()
    assert decision(error(), budget=budget) == Wait(0.5)
    assert decision(error(), budget=budget) == GiveUp()


def test_a_gateway_that_fails_one_in_twenty_is_always_asked_again() -> None:
    """Its successes pay for that."""
    budget = Budget()
    for n in range(10_000):
        if n % 20 == 0:
            assert isinstance(decision(error(), budget=budget), Wait)
        else:
            budget.succeeded()


def test_a_rate_limit_that_says_when_it_ends_costs_nothing() -> None:
    """A gateway that answers so is well, and the wait itself is the protection."""
    budget = Budget()
    answers = [decision(error(429, Retry_After="5"), budget=budget) for _ in range(500)]
    assert GiveUp() not in answers
    at_once = [decision(error(429, Retry_After="0"), budget=budget) for _ in range(500)]
    assert at_once.count(GiveUp()) == 500 - Budget.MAX_TOKENS


@given(
    retry_after=st.none() | st.floats(0, 1e6),
    retries=st.integers(0, 12),
    max_retries=st.integers(0, 10),
    max_wait_s=st.floats(0.001, 86_400),
    left_s=st.floats(-10, 86_400),
    jitter=st.floats(0, 1),
)
def test_whatever_is_decided_is_within_the_bounds(
    retry_after: float | None,
    retries: int,
    max_retries: int,
    max_wait_s: float,
    left_s: float,
    jitter: float,
) -> None:
    """A wait is never earlier than told, never longer than left, and slept only if it is short."""
    failure = UpstreamError("upstream_rate_limit", "m", status_code=429, retry_after_s=retry_after)
    what = decision(
        failure,
        retries=retries,
        max_retries=max_retries,
        max_wait_s=max_wait_s,
        left_s=left_s,
        jitter=jitter,
    )
    if not isinstance(what, GiveUp):
        assert retries < max_retries
        assert what.delay_s <= left_s + 0.001
        assert what.delay_s >= (retry_after or 0) - 0.001
        assert (retry_after or what.delay_s - 0.001) <= max_wait_s
        assert what.delay_s >= MAX_SLEEP_S if isinstance(what, Park) else what.delay_s <= MAX_SLEEP_S
        assert retry_after or what.delay_s <= MAX_BACKOFF_S


DATES = {
    "IMF-fixdate": "Mon, 24 Nov 2025 16:00:30 GMT",
    "RFC 850": "Monday, 24-Nov-25 16:00:30 GMT",
    "asctime": "Mon Nov 24 16:00:30 2025",
}


@pytest.mark.parametrize("text", DATES.values(), ids=DATES.keys())
def test_retry_after_may_be_a_date(text: str) -> None:
    """In any of the three forms of RFC 9110 §5.6.7, from the answer's own Date on, or else from now."""
    assert retry_after_s(httpx.Headers({"Retry-After": text}), NOW) == 30
    other_clock = {"Retry-After": text, "Date": "Mon, 24 Nov 2025 16:00:18 GMT"}
    assert retry_after_s(httpx.Headers(other_clock), NOW - 3_600) == 12
    assert retry_after_s(httpx.Headers({"Retry-After": text, "Date": "today"}), NOW) == 30


def test_a_date_that_has_passed_means_now() -> None:
    """As a wait of 0 does."""
    assert retry_after_s(httpx.Headers({"Retry-After": "Mon, 24 Nov 2025 15:00:00 GMT"}), NOW) == 0


def test_two_digits_of_a_year_are_not_more_than_50_years_ahead() -> None:
    """RFC 9110 §5.6.7."""
    assert retry_after_s(httpx.Headers({"Retry-After": "Sunday, 06-Nov-94 08:49:37 GMT"}), NOW) == 0
    assert retry_after_s(httpx.Headers({"Retry-After": "Friday, 06-Nov-71 08:49:37 GMT"}), NOW) == MAX_S


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "3"}, 3.0),
        ({"Retry-After": " 1.5 "}, 1.5),
        ({"Retry-After": "0"}, 0.0),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "250", "Retry-After": "9"}, 0.25),
        ({"retry-after-ms": "soon", "Retry-After": "9"}, 9.0),
        ({"Retry-After": "1e2"}, 100.0),
        ({"Retry-After": "99999999"}, MAX_S),
        ({"Retry-After": "1e400"}, MAX_S),
        ({"Retry-After": "9" * 400}, MAX_S),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "1_0"}, None),
        ({"Retry-After": "٣"}, None),
        ({"Retry-After": ""}, None),
        ({"Retry-After": "Mon, 99 Nov 2025 16:00:30 GMT"}, None),
        ({"Retry-After": "Mon, 24 Nov 99999 16:00:30 GMT"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_where_it_makes_sense(headers: dict[str, str], seconds: float | None) -> None:
    """Seconds, with a fraction too, and milliseconds; nothing negative, nothing endless, no nonsense."""
    encoded = httpx.Headers([(name.encode(), value.encode()) for name, value in headers.items()])
    assert retry_after_s(encoded, NOW) == seconds


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_text_makes_the_reader_fail(value: str, date: str) -> None:
    """Whatever a gateway sends is seconds or nothing."""
    seconds = retry_after_s({"retry-after": value, "date": date, "retry-after-ms": date}, NOW)
    assert seconds is None or 0 <= seconds <= MAX_S
