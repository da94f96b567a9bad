"""How things are printed: readable on a terminal, plain in a pipe.

Standard output has what was asked for, standard error all that is said about it. What a model or a gateway
has written never reaches a terminal as it is: control characters in it could rewrite what stands there, or
make the terminal type. In a pipe it stays as it is, to the byte.
"""

import os
import sys
from typing import Any, Final

import msgspec
import typer
from rich.color import ColorSystem
from rich.console import Console
from rich.style import Style
from rich.text import Text

from .exit_codes import ExitCode

PIPE_WIDTH: Final = 200

# https://no-color.org. Dim and bold go as well: nothing but text comes.
_COLORS: Final = None if os.environ.get("NO_COLOR") else "auto"


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise typer.Exit(ExitCode.PIPE_CLOSED)


out: Final = _Console(highlight=False, soft_wrap=True, color_system=_COLORS)
err: Final = _Console(stderr=True, highlight=False, soft_wrap=True, color_system=_COLORS)

_SHOWN_AS: Final = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},  # ␛ and the like
    ord("\r"): None,  # of CR LF; alone it would let text overwrite the line
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),  # some terminals take C1 for escape sequences
    # What turns the direction of writing shows other text than there is (CVE-2021-42574).
    **dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD),
}


def printable(text: str) -> str:
    """The text without anything that a terminal obeys, but for line ends and tabs."""
    return text.translate(_SHOWN_AS)


def write(text: str, style: str = "") -> None:
    """To standard output, at once, without a line end. Raises typer.Exit where nobody reads any more."""
    if sys.stdout.isatty():
        text = printable(text)
    if style and out.color_system:
        text = Style.parse(style).render(text, color_system=ColorSystem.STANDARD)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError as error:
        raise typer.Exit(ExitCode.PIPE_CLOSED) from error


def write_json(value: Any) -> None:
    """As one line of JSON; bytes are one already."""
    line = value if isinstance(value, bytes) else msgspec.json.encode(value)
    write(f"{line.decode()}\n")


def say(*parts: str | tuple[str, str]) -> None:
    """A line about it, to standard error: texts, or texts with a style."""
    err.print(Text.assemble(*((printable(text), style) for text, style in map(_styled, parts))))


def cell(text: str, style: str = "") -> Text:
    """Text of others in a table: its brackets are no markup."""
    return Text(printable(text), style)


def is_lively() -> bool:
    """Whether somebody looks at a terminal on which lines can be rewritten."""
    return out.is_terminal and not out.is_dumb_terminal


def _styled(part: str | tuple[str, str]) -> tuple[str, str]:
    return (part, "") if isinstance(part, str) else part
