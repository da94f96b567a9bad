"""The pages whose code is run. A module of tests for each group, so that they run beside each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.support.code_blocks import Block, blocks, page_says
from tests.support.page_run import ROOT, SHOWN, PageError, PageRun, Site

_DOCS: Final = ROOT / "docs"
GUIDES: Final = sorted(_DOCS.glob("how-to/*.md"))
RECIPES: Final = sorted(_DOCS.glob("cookbook/*.md"))
OTHERS: Final = [
    path
    for path in (
        *sorted(ROOT.glob("*.md")),
        *sorted(ROOT.glob("clients/*/README.md")),
        *sorted((ROOT / "examples").glob("**/README.md")),
        *sorted(_DOCS.glob("**/*.md")),
    )
    if path not in {*GUIDES, *RECIPES} and "node_modules" not in path.parts
]
PAGES: Final = [*OTHERS, *GUIDES, *RECIPES]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def is_run(block: Block) -> bool:
    return not (block.is_output or block.language in SHOWN or {"skip", "elsewhere"} & {*block.said})


def each_with_code(pages: Sequence[Path]) -> pytest.MarkDecorator:
    """Of these pages those where there is something to run."""
    long = pytest.mark.timeout(300)  # a page may have a dozen programs, each with a time-out of its own
    some = [
        pytest.param(page, marks=long)
        for page in pages
        if any(is_run(block) for block in blocks(page.read_text()))
    ]
    return pytest.mark.parametrize("page", some, ids=name)


async def run_code(page: Path, site: Site, directory: Path) -> None:
    """All of a page, in order. Raises PageError at the first block that does not do what the page says."""
    text = page.read_text()
    found = blocks(text)
    async with PageRun.opened(site, directory, with_keys="relay with keys" in page_says(text)) as run:
        for block, after in zip(found, [*found[1:], None], strict=True):
            if is_run(block):
                try:
                    await run.run(block, after if after and after.is_output else None)
                except PageError:
                    raise
                except Exception as error:
                    raise PageError(f"line {block.line}: {error}") from error
