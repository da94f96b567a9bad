"""docs/openapi.yaml as a page. Pure."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from docs.site.schemas import about, cell, example, fields, kind, sections

SOURCE: Final = Path(__file__).parents[1] / "openapi.yaml"
_METHODS: Final = ("get", "post", "put", "patch", "delete")


def markdown(document: dict[str, Any]) -> str:
    return "\n".join(_page(document))


def _page(document: dict[str, Any]) -> Iterator[str]:
    yield "# HTTP API\n"
    yield document["info"]["description"].replace("docs/asyncapi.yaml", "[asyncapi.yaml](messages.md)")
    yield (
        "Made of [openapi.yaml](../openapi.yaml), which tests hold against a real relay; "
        "[the protocol](protocol.md) is the norm.\n"
    )
    operations = [
        (method, path, item, item[method])
        for path, item in document["paths"].items()
        for method in item
        if method in _METHODS
    ]
    yield "| | |\n|---|---|"
    for method, path, _, operation in operations:
        link = f"[`{method.upper()} {path}`](#operation-{operation['operationId'].lower()})"
        yield f"| {link} | {cell(operation['summary'])} |"
    yield ""
    for tag in document["tags"]:
        yield f"## {tag['name']}\n\n{tag.get('description', '')}\n"
        for method, path, item, operation in operations:
            if tag["name"] in operation["tags"]:
                yield from _operation(document, f"{method.upper()} {path}", item, operation)
    yield "## Schemas\n"
    yield from sections(document["components"]["schemas"])


def _operation(
    document: dict[str, Any], title: str, item: dict[str, Any], operation: dict[str, Any]
) -> Iterator[str]:
    yield f"### `{title}` {{ #operation-{operation['operationId'].lower()} }}\n"
    yield f"**{operation['summary']}.** {operation.get('description', '')}\n"
    parameters = [
        _resolved(document, each) for each in [*item.get("parameters", []), *operation.get("parameters", [])]
    ]
    if parameters:
        yield "| parameter | in | value | |\n|---|---|---|---|"
        for each in parameters:
            name = f"`{each['name']}`{', required' if each.get('required') else ''}"
            schema = each.get("schema", {})
            text = about(schema, each.get("description", ""))
            yield f"| {name} | {each['in']} | {cell(kind(schema))} | {text} |"
        yield ""
    body = _resolved(document, operation.get("requestBody", {}))
    for content_type, media in body.get("content", {}).items():
        yield f"Body, `{content_type}`{'' if body.get('required') else ', optional'}:\n"
        yield (
            fields(media.get("schema", {}))
            if "$ref" not in media.get("schema", {})
            else f"{kind(media['schema'])}\n"
        )
        if "example" in media:
            yield example(media["example"])
    yield "| answer | | body |\n|---|---|---|"
    for status, answer in operation["responses"].items():
        said = _resolved(document, answer)
        bodies = " or ".join(
            kind(media.get("schema")) + ("" if content_type == "application/json" else f" (`{content_type}`)")
            for content_type, media in said.get("content", {}).items()
        )
        yield f"| {status} | {cell(said.get('description', ''))} | {cell(bodies)} |"
    yield ""


def _resolved(document: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """What a `$ref` stands for."""
    while "$ref" in value:
        found: Any = document
        for name in value["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        value = found
    return value
