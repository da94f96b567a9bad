"""The code blocks of a page, read. Pure: text in, blocks out. CONTRIBUTING.md says how pages are written.

A block is fenced. A comment on the line before it (`<!-- code: browser; expect done -->`) says more than its
language does; a comment that begins with `code: hidden` is a block that readers do not see.
"""

import re
from dataclasses import dataclass
from typing import Final

#: Of a comment's words: those that stand alone, and those that take the rest of their part.
FLAGS: Final = frozenset({"background", "browser", "continues", "fails"})
VALUES: Final = frozenset({"expect", "skip", "elsewhere"})
OUTPUT: Final = "Output"

_BLOCK: Final = re.compile(
    r"""
    ^<!--\ code:\ hidden\ (?P<hidden_info>[^\n;]*?)(?:;\ *(?P<hidden_said>[^\n]*))?\n(?P<hidden>.*?)\n?^-->
    | (?:^\ *<!--\ code:\ (?P<said>[^\n]*?)\ *-->\n)?
      ^(?P<indent>\ *)(?P<fence>`{3,}|~{3,})(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)(?P=fence)\ *$
    """,
    re.MULTILINE | re.DOTALL | re.VERBOSE,
)
_INFO: Final = re.compile(r'^(?P<language>\S*)(?: title="(?P<title>[^"]+)")?$')
_LOOSE: Final = re.compile(
    r"[\w-]*(?:…|\.\.\.)|[0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d+(?:[.,]\d+)*|\s+"
)


class BadPageError(AssertionError):
    """A page says something of its code that nobody understands; the message names the line."""


@dataclass(frozen=True)
class Block:
    """`said` is what its comment says: flags with an empty value."""

    line: int
    language: str
    title: str
    code: str
    said: dict[str, str]
    is_hidden: bool = False

    @property
    def is_output(self) -> bool:
        """Of the block before it."""
        return self.language == "text" and self.title == OUTPUT


def blocks(text: str) -> list[Block]:
    """All of them, in order. Raises BadPageError."""
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("hidden" if match["hidden_info"] else "info")) + 1
        info = _INFO.match((match["hidden_info"] or match["info"] or "").strip())
        if info is None:
            raise BadPageError(f'line {line}: not LANGUAGE title="…": {match["info"]}')
        code = match["hidden"] if match["hidden_info"] else match["code"]
        indent = match["indent"] or ""
        found.append(
            Block(
                line,
                info["language"],
                info["title"] or "",
                "".join(each.removeprefix(indent) for each in code.splitlines(keepends=True)).rstrip("\n")
                + "\n",
                _said(match["hidden_said"] or match["said"] or "", line),
                is_hidden=match["hidden_info"] is not None,
            )
        )
    return found


def page_says(text: str) -> set[str]:
    """What comments say of a page as a whole."""
    return {match.strip() for match in re.findall(r"^<!-- code: (relay with keys) -->$", text, re.MULTILINE)}


def indented(text: str) -> list[int]:
    """The lines where blocks begin that are code by their indentation alone, and so escape the runner."""
    unfenced = _BLOCK.sub(lambda match: "\n" * match[0].count("\n"), text)
    return [
        unfenced.count("\n", 0, match.start()) + 2
        for match in re.finditer(r"^\n(?: {4,}\S[^\n]*\n)+", unfenced, re.MULTILINE)
        if not _in_list(unfenced[: match.start()])
    ]


def _in_list(before: str) -> bool:
    """Whether what is indented after this text goes on with an item of a list."""
    paragraphs = [each for each in before.rstrip().split("\n\n") if not each.startswith("    ")]
    return bool(paragraphs) and re.match(r" *(?:[-*]|\d+\.) ", paragraphs[-1].lstrip("\n")) is not None


def _said(comment: str, line: int) -> dict[str, str]:
    said = {}
    for part in filter(None, (each.strip() for each in comment.split("; "))):
        word, _, value = part.partition(" ")
        name = word.rstrip(":")
        if not (name in FLAGS and not value) and not (name in VALUES and value.strip()):
            raise BadPageError(f"line {line}: nobody knows what `code: {part}` is")
        said[name] = value.strip()
    return said


def missing(expected: str, output: str) -> str | None:
    """The first line of `expected` that is not in `output` behind those before it, or None.

    Loosely: any number equals any number, any job id any other, `…` is anything, also nothing, and white
    space is white space.
    """
    position = 0
    for line in filter(None, map(str.strip, expected.splitlines())):
        found = re.compile(_pattern(line), re.DOTALL).search(output, position)
        if found is None:
            return line
        position = found.end()
    return None


def _pattern(line: str) -> str:
    pattern, end = "", 0
    for match in _LOOSE.finditer(line):
        token = match[0]
        pattern += re.escape(line[end : match.start()])
        end = match.end()
        if token.endswith(("…", "...")):
            word = token.rstrip("….")
            pattern += r"\S*?.*?" if re.search(r"\d", word) else re.escape(word) + ".*?"
        elif token.isspace():
            pattern += r"\s+"
        elif len(token) >= 32:  # a job's id
            pattern += r"[0-9a-f-]{32,36}"
        else:
            pattern += r"[\d.,]*\d"
    return pattern + re.escape(line[end:])


def commands(code: str, *, console: bool) -> list[tuple[str, str]]:
    """A console's commands, each with the output that is shown; a script is one, with none.

    But where a script speaks of JOB_ID it is as many as it has lines: one may print what the next one means.
    """
    if not console:
        lines = re.findall(r"(?:.*\\\n)*.+\n", code) if "JOB_ID" in code else [code]
        return [(line, "") for line in lines]
    found: list[tuple[str, str]] = []
    for line in code.splitlines(keepends=True):
        if line.startswith("$ "):
            found.append((line[2:], ""))
        elif not found:
            raise BadPageError(f"a console begins with a command: {line}")
        elif line.startswith("> ") and not found[-1][1]:
            found[-1] = (found[-1][0] + line[2:], "")
        else:
            found[-1] = (found[-1][0], found[-1][1] + line)
    return found
