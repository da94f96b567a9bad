"""docs/asyncapi.yaml is written from the records, and says what PROTOCOL.md says."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest
import yaml

from docs.asyncapi import DOCUMENT, EVENTS, FROM_CLIENT, FROM_SERVER, text

PROTOCOL = (Path(__file__).parents[2] / "PROTOCOL.md").read_text()
Json = dict[str, Any]


@pytest.fixture(scope="module")
def document() -> Json:
    read: Json = yaml.safe_load(DOCUMENT.read_text())
    return read


def test_the_document_is_as_written() -> None:
    """`make configuration` would not change it."""
    assert DOCUMENT.read_text() == text()


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        yield from [part["$ref"]] if isinstance(part.get("$ref"), str) else []
        part = list(part.values())
    for each in part if isinstance(part, list) else ():
        yield from references(each)


def test_references_lead_somewhere(document: Json) -> None:
    """Each to a part of the document."""
    for reference in references(document):
        part: Any = document
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]


def test_every_type_of_message_is_there_and_no_other(document: Json) -> None:
    """With a payload whose type it is; and each is on a channel, and in an operation."""
    tags = {kind.__struct_config__.tag for kind in (*EVENTS, *FROM_CLIENT, *FROM_SERVER)}
    messages, schemas = document["components"]["messages"], document["components"]["schemas"]
    assert set(messages) == tags
    for tag, message in messages.items():
        schema = schemas[message["payload"]["$ref"].rpartition("/")[2]]
        assert schema["properties"]["type"] == {"enum": [tag]}
    assert set(document["channels"]["socket"]["messages"]) == tags
    used = {
        reference.rpartition("/")[2]
        for operation in document["operations"].values()
        for reference in references(operation["messages"])
    }
    assert used == tags


def told() -> Iterator[tuple[str, set[str]]]:
    """What PROTOCOL.md says that messages and events have besides what all of them have."""
    for tag, fields in re.findall(r"^- `(\w+)` \{([^}]*)\}", PROTOCOL, re.MULTILINE):
        yield tag, {name[1] for part in fields.split(", ") if (name := re.match(r"`(\w+)`", part))}


def test_the_protocol_names_the_same_fields(document: Json) -> None:
    """In the lists of §2.1, §6.2 and §6.3."""
    messages, schemas = document["components"]["messages"], document["components"]["schemas"]
    of_all = {"type", "request_id", "job_id", "sequence_number", "attempt", "created_at"}
    seen = set()
    for tag, fields in told():
        schema = schemas[messages[tag]["payload"]["$ref"].rpartition("/")[2]]
        assert fields - of_all == schema["properties"].keys() - of_all, tag
        seen.add(tag)
    assert seen >= {
        "in_progress",
        "retrying",
        "restarted",
        "subscribe",
        "subscribed",
        "snapshot",
        "goodbye",
    }


def test_the_protocols_examples_are_valid(document: Json) -> None:
    """Those that are whole messages."""
    messages = document["components"]["messages"]
    examples = re.findall(r'^(\{"type":.*\})$', PROTOCOL, re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        message = msgspec.json.decode(example.replace("{…}", "{}").replace("…", "0"))
        root = {**messages[message["type"]]["payload"], "components": document["components"]}
        jsonschema_rs.Draft202012Validator(root).validate(message)
