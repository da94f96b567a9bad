"""No page names a file, a section, a setting, a metric, a command or a target of make that does not exist."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import typer

from deltawire.cli.commands import app
from docs.configuration import names
from tests.support.code_blocks import blocks
from tests.unit.test_compose import OF_COMPOSE

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("**/*.md")),
]
#: What a reader makes, or sets for the tests.
MADE: Final = {"deploy/kubernetes/overlays/mine"}
OF_TESTS: Final = {"DELTAWIRE_TEST_REDIS_PROGRAM"}
PACKAGES: Final = {"deltawire_relay", "deltawire_worker"}
#: Of the pytest plugin.
FIXTURES: Final = {"deltawire_gateway", "deltawire_server", "deltawire_environment"}
DIRECTORIES: Final = (
    "benchmarks",
    "core",
    "deploy",
    "docs",
    "examples",
    "relay",
    "requirements",
    "tests",
    "worker",
)

every_page: Final = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code(text: str) -> Iterator[str]:
    """The lines of code blocks, and what stands in the text as code."""
    for block in blocks(text):
        yield from block.code.splitlines()
    yield from re.findall(r"^ {4}(.*)$", text, re.MULTILINE)
    yield from re.findall(r"`([^`\n]+)`", text)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    """To a file, and in it to a heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("https:", "http:")):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


@every_page
def test_paths_are_there(page: Path) -> None:
    """Also those that are no links."""
    for path in re.findall(rf"(?<![\w/.-])((?:{'|'.join(DIRECTORIES)})/[\w./-]+)", page.read_text()):
        assert path in MADE or (ROOT / path.rstrip(".")).exists(), path


@every_page
def test_settings_are_read_by_something(page: Path) -> None:
    named = set(re.findall(r"\bDELTAWIRE_[A-Z0-9_]*[A-Z0-9]\b", page.read_text()))
    assert named <= names() | OF_COMPOSE | OF_TESTS


@every_page
def test_metrics_are_documented(page: Path) -> None:
    """In docs/metrics.md, whose tables a test compares with what is served."""
    named = re.findall(r"\bdeltawire_[a-z_]+", "\n".join(code(page.read_text())))
    known = set(re.findall(r"\bdeltawire_[a-z_]+", (ROOT / "docs" / "metrics.md").read_text()))
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in named} - known <= {*PACKAGES, *FIXTURES}


@every_page
def test_sections_of_the_protocol_exist(page: Path) -> None:
    """§4.2 is the second promise."""
    protocol = (ROOT / "PROTOCOL.md").read_text()
    sections = set(re.findall(r"^#+ ([\d.]*\d)\.? ", protocol, re.MULTILINE))
    sections |= {f"4.{number}" for number in re.findall(r"^(\d)\. \*\*", protocol, re.MULTILINE)}
    assert {*re.findall(r"§(\d+(?:\.\d+)?)", page.read_text())} <= sections


@every_page
def test_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code(page.read_text()):
        assert {*re.findall(r"^(?:[A-Z_]+=\S+ )*make ([a-z-]+)", line)} <= targets, line


@every_page
def test_commands_exist(page: Path) -> None:
    """And their options. `deltawire up | worker` names two."""
    commands = getattr(typer.main.get_command(app), "commands")  # noqa: B009 - not in typer's types
    for line in code(page.read_text()):
        found = re.match(
            r"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:docker compose exec \w+ )?(?:\.venv/bin/)?deltawire ([a-z| ]+)(.*)",
            line,
        )
        for name in found[1].split(" | ") if found else ():
            first, *more = name.split()
            assert first in commands, line
            command = commands[first]
            for each in more[: 1 if hasattr(command, "commands") else 0]:
                assert each in command.commands, line
                command = command.commands[each]
            options = {option for each in command.params for option in each.opts}
            assert {*re.findall(r" (--[a-z-]+)", found[2].partition("#")[0] if found else "")} <= options, (
                line
            )
