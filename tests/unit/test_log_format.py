"""What a log line holds, and what it never does."""

import json
import logging
import sys

import pytest

from deltawire.log_format import JsonFormatter, TextFormatter
from deltawire_worker.__main__ import _first_line


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("deltawire", logging.WARNING, __file__, 1, message, args, None)
    for name, value in extra.items():
        setattr(made, name, value)
    return made


def test_json_lines_have_the_known_fields_only() -> None:
    """Celery's extras (task arguments among them) stay out."""
    line = json.loads(JsonFormatter().format(record("job %s", "ended", job_id="j", data={"args": "PROMPT"})))
    assert line["message"] == "job ended"
    assert line["job_id"] == "j"
    assert line["level"] == "warning"
    assert "PROMPT" not in str(line)


def test_text_lines_too() -> None:
    """The same for people."""
    line = TextFormatter().format(record("job %s", "ended", attempt=2, data={"args": "PROMPT"}))
    assert "job ended" in line
    assert "attempt=2" in line
    assert "PROMPT" not in line


def test_exceptions_are_shown() -> None:
    """With their traceback, in both formats."""
    made = record("failed")
    try:
        int("no number")
    except ValueError:
        made.exc_info = sys.exc_info()
    assert "ValueError: invalid literal" in json.loads(JsonFormatter().format(made))["exception"]
    assert "ValueError: invalid literal" in TextFormatter().format(made)


@pytest.mark.parametrize(
    "said", ["GET /a\n12:00:00.000 info     a line of mine", "\x1b[2J", "\u2028", "\r\x85"]
)
def test_nobody_writes_lines_of_their_own(said: str) -> None:
    """Nor speaks to the terminal, from a path or an answer that is logged."""
    made = record("%s failed", said, job_id=said)
    line = TextFormatter().format(made)
    assert (line.splitlines(), said in line) == ([line], False)
    text = JsonFormatter().format(made)
    assert "\n" not in text
    assert json.loads(text)["job_id"] == said


def test_what_cannot_be_encoded_is_logged_all_the_same() -> None:
    """Lone surrogates, as JSON and paths may hold them."""
    for formatter in (TextFormatter(), JsonFormatter()):
        assert "of ?" in formatter.format(record("of %s", "\ud800")).encode().decode()


def test_a_message_that_celery_cannot_use_is_not_logged_with_its_body() -> None:
    """Only the first line of such a report, and its arguments, are kept."""
    made = record(
        "\nReceived unregistered task of type %s.\nThe full body:\n%s\n%s", "name", "PROMPT", "headers"
    )
    assert _first_line(made)
    assert made.getMessage() == "Received unregistered task of type name."
