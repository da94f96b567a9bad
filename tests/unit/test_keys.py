"""Key names are pinned, and no job id can reach outside its own keys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.keys import ACTIVE_TTL_S, CANCEL_TTL_S, Keys, is_job_id
from deltawire.options import MAX_DURATION_S


def test_the_names_are_those_of_the_protocol() -> None:
    """Other programs cancel by `SET dw:{id}:cancel 1`, so the names cannot change."""
    keys = Keys().job("abc-1")
    assert keys.meta == "dw:{abc-1}:meta"
    assert keys.log == "dw:{abc-1}:log"
    assert keys.cancel == "dw:{abc-1}:cancel"
    assert keys.channel == "dw:{abc-1}:events"
    assert Keys().control("w1") == "dw:control:w1"
    assert Keys().probe("r1") == "dw:probe:r1"


def test_a_prefix_replaces_every_name() -> None:
    """Two installations with different prefixes share no key and no channel."""
    ours, theirs = Keys("a"), Keys("b")
    names = {*_names(ours), ours.control("w")}
    assert all(name.startswith("a:") for name in names)
    assert names.isdisjoint({*_names(theirs), theirs.control("w")})


def _names(keys: Keys) -> tuple[str, ...]:
    job = keys.job("j")
    return (job.meta, job.log, job.cancel, job.channel)


def test_all_keys_of_a_job_have_its_hash_tag() -> None:
    """Redis Cluster hashes what stands between the first braces: the job id."""
    for name in _names(Keys()):
        assert name[name.index("{") + 1 : name.index("}")] == "j"


@pytest.mark.parametrize("job_id", ["a", "A-z_0", "-", "a" * 128])
def test_job_ids(job_id: str) -> None:
    """Letters, digits, dash and underscore, 1 to 128 of them."""
    assert is_job_id(job_id)


_NOT_IDS = ("", "a b", "a\n", "\na", "{a}", "a:b", "é", "\u0663", 'a"', "a\\", "a/b")


@pytest.mark.parametrize("job_id", [*_NOT_IDS, "a" * 129])
def test_not_job_ids(job_id: str) -> None:
    """Braces, quotes, line ends, other alphabets and other lengths are refused."""
    assert not is_job_id(job_id)


@given(st.text())
def test_a_job_id_is_safe_in_keys_json_and_paths(text: str) -> None:
    """Whatever passes is ASCII and needs no quoting anywhere."""
    if is_job_id(text):
        assert text.isascii()
        assert not set(text) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def test_a_cancel_key_outlives_what_it_cancels() -> None:
    """A tombstone stays at least as long as a job may wait in a queue."""
    assert CANCEL_TTL_S >= MAX_DURATION_S
    assert ACTIVE_TTL_S >= 60
