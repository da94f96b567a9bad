"""What a queue message says: the task's arguments, checked and encoded for the record. Pure."""

from collections.abc import Mapping
from typing import Any

import msgspec

from deltawire.errors import WireError
from deltawire.options import Options, check_request, parse_options


def read_arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[WireError | None, Options, bytes]:
    """What is wrong with a message's arguments, if anything; and what of them goes into the record."""
    options, request = Options(), b"null"
    try:
        options = parse_options(kwargs.get("options"))
        msgspec.json.encode(options)
        request = msgspec.json.encode(kwargs.get("request"))
        check_request(kwargs.get("request"))
    except WireError as error:
        return error, options, request
    except UnicodeEncodeError:
        # JSON can say lone surrogates; UTF-8 cannot.
        return WireError("invalid_request", "a text holds a lone surrogate"), Options(), request
    if unknown := set(kwargs) - {"request", "options"}:
        message = f"the task takes request and options, not {', '.join(sorted(unknown))}"
        return WireError("invalid_request", message, param=min(unknown)), options, request
    if args:
        return WireError("invalid_request", "the task takes keyword arguments only"), options, request
    return None, options, request
