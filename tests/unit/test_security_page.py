"""docs/security.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_that_is_named_exists() -> None:
    """A defence whose test was renamed or removed does not live on in the page."""
    named = set(re.findall(r"\b[a-z0-9]+/test_\w+", (ROOT / "docs/security.md").read_text()))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / "tests" / f"{name}.py").exists()] == []
