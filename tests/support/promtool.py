"""What Prometheus' own linter says of metrics (Debian: `apt-get install prometheus`)."""

import shutil
import subprocess

from tests.support.absent import lack


def problems(text: str) -> str:
    """Of `promtool check metrics`; empty where it finds none."""
    promtool = shutil.which("promtool")
    if promtool is None:
        lack("promtool is missing: apt-get install prometheus")
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60, check=False
    )
    return checked.stdout + checked.stderr if checked.returncode or checked.stderr else ""
