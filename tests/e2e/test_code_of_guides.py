"""The code of the how-to guides: as test_code_blocks, beside it."""

from pathlib import Path

from tests.support.page_run import Site
from tests.support.pages import GUIDES, each_with_code, run_code


@each_with_code(GUIDES)
async def test_the_code_of_a_page(page: Path, site: Site, tmp_path: Path) -> None:
    await run_code(page, site, tmp_path)
