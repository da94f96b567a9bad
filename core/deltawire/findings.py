"""What a look at an installation found: by `deltawire doctor`, and by each service's own `--check`."""

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, Final, Literal

import msgspec

from .environment import Environment
from .variables import problems_of

Level = Literal["ok", "warning", "error"]


class Finding(msgspec.Struct, frozen=True):
    """`change` says what to do about it, where something is to be done. Neither text holds a secret."""

    level: Level
    subject: str
    message: str
    change: str = ""


class Asked(msgspec.Struct, frozen=True):
    """What a service was asked on its command line."""

    is_check: bool
    asks_upstream: bool
    as_json: bool


_decoder: Final = msgspec.json.Decoder(Finding)


def encode_findings(findings: Iterable[Finding]) -> str:
    """One JSON object a line."""
    return "".join(f"{msgspec.json.encode(finding).decode()}\n" for finding in findings)


def decode_findings(lines: bytes) -> list[Finding]:
    """Raises msgspec.DecodeError."""
    return [_decoder.decode(line) for line in lines.splitlines()]


def as_text(findings: Iterable[Finding]) -> str:
    """Lines for a terminal."""
    lines: list[str] = []
    for finding in findings:
        lines.append(f"{finding.level:<8} {finding.subject}: {finding.message}")
        if finding.change:
            lines.append(f"         → {finding.change}")
    return "".join(f"{line}\n" for line in lines)


def exit_code(findings: Iterable[Finding]) -> int:
    return int(any(finding.level == "error" for finding in findings))


def of_configuration(subject: str, kind: type[msgspec.Struct], environment: Environment) -> list[Finding]:
    """All that is wrong with a service's variables; empty if nothing is."""
    return [
        Finding("error", subject, problem, "docs/configuration.md lists all variables")
        for problem in problems_of(kind, environment)
    ]


def of_open_files(subject: str, limit: int, wanted: int, why: str) -> Finding:
    """`limit` < 0: there is none."""
    if 0 <= limit < wanted:
        change = (
            f"raise it to {wanted} or more: `ulimit -n`, LimitNOFILE= of systemd, ulimits of docker compose"
        )
        return Finding("warning", subject, f"{limit} open files are too few for {why}", change)
    return Finding("ok", subject, f"{'no limit' if limit < 0 else limit}, enough for {why}")


def read_arguments(program: str) -> Asked:
    """Of a service's command line. Ends the process, with 2, for what it does not know."""
    parser = argparse.ArgumentParser(prog=program, description="Settings come from the environment.")
    parser.add_argument("--check", action="store_true", help="say what is wrong with the settings, and end")
    parser.add_argument("--ask", action="store_true", help="with --check: ask each upstream for one token")
    parser.add_argument("--json", action="store_true", help="with --check: one JSON object a line")
    asked = parser.parse_args()
    if (asked.ask or asked.json) and not asked.check:
        parser.error("--ask and --json go with --check")
    return Asked(asked.check, asked.ask, asked.json)


def run_check(asked: Asked, check: Callable[[Asked], Coroutine[Any, Any, list[Finding]]]) -> int:
    """Prints what a service finds. Returns its exit code: 1 if something has to be changed."""
    findings = asyncio.run(check(asked))
    sys.stdout.write(encode_findings(findings) if asked.as_json else as_text(findings))
    return exit_code(findings)
