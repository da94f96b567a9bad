"""Writes docs/asyncapi.yaml (AsyncAPI 3.0) from the records of events and messages: `make configuration`.

What is said here besides is what records cannot say: addresses, who sends what, what a number means.
"""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec
import yaml

from deltawire.events import STATUSES, Event
from deltawire.messages import ClientMessage, ServerMessage

DOCUMENT: Final = Path(__file__).with_suffix(".yaml")
Json = dict[str, Any]

EVENTS: Final[tuple[Any, ...]] = Event.__args__  # records
FROM_CLIENT: Final[tuple[Any, ...]] = ClientMessage.__args__
FROM_SERVER: Final[tuple[Any, ...]] = ServerMessage.__args__
#: Of FROM_SERVER what an event stream has: there is nobody to answer, and comments are its heartbeat.
OF_STREAM: Final = ("subscribed", "snapshot", "error", "goodbye")
ANSWERS: Final = {
    "authenticate": "authenticated",
    "subscribe": "subscribed",
    "unsubscribe": "unsubscribed",
    "cancel": "cancel_result",
}
#: Two records have the name Cancel: what a client asks for, and what a terminal event says of it.
RENAMED: Final = {"deltawire.events.Cancel": "CancelDetails", "deltawire.messages.Cancel": "Cancel"}

HEAD: Final = """\
# The relay's messages, WebSocket and server-sent events, for tools. PROTOCOL.md is the norm and says more.
# Written by `make configuration` from the records in core/deltawire/events.py and core/deltawire/messages.py;
# tests/integration/test_asyncapi.py holds it against what a real relay sends.
"""
DESCRIPTION: Final = """\
Every reader of a job sees the same events, numbered 1, 2, 3 …, however often it reconnects. Times are Unix
seconds, durations (`…_s`) seconds. Readers must ignore fields and message types that they do not know.
Sections (§) are those of PROTOCOL.md. Commands over HTTP are in docs/openapi.yaml.
"""

#: What properties mean, and their bounds, wherever they stand.
PROPERTIES: Final[dict[str, Json]] = {
    "job_id": {"pattern": "^[A-Za-z0-9_-]{1,128}$"},
    "sequence_number": {"minimum": 1, "description": "1, 2, 3 …; of several the last."},
    "first_sequence_number": {"minimum": 1, "description": "Merged from this delta on (§6.6)."},
    "starting_after": {"minimum": 0, "description": "The last sequence number that the client has."},
    "earliest_sequence_number": {"minimum": 0, "description": "The first event that can be replayed."},
    "latest_sequence_number": {"minimum": 0},
    "discard_through": {"minimum": 1, "description": "Deltas up to this one do not count any more."},
    "attempt": {"minimum": 0, "description": "0: no worker has had the job yet."},
    "created_at": {"description": "When it was written, in Unix seconds."},
    "chunk": {"type": "object", "description": "As the upstream sent it (§2.2)."},
    "try": {"minimum": 2},
    "recovered": {"description": "False: what is missing comes as a snapshot (§6.3)."},
    "request_id": {"description": "The answer to a message repeats it."},
    "completion_url": {"description": "Where the completion is, if it was too large for an event (§2.3)."},
    "parsed": {"description": "The JSON value that `response_format` asked for (§2.3)."},
    "positions": {"description": "The last sequence number written, by job."},
    "retry_after_s": {"description": "In how many seconds to try again."},
}
OF_ONE: Final[dict[tuple[str, str], Json]] = {
    ("Subscribed", "status"): {"enum": [*STATUSES, "unknown"]},
    ("CancelResult", "status"): {"enum": [*STATUSES, "unknown"]},
    ("deltawire.messages.Cancel", "reason"): {"maxLength": 255},
    ("Goodbye", "code"): {"description": "The close code that follows (§6.5)."},
    ("Error", "code"): {"description": "Stable; §8 lists them."},
    ("Error", "message"): {"description": "For people."},
}


def document() -> Json:
    """The whole of it."""
    server = {"host": "127.0.0.1:8080", "security": _refs("#/components/securitySchemes", "bearer", "ticket")}
    offer = "Offer the subprotocol `deltawire.v1`. Close codes: §6.5."
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "deltawire relay",
            "version": "1",
            "description": DESCRIPTION,
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/json",
        "servers": {
            "websocket": {"protocol": "ws", "description": offer, **server},
            "http": {"protocol": "http", "description": "Server-sent events.", **server},
        },
        "channels": _channels(),
        "operations": _operations(),
        "components": {
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, or a token (§5.1).",
                },
                "ticket": {
                    "type": "httpApiKey",
                    "name": "ticket",
                    "in": "query",
                    "description": "A token for one job, in its URL (§5.1); not on `/v1/ws`.",
                },
            },
            "messages": {_tag(kind): _message(kind) for kind in (*EVENTS, *FROM_CLIENT, *FROM_SERVER)},
            "schemas": schemas(),
        },
    }


