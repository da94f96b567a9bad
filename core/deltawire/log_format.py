"""Log lines: JSON for machines, one readable line for people. Nothing that a caller did not name gets in.

Celery hands task arguments to log records as `extra`; only the fields listed here are ever printed, so
no prompt reaches a log line by that way.
"""

import logging
import sys
import time
from typing import Final

import msgspec

LOG_FORMATS: Final = ("text", "json")
LOG_LEVELS: Final = ("debug", "info", "warning", "error", "critical")
FIELDS: Final = ("job_id", "attempt", "tenant", "status", "code")

# What would begin a line of somebody's own, or speak to the terminal: control characters and line separators.
_UNPRINTABLE: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    code: f"\\u{code:04x}" for code in (0x2028, 0x2029)
}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (Unix seconds), level, logger, message, and the fields named above."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _encodable(record.getMessage()),
        }
        line.update({name: getattr(record, name) for name in FIELDS if hasattr(record, name)})
        if record.exc_info:
            line["exception"] = _encodable(self.formatException(record.exc_info))
        return msgspec.json.encode(line).decode()


class TextFormatter(logging.Formatter):
    """`12:00:00.123 info  message  job_id=…`, on one line whatever is in it, but for an exception's."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f"  {name}={getattr(record, name)}" for name in FIELDS if hasattr(record, name))
        said = f"{record.getMessage()}{fields}".translate(_UNPRINTABLE)
        line = f"{clock}.{record.msecs:03.0f} {record.levelname.lower():<8} {said}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return _encodable(line)


def _encodable(text: str) -> str:
    """Without lone surrogates, which peers may send, and which no stream takes."""
    return text.encode("utf-8", "replace").decode()


def configure(*, log_format: str, level: str) -> None:
    """Sends all logging to stderr. `log_format` is "json" or "text"; called once, in `main`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
