"""What operators read about settings is what the code declares."""

import re

from deltawire.environment import Environment
from deltawire.variables import problems_of
from deltawire_relay.settings import Settings as Relay
from docs.configuration import ENV_EXAMPLE, MARKDOWN, ROOT, entries, env_example, markdown, names


def test_both_files_are_as_written() -> None:
    """`make configuration` would change neither."""
    assert MARKDOWN.read_text() == markdown()
    assert ENV_EXAMPLE.read_text() == env_example()


def test_what_the_code_names_is_declared() -> None:
    """No module reads a variable that operators do not find."""
    named: set[str] = set()
    for package in ("core", "worker", "relay"):
        for path in (ROOT / package).rglob("*.py"):
            named |= set(re.findall(r"\bDELTAWIRE_[A-Z0-9_]+\b", path.read_text()))
    assert named <= names()


def test_every_variable_is_explained() -> None:
    """Each has a sentence, and each is in one section of each file."""
    for entry in entries():
        assert entry.variable.about
        heading = f"\n### `{entry.variable.name}`\n"
        assert MARKDOWN.read_text().count(heading) == 1
        assert ENV_EXAMPLE.read_text().count(f"\n# {entry.variable.name}=") == 1


def test_all_that_is_wrong_is_said_at_once() -> None:
    """An operator corrects one time, not five."""
    environment = Environment(
        {"DELTAWIRE_PORT": "x", "DELTAWIRE_REDIS_URL": "http://a", "DELTAWIRE_LOG_LEVEL": "loud"}
    )
    problems = problems_of(Relay, environment)
    assert [problem.partition(" ")[0] for problem in problems] == [
        "DELTAWIRE_REDIS_URL",
        "DELTAWIRE_LOG_LEVEL",
        "DELTAWIRE_PORT",
    ]
