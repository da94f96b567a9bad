"""`deltawire up` and what its services say."""

import os
from pathlib import Path

import pytest

from deltawire.cli import up


async def test_a_line_of_any_length_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who stopped to listen would have the service wait for it for ever, in the middle of its line."""
    printed: list[str] = []
    monkeypatch.setattr(up, "_say", lambda text: printed.append(text.plain))
    (tmp_path / "wordy.py").write_text("print('x' * 300_000)\nprint('and the next')\n")
    service = up._Service("relay", "wordy")
    await service.start({**os.environ, "PYTHONPATH": str(tmp_path)})
    try:
        assert await service.ended() == 0
    finally:
        await service.stop()
    assert [len(line) for line in printed] == [300_010, 22]
    assert printed[1].endswith("and the next")