def _channels() -> Json:
    query = {
        "starting_after": {"type": "integer", "minimum": 0},
        "mode": {"enum": ["replay", "snapshot"]},
        "merge": {"type": "boolean"},
    }
    one_job = {"parameters": {"job_id": {"description": "The job's id."}}}
    socket = {
        "servers": _refs("#/servers", "websocket"),
        "messages": _messages(_tags(FROM_CLIENT, FROM_SERVER, EVENTS)),
    }
    return {
        "socket": {
            "address": "/v1/ws",
            "summary": "Many jobs; which ones, the client says (§6).",
            **socket,
            "bindings": {"ws": {"method": "GET"}},
        },
        "jobSocket": {
            "address": "/v1/jobs/{job_id}/ws",
            "summary": "One job, subscribed at once by the query; 1000 closes it after the end (§6).",
            **one_job,
            **socket,
            "bindings": {"ws": {"method": "GET", "query": {"type": "object", "properties": query}}},
        },
        "jobEvents": {
            "address": "/v1/jobs/{job_id}/events",
            "summary": "One job as `text/event-stream`: `data:` is a message, `id:` its number (§7).",
            "description": "Query: `starting_after` (`Last-Event-ID` beats it), `mode`, `merge`, `ticket`.",
            **one_job,
            "servers": _refs("#/servers", "http"),
            "messages": _messages([*OF_STREAM, *_tags(EVENTS)]),
        },
    }


def _operations() -> Json:
    """Seen from the relay: it receives what clients send."""
    made: Json = {}
    for name, told in (
        ("socket", _tags(FROM_SERVER)),
        ("jobSocket", _tags(FROM_SERVER)),
        ("jobEvents", OF_STREAM),
    ):
        channel, there = {"channel": _ref("#/channels", name)}, f"#/channels/{name}/messages"
        title = f"{name[0].upper()}{name[1:]}"
        made[f"send{title}"] = {"action": "send", **channel, "messages": _refs(there, *told, *_tags(EVENTS))}
        for asked, answer in ANSWERS.items() if told is not OF_STREAM else ():
            reply = {**channel, "messages": _refs(there, answer, "error")}
            asks = {"action": "receive", **channel, "messages": _refs(there, asked), "reply": reply}
            made[f"{asked}{title}"] = asks
    return made


def _message(kind: Any) -> Json:  # a record
    name = RENAMED.get(f"{kind.__module__}.{kind.__name__}", kind.__name__)
    message: Json = {"name": _tag(kind), "title": name}
    if kind.__doc__:
        message["summary"] = _in_one_line(kind.__doc__)
    if "request_id" in kind.__struct_fields__:
        message["correlationId"] = {"location": "$message.payload#/request_id"}
    return {**message, "payload": _ref("#/components/schemas", name)}


def schemas() -> Json:
    """JSON Schemas of all records, by name."""
    kinds = (*EVENTS, *FROM_CLIENT, *FROM_SERVER)
    _, made = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    always = {kind.__name__: _always_there(kind) for kind in kinds}
    always |= {name: set(made[name]["properties"]) for name in ("Error", "Output")}  # nothing is left out
    for name, schema in made.items():
        properties = schema["properties"]
        if name in always:
            schema["required"] = [field for field in properties if field in always[name]]
        if "description" in schema:
            schema["description"] = _in_one_line(schema["description"])
        for field in properties:
            if field in schema.get("required", ()):
                properties[field].pop("default", None)
            if "$ref" not in properties[field]:  # nothing may stand beside one
                properties[field].update(PROPERTIES.get(field, {}) | OF_ONE.get((name, field), {}))
    return {RENAMED.get(name, name): _renamed(schema) for name, schema in made.items()}


def _always_there(kind: Any) -> set[str]:  # a record
    """What a message of the kind always has: all but what may be unset, or is left out as a default."""
    leaves_out = kind.__struct_config__.omit_defaults
    return {"type"} | {
        field.encode_name
        for field in msgspec.structs.fields(kind)
        if field.default is msgspec.NODEFAULT or not (leaves_out or field.default is msgspec.UNSET)
    }


def _renamed(schema: Any) -> Any:  # JSON
    if isinstance(schema, dict):
        return {key: _renamed(value) for key, value in schema.items()}
    if isinstance(schema, list):
        return [_renamed(value) for value in schema]
    base, _, name = schema.rpartition("/") if isinstance(schema, str) else ("", "", "")
    return f"{base}/{RENAMED[name]}" if name in RENAMED else schema


def _tag(kind: Any) -> str:  # a record
    return str(kind.__struct_config__.tag)


def _tags(*kinds: tuple[Any, ...]) -> list[str]:  # records
    return [_tag(kind) for some in kinds for kind in some]


def _messages(tags: Iterable[str]) -> Json:
    return {tag: _ref("#/components/messages", tag) for tag in tags}


def _ref(where: str, name: str) -> Json:
    return {"$ref": f"{where}/{name}"}


def _refs(where: str, *names: str) -> list[Json]:
    return [_ref(where, name) for name in names]


def _in_one_line(text: str) -> str:
    return " ".join(inspect.cleandoc(text).split())


class _Dumper(yaml.SafeDumper):  # type: ignore[misc] # it has no types
    def ignore_aliases(self, _data: Any) -> bool:
        return True  # each part stands where it is read


def text() -> str:
    """The text of docs/asyncapi.yaml."""
    return HEAD + str(yaml.dump(document(), Dumper=_Dumper, sort_keys=False, width=140, allow_unicode=True))


def main() -> None:
    DOCUMENT.write_text(text())


if __name__ == "__main__":
    main()
