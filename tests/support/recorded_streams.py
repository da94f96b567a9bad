"""Streams recorded from a real provider, beside the repository; not everybody has them."""

from pathlib import Path
from typing import Final

_DIRECTORY: Final = Path(__file__).parents[2].parent / "shared" / "fixtures" / "openai"
RECORDED: Final = sorted(_DIRECTORY.glob("*.sse"))
