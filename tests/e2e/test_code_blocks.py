"""Every code block of every page is run, from top to bottom; CONTRIBUTING.md says how to write them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.code_blocks import Block, blocks, indented, page_says
from tests.support.page_run import LANGUAGES, ROOT, SHOWN, PageError, PageRun, Site

PAGES: Final = [
    path
    for path in (
        ROOT / "README.md",
        ROOT / "PROTOCOL.md",
        *sorted(ROOT.glob("clients/*/README.md")),
        *sorted((ROOT / "examples").glob("**/README.md")),
        *sorted((ROOT / "docs").glob("**/*.md")),
    )
    if not {"node_modules", "decisions"} & {*path.parts}
]
#: Blocks that are not run, by page. Each says why where it stands.
NOT_RUN: Final = {"docs/operations.md": 3, "docs/scaling.md": 1}

every_page: Final = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with Site() as site:
        yield site


@every_page
def test_each_block_is_of_a_known_kind(page: Path) -> None:
    """Of a language that is run or parsed. A file is used by another block. None escapes by indentation."""
    text = page.read_text()
    found = blocks(text)
    assert not indented(text), "blocks are fenced"
    for block in found:
        assert block.language in LANGUAGES or "skip" in block.said, f"line {block.line}: {block.language!r}"
        if block.title and not block.is_output and not {"skip", "elsewhere"} & {*block.said}:
            others = "\n".join(other.code for other in found if other.title != block.title)
            assert Path(block.title).stem in others, f"line {block.line}: nothing uses {block.title}"
        if "elsewhere" in block.said:
            test = (ROOT / block.said["elsewhere"]).read_text()
            assert page.name in test, f"line {block.line}: {block.said['elsewhere']} does not know this page"


def test_few_blocks_are_not_run() -> None:
    found = {
        str(page.relative_to(ROOT)): sum("skip" in block.said for block in blocks(page.read_text()))
        for page in PAGES
    }
    assert {page: count for page, count in found.items() if count} == NOT_RUN


def is_run(block: Block) -> bool:
    return not (block.is_output or block.language in SHOWN or {"skip", "elsewhere"} & {*block.said})


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(is_run(block) for block in blocks(page.read_text()))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
async def test_the_code_of_a_page(page: Path, site: Site, tmp_path: Path) -> None:
    text = page.read_text()
    found = blocks(text)
    async with PageRun.opened(site, tmp_path, with_keys="relay with keys" in page_says(text)) as run:
        for block, after in zip(found, [*found[1:], None], strict=True):
            if is_run(block):
                try:
                    await run.run(block, after if after and after.is_output else None)
                except PageError:
                    raise
                except Exception as error:
                    raise PageError(f"line {block.line}: {error}") from error
