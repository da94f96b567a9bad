"""A value that fits a simple JSON Schema, for structured answers and tool arguments. Pure."""

from typing import Any

_MAX_NODES = 1000  # a schema that refers to itself in many places would grow without end
_MAX_DEPTH = 12
_FORMATS = {
    "date": "2026-01-31",
    "date-time": "2026-01-31T12:00:00Z",
    "time": "12:00:00Z",
    "email": "reader@example.com",
    "uri": "https://example.com/",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def sample(schema: dict[str, Any] | None, topic: str) -> Any:
    """A value for `schema`, with `topic` where a free string is wanted; deterministic.

    Knows `type`, `properties`, `items`, `enum`, `const`, `default`, `anyOf`/`oneOf`/`allOf`, local `$ref`,
    length, range and the common formats. Of other keywords (`pattern`, `not`, `if`) it knows nothing, and
    past 12 levels or 1,000 values it puts null: what it makes of such schemas may not fit.
    `Any`: JSON values and JSON Schemas have no static shape.
    """
    return _Sampler(schema or {}, topic).value(schema or {}, 0)


class _Sampler:
    def __init__(self, root: dict[str, Any], topic: str) -> None:
        self._root = root
        self._topic = topic
        self._nodes = 0

    def value(self, schema: Any, depth: int) -> Any:
        self._nodes += 1
        if self._nodes > _MAX_NODES or depth > _MAX_DEPTH or not isinstance(schema, dict):
            return None
        schema = self._resolve(schema)
        for key in ("const", "default"):
            if key in schema:
                return schema[key]
        for key in ("enum", "examples"):
            if isinstance(schema.get(key), list) and schema[key]:
                return schema[key][0]
        for key in ("anyOf", "oneOf"):
            if isinstance(schema.get(key), list) and schema[key]:
                return self.value(schema[key][0], depth + 1)
        return self._by_type(schema, depth)

    def _by_type(self, schema: dict[str, Any], depth: int) -> Any:
        kind = schema.get("type")
        if isinstance(kind, list):
            kind = next((k for k in kind if k != "null"), "null")
        match kind:
            case "array":
                wanted = _number(schema.get("minItems"), 0)
                count = max(1, int(wanted)) if _number(schema.get("maxItems"), 1) >= 1 else 0
                count = min(count, _MAX_NODES)
                return [self.value(schema.get("items", {}), depth + 1) for _ in range(count)]
            case "string":
                return self._string(schema)
            case "integer":
                return int(self._number_in_range(schema, 1))
            case "number":
                return self._number_in_range(schema, 0.5)
            case "boolean":
                return True
            case "null":
                return None
            case _ if kind == "object" or "properties" in schema or not schema:
                return self._object(schema, depth)
            case _:
                return self._topic

    def _object(self, schema: dict[str, Any], depth: int) -> dict[str, Any]:
        properties = schema.get("properties")
        if not isinstance(properties, dict):
            return {} if depth else {"topic": self._topic}
        return {name: self.value(part, depth + 1) for name, part in properties.items()}

    def _string(self, schema: dict[str, Any]) -> str:
        text = _FORMATS.get(str(schema.get("format")), self._topic)
        least = min(int(_number(schema.get("minLength"), 0)), 10_000)
        most = int(_number(schema.get("maxLength"), 10_000))
        return text.ljust(least, ".")[: max(most, 0)]

    def _number_in_range(self, schema: dict[str, Any], usual: float) -> float:
        low = _number(schema.get("minimum"), _number(schema.get("exclusiveMinimum"), usual - 1) + 1)
        high = _number(
            schema.get("maximum"), _number(schema.get("exclusiveMaximum"), max(low, usual) + 1) - 1
        )
        return min(max(usual, low), high)

    def _resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Follow local `$ref`s and lay the parts of `allOf` over each other."""
        for _ in range(_MAX_DEPTH):
            reference = schema.get("$ref")
            if not isinstance(reference, str) or not reference.startswith("#"):
                break
            target: Any = self._root
            for step in reference[1:].strip("/").split("/"):
                target = target.get(step) if isinstance(target, dict) and step else target
            if not isinstance(target, dict):
                return {}
            schema = target
        if isinstance(schema.get("allOf"), list):
            merged = {key: value for key, value in schema.items() if key != "allOf"}
            for part in schema["allOf"]:
                if isinstance(part, dict):
                    merged |= part if "$ref" not in part else self._resolve(part)
            return merged
        return schema


def _number(value: Any, default: float) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else default
