"""docs/cli.md says what the command line says of itself."""

from docs.cli import PAGE, page


def test_the_page_is_as_written() -> None:
    """`make configuration` would not change it."""
    assert PAGE.read_text() == page()
