"""What cannot start says why in one line, and ends with a code that is not 0."""

import os
import subprocess
import sys

import pytest

from deltawire.redis_server import free_port

#: As `python -m MODULE …`, where a package is not installed.
WITHOUT = """\
import runpy, sys
module, missing, *arguments = sys.argv[1:]
sys.modules[missing] = None
sys.argv = ["deltawire", *arguments]
if module == "deltawire":
    from deltawire.cli import main
    main()
runpy.run_module(module, run_name="__main__")
"""


def said(*arguments: str, **environment: str) -> tuple[int, list[str]]:
    ended = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"DELTAWIRE_UPSTREAM_BASE_URL": "http://127.0.0.1:9/v1"} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert not ended.stdout
    return ended.returncode, ended.stderr.splitlines()


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("deltawire_relay", "prometheus_client", "relay"),
        ("deltawire_relay --check", "uvicorn", "relay"),
        ("deltawire_worker", "hiredis", "worker"),
        ("deltawire_worker --check", "greenlet", "worker"),
        ("deltawire.gateway", "httptools", "all"),
        ("deltawire", "typer", "cli"),
        ("deltawire top", "hiredis", "all"),
        ("deltawire doctor", "celery", "all"),
    ],
)
def test_an_extra_that_is_not_installed_is_named(command: str, missing: str, extra: str) -> None:
    module, *arguments = command.split()
    code, lines = said("-c", WITHOUT, module, missing, *arguments)
    assert code == 1
    (line,) = lines
    assert f"({missing})" in line
    assert line.endswith(f"pip install 'deltawire[{extra}]'")


@pytest.mark.parametrize("service", ["relay", "worker"])
def test_a_redis_that_is_not_there_is_one_line(service: str) -> None:
    """Whatever restarts services tries again; who reads the log finds the setting, and no traceback."""
    address = f"redis://127.0.0.1:{free_port()}/0"
    code, lines = said("-m", f"deltawire_{service}", DELTAWIRE_REDIS_URL=address)
    assert code == 1
    (line,) = lines
    assert "cannot connect to Redis: " in line
    assert line.endswith("(DELTAWIRE_REDIS_URL)")
