"""Shell completion: each shell that is here reads our script, and is asked what it would offer."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deltawire.redis_server import free_port
from tests.support.absent import lack
from tests.support.system import System, request, submit
from tests.support.terminal import environment_of

#: Who presses Tab waits for a second; on a machine that has much else to do a relay takes longer.
PROGRAM = f"""#!{sys.executable}
import os
from deltawire.cli import completion, main
completion.TIMEOUT_S = float(os.environ.get("PATIENCE_S", completion.TIMEOUT_S))
main()
"""


@pytest.fixture
def bin_directory(tmp_path: Path) -> Path:
    """With a program named `deltawire`, which is this tree's."""
    directory = tmp_path / "bin"
    directory.mkdir()
    program = directory / "deltawire"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    return directory


BASH = (
    'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _deltawire_completion "$1"; printf "%s\\n" "${COMPREPLY[@]}"'
)
FISH = "complete -C (string join ' ' -- $argv)"


def run(environment: dict[str, str], *command: str) -> str:
    """Standard output; standard error has to be empty."""
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def offered(shell: str, script: str, words: list[str], environment: dict[str, str]) -> list[str]:
    """What the shell offers for the last of the words."""
    if shell == "bash":
        return run(environment, "bash", "-c", f"{script}\n{BASH}", "bash", *words).split()
    if shell == "fish":
        told = run(environment, "fish", "--no-config", "-c", f"{script}\n{FISH}", *words)
        return [line.partition("\t")[0] for line in told.splitlines()]
    # zsh completes in its line editor only: what the script tells it there is looked at instead.
    function = "compdef() { :; }; _files() { :; }; _arguments() { print -r -- $1; }"
    call = f"words=({' '.join(map(repr, words))}); CURRENT={len(words)}; _deltawire_completion"
    told = run(environment, "zsh", "-f", "-c", f"{function}\n{script}\n{call}")
    return re.findall(r'(?<!:)"([^"]+)"(?=[: )])', told)


@pytest.mark.timeout(300)  # a dozen programs, one after the other
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_tab_completes(system: System, bin_directory: Path, shell: str) -> None:
    """Commands, options, and the ids of jobs; nothing, and no word, where no relay answers."""
    if not shutil.which(shell):
        lack(f"{shell} is not on this machine: apt-get install {shell}")
    job_id = await submit(system, request("hello"))
    path = f"{bin_directory}{os.pathsep}{os.environ['PATH']}"
    environment = environment_of(system, PATH=path, PATIENCE_S="30")

    # As --show-completion does, which finds out by itself which shell it is in.
    how = environment | {"_DELTAWIRE_COMPLETE": f"source_{shell}"}
    script = await asyncio.to_thread(run, how, "deltawire")

    async def of(*words: str, **more: str) -> list[str]:
        return await asyncio.to_thread(offered, shell, script, ["deltawire", *words], environment | more)

    assert {"submit", "tail", "cancel", "jobs", "top"} <= set(await of(""))
    assert await of("tail", job_id[:12]) == [job_id]
    if shell != "bash":
        return  # which words there are is said to all shells alike
    assert "--starting-after" in await of("tail", "--")
    assert await of("jobs", "--delete", job_id[:12]) == [job_id]
    assert await of("jobs", "--status", "comp") == ["completed"]
    assert await of("keys", "new", "name", "--scope", "su") == ["submit"]
    assert "on_abandon=" in await of("submit", "x", "--option", "on")
    nowhere = f"http://127.0.0.1:{free_port()}"
    assert await of("tail", job_id[:12], DELTAWIRE_PUBLIC_URL=nowhere, PATIENCE_S="1") == []
