"""What clients send, read: paths, queries and messages. Pure: bytes in, messages or a WireError out."""

from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from deltawire.errors import WireError
from deltawire.messages import ClientMessage, Subscribe

_decoder: Final[msgspec.json.Decoder[ClientMessage]] = msgspec.json.Decoder(ClientMessage)


def one_job(path: str) -> str | None:
    """The job id in /v1/jobs/{id}/ws; None for any other path."""
    match urlsplit(path).path.split("/"):
        case ["", "v1", "jobs", job_id, "ws"]:
            return unquote(job_id)
    return None


def subscription(job_id: str, query: str) -> Subscribe:
    """What ?starting_after=&mode=&merge= of a one-job path asks for. Raises WireError."""
    fields: dict[str, Any] = {name: values[-1] for name, values in parse_qs(query).items()}
    try:
        return msgspec.convert({**fields, "type": "subscribe", "job_id": job_id}, Subscribe, strict=False)
    except msgspec.ValidationError as error:
        raise WireError("invalid_request", f"the query does not fit: {error}") from error


def ticket_in(query: str) -> str | None:
    """The ticket of a one-job path; None where there is none."""
    return ", ".join(parse_qs(query).get("ticket", ())) or None  # two of them fit nothing


class Envelope(msgspec.Struct):
    """What an answer repeats of a message that is wrong in other ways."""

    request_id: str | None = None
    job_id: str | None = None


def envelope(data: str | bytes) -> Envelope:
    try:
        return msgspec.json.decode(data, type=Envelope)
    except msgspec.DecodeError:
        return Envelope()


def decode_message(data: str | bytes) -> ClientMessage:
    """Raises WireError. What is no JSON object in a text frame has a close code, a wrong field has none."""
    if isinstance(data, bytes):
        raise WireError("binary_frame", "messages are text frames of JSON")
    try:
        return _decoder.decode(data)
    except msgspec.ValidationError as error:
        if not data.lstrip().startswith("{"):
            raise WireError("invalid_json", "messages are JSON objects") from error
        code = "unknown_message_type" if "$.type" in str(error) else "invalid_request"
        raise WireError(code, f"not a message of this protocol: {error}") from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise WireError("invalid_json", f"messages are JSON objects: {error}") from error
