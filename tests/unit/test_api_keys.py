"""API keys are shown once and configured by their hash (PROTOCOL §5)."""

import pytest

from deltawire.api_keys import SCOPES, digest, new_api_key, parse_api_keys
from deltawire.environment import ConfigurationError

SHA = "ab" * 32


def test_a_new_key_is_found_by_its_entry() -> None:
    """The entry names the key's tenant and scopes and knows the key by its SHA-256 only."""
    key, entry = new_api_key("backend", "acme", ["read", "submit"])
    (parsed,) = parse_api_keys(entry)
    assert key.startswith("dw_")
    assert key not in entry
    assert (parsed.name, parsed.tenant, parsed.scopes) == ("backend", "acme", frozenset({"read", "submit"}))
    assert parsed.sha256 == digest(key)


def test_keys_are_never_the_same() -> None:
    """256 random bits: a thousand keys are a thousand keys."""
    keys = {new_api_key("a", "b", ["read"])[0] for _ in range(1_000)}
    assert len(keys) == 1_000
    assert all(len(key) >= 3 + 43 for key in keys)


def test_several_entries_may_have_spaces_and_empty_places() -> None:
    """Entries are separated by commas; white space around them does not matter."""
    keys = parse_api_keys(f" a:t:read:{SHA} ,, b:u:{'+'.join(SCOPES)}:{SHA.upper()}\n")
    assert [key.name for key in keys] == ["a", "b"]
    assert keys[1].scopes == SCOPES
    assert keys[0].sha256 == keys[1].sha256


def test_no_text_is_no_key() -> None:
    """Nothing configured means no keys."""
    assert parse_api_keys("") == ()


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a", "name:tenant:scope"),
        (f"a:b:read:{SHA}:x", "name:tenant:scope"),
        (f":b:read:{SHA}", "name:tenant:scope"),
        (f"a::read:{SHA}", "name:tenant:scope"),
        (f"a:b::{SHA}", "name:tenant:scope"),
        ("a:b:read:", "name:tenant:scope"),
        (f"a:b:write:{SHA}", "write"),
        (f"a:b:read+:{SHA}", "scopes"),
        (f"a:b:read,cancel:{SHA}", "name:tenant:scope"),
        ("a:b:read:abc", "64 hexadecimal digits"),
        (f"a:b:read:{SHA}00", "64 hexadecimal digits"),
        (f"a:b:read:{'zz' * 32}", "64 hexadecimal digits"),
    ],
)
def test_a_wrong_entry_is_refused_by_name(text: str, hint: str) -> None:
    """The error says what an entry looks like, and what is wrong with this one."""
    with pytest.raises(ConfigurationError, match="DELTAWIRE_API_KEYS") as caught:
        parse_api_keys(text)
    assert hint in str(caught.value)


def test_an_error_never_tells_the_hash() -> None:
    """What stands where a hash should be may be the key itself, so it is not repeated."""
    with pytest.raises(ConfigurationError) as caught:
        parse_api_keys("a:b:read:dw_the-key-itself")
    assert "dw_" not in str(caught.value)
