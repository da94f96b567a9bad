"""Every code block of every page is run, from top to bottom; CONTRIBUTING.md says how to write them.

Those of the guides and of the cookbook have modules of their own, to run beside these.
"""

from pathlib import Path
from typing import Final

import pytest

from tests.support.code_blocks import blocks, indented
from tests.support.page_run import LANGUAGES, ROOT, Site
from tests.support.pages import OTHERS, PAGES, each_with_code, name, run_code

#: Blocks that are not run, by page. Each says why where it stands.
NOT_RUN: Final = {"docs/how-to/run-with-systemd.md": 5, "docs/operations.md": 3, "docs/scaling.md": 1}


@pytest.mark.parametrize("page", PAGES, ids=name)
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
    found = {name(page): sum("skip" in block.said for block in blocks(page.read_text())) for page in PAGES}
    assert {page: count for page, count in found.items() if count} == NOT_RUN


@each_with_code(OTHERS)
async def test_the_code_of_a_page(page: Path, site: Site, tmp_path: Path) -> None:
    await run_code(page, site, tmp_path)
