"""JSON Schemas as Markdown, for documents of OpenAPI and AsyncAPI. Pure."""

import json
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]


def anchor(name: str) -> str:
    return f"schema-{name.lower()}"


def cell(text: object) -> str:
    """In a table."""
    return str(text).strip().replace("\n", " ").replace("|", "\\|")


def kind(schema: Any) -> str:
    """What values there are, in a few words."""
    if not isinstance(schema, dict) or not schema:
        return "anything"
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{anchor(name)})"
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return " or ".join(kind(each) for each in schema[word])
    if "allOf" in schema:
        return " and ".join(kind(each) for each in schema["allOf"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(each)}`" for each in schema["enum"])
    said = schema.get("type", "object" if "properties" in schema else "anything")
    names = said if isinstance(said, list) else [said]
    return " or ".join(
        f"array of {kind(schema['items'])}" if name == "array" and "items" in schema else name
        for name in names
    )


def bounds(schema: Any) -> Iterator[str]:
    """What else holds of the values."""
    if not isinstance(schema, dict):
        return
    for word, said in (
        ("minimum", "at least {}"),
        ("exclusiveMinimum", "above {}"),
        ("maximum", "at most {}"),
        ("minLength", "at least {} characters"),
        ("maxLength", "at most {} characters"),
        ("minItems", "at least {}"),
        ("maxItems", "at most {}"),
        ("pattern", "matches `{}`"),
    ):
        if word in schema:
            yield said.format(schema[word])
    if "default" in schema:
        yield f"default `{json.dumps(schema['default'])}`"


def about(schema: Any, description: str = "") -> str:
    """Its description, and its bounds."""
    text = (description or (schema.get("description", "") if isinstance(schema, dict) else "")).strip()
    limits = ", ".join(bounds(schema))
    return cell(f"{text}{' ' if text and limits else ''}{f'({limits})' if limits else ''}")


def parts(schema: Schema) -> list[Schema]:
    """Those of an `allOf`, else the schema itself."""
    return [part for each in schema["allOf"] for part in parts(each)] if "allOf" in schema else [schema]


def rows(schema: Schema, prefix: str = "") -> Iterator[str]:
    for part in parts(schema):
        required = part.get("required", [])
        for name, field in part.get("properties", {}).items():
            always = "yes" if name in required else ""
            yield f"| `{prefix}{name}` | {cell(kind(field))} | {always} | {about(field)} |"
            if isinstance(field, dict) and "properties" in field:
                yield from rows(field, f"{prefix}{name}.")


def fields(schema: Schema) -> str:
    """A table of an object's fields, or a sentence."""
    table = [*rows(schema)]
    if table:
        return "\n".join(["| field | value | always | |", "|---|---|---|---|", *table]) + "\n"
    limits = ", ".join(bounds(schema))
    return f"{kind(schema)}{f' ({limits})' if limits else ''}\n"


def sections(schemas: dict[str, Schema], level: int = 3) -> Iterator[str]:
    """One for each schema that has a name."""
    for name, schema in schemas.items():
        yield f"{'#' * level} {name} {{ #{anchor(name)} }}\n"
        if schema.get("description"):
            yield f"{schema['description'].strip()}\n"
        yield fields(schema)


def example(value: Any) -> str:
    return f"```json\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```\n"
