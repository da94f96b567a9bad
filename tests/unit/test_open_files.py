"""The relay takes as many connections as it may, and says where that is few."""

import resource

import pytest

from deltawire.findings import Asked
from deltawire_relay import open_files
from deltawire_relay.check import check
from deltawire_relay.limits import Bounds, Limits


@pytest.mark.parametrize(
    ("hard", "is_said"),
    [(256, True), (open_files.WANTED, False), (1_000_000, False), (resource.RLIM_INFINITY, False)],
)
def test_the_soft_limit_becomes_the_hard_one(
    hard: int, is_said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A hard limit that is low is in the log, with what to do."""
    limits = {resource.RLIMIT_NOFILE: (256, hard)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    open_files.raise_limit()
    assert limits == {resource.RLIMIT_NOFILE: (hard, hard)}
    assert ("ulimit -n" in caplog.text) is is_said


def test_a_limit_that_cannot_be_raised_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The relay starts all the same."""

    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    open_files.raise_limit()
    assert "at most 256 open files" in caplog.text


def test_some_files_are_kept_for_what_is_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that is full still reaches Redis."""
    for soft, room in ((1_000, 1_000 - open_files.RESERVED), (100, 1), (resource.RLIM_INFINITY, None)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, soft))
        assert open_files.room() == room


@pytest.mark.parametrize("hard", [1_000, 1_252, 1_253, resource.RLIM_INFINITY])
async def test_a_check_says_whether_there_can_be_so_many(hard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process opens besides, and connections that hold no place, want some, too."""
    monkeypatch.setenv("DELTAWIRE_MAX_CONNECTIONS", "1000")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (hard, hard))
    *_, finding = await check(Asked(is_check=True, asks_upstream=False, as_json=False))
    has_all = Limits(Bounds(max_connections=1_000), open_files=open_files.room()).max_places == 1_000
    assert finding.level == ("ok" if has_all else "warning")
