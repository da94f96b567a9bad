"""docs/asyncapi.yaml (AsyncAPI 3) as a page. Pure."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from docs.site.schemas import example, fields, kind, sections

SOURCE: Final = Path(__file__).parents[1] / "asyncapi.yaml"


def markdown(document: dict[str, Any]) -> str:
    return "\n".join(_page(document))


def _page(document: dict[str, Any]) -> Iterator[str]:
    components = document.get("components", {})
    yield "# WebSocket and SSE\n"
    yield document["info"].get("description", "")
    yield (
        "Made of [asyncapi.yaml](../asyncapi.yaml), which tests hold against real frames; "
        "[the protocol](protocol.md) is the norm.\n"
    )
    yield "## Channels\n"
    for name, channel in document.get("channels", {}).items():
        yield f"### `{channel.get('address', name)}` {{ #channel-{name.lower()} }}\n"
        yield f"{channel.get('description', channel.get('summary', '')).strip()}\n"
        for action, who in (("receive", "A client sends"), ("send", "The relay sends")):
            names = [*_messages(document, name, channel, action)]
            if names:
                yield f"{who}: {', '.join(f'[{each}](#message-{each.lower()})' for each in names)}.\n"
    yield "## Messages\n"
    for name, message in components.get("messages", {}).items():
        yield f"### {message.get('title', message.get('name', name))} {{ #message-{name.lower()} }}\n"
        yield f"{message.get('description', message.get('summary', '')).strip()}\n"
        payload = message.get("payload", {})
        yield fields(payload) if "$ref" not in payload else f"{kind(payload)}\n"
        for each in message.get("examples", []):
            yield example(each.get("payload"))
    yield "## Schemas\n"
    yield from sections(components.get("schemas", {}))


def _messages(document: dict[str, Any], name: str, channel: dict[str, Any], action: str) -> Iterator[str]:
    """Of a channel, those that the relay, whose document it is, receives or sends."""
    for operation in document.get("operations", {}).values():
        if operation["action"] == action and operation["channel"]["$ref"].rpartition("/")[2] == name:
            for each in operation.get(
                "messages", [{"$ref": f"/{key}"} for key in channel.get("messages", {})]
            ):
                yield each["$ref"].rpartition("/")[2]
