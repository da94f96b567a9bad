"""Runs a page's Python: for each `{"code", "name", "environment"}`, a line, it answers `true` or `false`.

All blocks share one namespace, that of `__main__`, and one loop. What they print goes to the file that the
argument names.
"""

import ast
import asyncio
import inspect
import json
import linecache
import os
import sys
import traceback
from types import ModuleType


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    output = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.path[0] = os.getcwd()
    sys.modules["__main__"] = module = ModuleType("__main__")
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            block = json.loads(line)
            os.environ.update(block["environment"])
            answers.write(f"{json.dumps(run(runner, module, block['code'], block['name']))}\n")


def run(runner: asyncio.Runner, module: ModuleType, code: str, name: str) -> bool:
    """Whether it ended well. `await` may stand at its top level."""
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    try:
        compiled = compile(code, name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        if compiled.co_flags & inspect.CO_COROUTINE:
            runner.run(eval(compiled, module.__dict__))
        else:
            exec(compiled, module.__dict__)
    except SystemExit as end:
        return not end.code
    except BaseException:  # noqa: BLE001 - whatever a page may raise is told
        traceback.print_exc()
        return False
    return True


if __name__ == "__main__":
    main()
