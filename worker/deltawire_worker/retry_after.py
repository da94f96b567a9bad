"""When a gateway says to come again: `Retry-After` in all its forms, and `retry-after-ms`. Pure."""

import math
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

MAX_S: Final = 86_400.0
"""Whoever says more, means "not today"."""

_NUMBER: Final = re.compile(r"[0-9]+(\.[0-9]*)?(e[+-]?[0-9]{1,4})?", re.ASCII | re.IGNORECASE)


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait, at most MAX_S; None where nothing is said, or nothing that makes sense.

    `retry-after-ms` (Azure, OpenAI) beats `Retry-After`, which is a number of seconds (RFC 9110 §10.2.3; also
    with a fraction) or a date. A date counts from the answer's own `Date`, whatever our clock says; one that
    has passed means now. `headers` does not mind the case of names.
    """
    for name, per_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        value = headers.get(name, "").strip()
        if _NUMBER.fullmatch(value):
            return min(float(value) / per_second, MAX_S)
    date = _date(headers.get("retry-after", ""), now)
    if date is None:
        return None
    since = _date(headers.get("date", ""), now)
    return min(max(0.0, date - (now if since is None else since)), MAX_S)


def _date(text: str, now: float) -> float | None:
    """An HTTP-date in any of the three forms of RFC 9110 §5.6.7, as Unix time."""
    text = text.strip()
    if not text[:3].isalpha():
        return None
    try:
        moment = parsedate_to_datetime(text)
        if re.match(r"[A-Za-z]+, [0-9]{1,2}-[A-Za-z]{3}-[0-9]{2} ", text):
            # Two digits of a year mean the last such year that is not more than 50 years ahead.
            year = moment.year
            this_year = datetime.fromtimestamp(now, UTC).year
            century = this_year - this_year % 100
            year = century + year % 100
            moment = moment.replace(year=year - 100 if year > this_year + 50 else year)
        if moment.tzinfo is None:  # asctime, which is always in UTC
            moment = moment.replace(tzinfo=UTC)
        seconds = moment.timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return seconds if math.isfinite(seconds) else None
