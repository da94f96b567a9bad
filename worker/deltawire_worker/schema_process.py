"""The process in which JSON is compared with the schemas of strangers; structured_output runs and limits it.

A line of JSON in, {"schema", "text"}, and a line out: {"reason", "message"}, or {} where the text keeps to
the schema. Nothing is fetched, and patterns run on an engine that takes linear time. Still a small schema can
ask for more work than there is time (references that double what they refer to), and the library holds the
GIL meanwhile: therefore a process of its own, with limits that the kernel keeps.
"""

import resource
import sys
import time
from contextlib import suppress
from typing import Any, Final

import jsonschema_rs
import msgspec

CPU_S: Final = 2
MEMORY_BYTES: Final = 1 << 30
MAX_PATH_CHARACTERS: Final = 300


def check(schema: Any, text: str) -> dict[str, str]:
    """What is wrong with the text, if anything.

    It never repeats what the schema says: requests are shown to nobody (PROTOCOL.md §1.3).
    """
    linear = jsonschema_rs.RegexOptions()
    try:
        validator = jsonschema_rs.validator_for(schema, offline=True, pattern_options=linear)
    except jsonschema_rs.ValidationError as error:
        problem = "is not valid"
        if error.kind.name == "$ref":
            problem = "refers to what is not in it"
        elif error.kind.name in {"pattern", "format"}:
            problem = "has a pattern that is none, or that only backtracking could match"
        return {"reason": "invalid_schema", "message": f"the schema {problem}"}
    except Exception:  # noqa: BLE001 - whatever a schema may be, the library's answer is the same
        return {"reason": "invalid_schema", "message": "the schema is not valid"}
    try:
        validator.validate(msgspec.json.decode(text))
    except jsonschema_rs.ValidationError as error:
        path = "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in error.instance_path)
        where = path[:MAX_PATH_CHARACTERS] or "the whole"
        return {
            "reason": "not_valid",
            "message": f"{where} does not keep to the schema's {error.kind.name!r}",
        }
    return {}


def main() -> None:
    """Answers until its input ends. It dies where a question takes more than CPU_S, or too much memory."""
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold what people have asked and got
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    for line in sys.stdin.buffer:
        question = msgspec.json.decode(line)
        with suppress(ValueError):  # there is less left than that
            resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + CPU_S, most))
        answer = check(question["schema"], question["text"])
        sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
