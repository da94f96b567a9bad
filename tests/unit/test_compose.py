"""The container files stay true to the code. Checked as text: no engine, no YAML parser."""

import hashlib
import re
from pathlib import Path

import pytest

from deltawire.api_keys import SCOPES, digest, parse_api_keys
from docs.configuration import names

ROOT = Path(__file__).parents[2]
COMPOSE = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
ENV_EXAMPLE = (ROOT / ".env.example").read_text()


def _block(text: str, heading: str) -> str:
    """What is indented below the line `heading`, without comments. Fails unless there is one such line."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    (start,) = (number for number, line in enumerate(lines) if line.split(" #")[0].rstrip() == heading)
    depth = len(heading) - len(heading.lstrip())
    body: list[str] = []
    for line in lines[start + 1 :]:
        if len(line) - len(line.lstrip()) <= depth:
            break
        body.append(line)
    return "\n".join(body)


def _merged(block: str) -> str:
    """The block, and what it takes in by `<<: *anchor` at its own depth."""
    depth = len(block) - len(block.lstrip())
    for anchor in re.findall(rf"^ {{{depth}}}<<: \*(\w+)$", block, re.MULTILINE):
        (heading,) = re.findall(rf"^\S+: &{anchor}$", COMPOSE, re.MULTILINE)
        block += "\n" + _merged(_block(COMPOSE, heading))
    return block


SERVICES = re.findall(r"^  (\w+):$", _block(COMPOSE, "services:"), re.MULTILINE)


def test_the_example_lists_what_the_code_reads() -> None:
    """Every variable that the code reads is in .env.example once, and no other."""
    listed = re.findall(r"^#? ?(DELTAWIRE_[A-Z0-9_]+)=", ENV_EXAMPLE, re.MULTILINE)
    assert sorted(listed) == sorted(names())


def test_the_example_names_no_other_variable() -> None:
    """Its prose speaks of nothing that does not exist."""
    assert set(re.findall(r"DELTAWIRE_[A-Z0-9_]+", ENV_EXAMPLE)) <= names()


def test_the_example_sets_nothing() -> None:
    """Copied to .env it changes nothing, the demo key of docker-compose.yml included."""
    assert all(line.startswith("#") for line in ENV_EXAMPLE.splitlines() if line)


@pytest.mark.parametrize("text", [COMPOSE, DOCKERFILE], ids=["docker-compose.yml", "Dockerfile"])
def test_container_files_name_only_variables_that_the_code_reads(text: str) -> None:
    """A setting that was renamed or removed does not live on in a container file."""
    assert set(re.findall(r"DELTAWIRE_[A-Z0-9_]+", text)) <= names()


def test_the_services() -> None:
    """The other tests see every one of them."""
    assert set(SERVICES) == {"redis", "gateway", "worker", "relay"}


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_confined_and_watched(service: str) -> None:
    """Read-only root, no capabilities, no way to new privileges, a restart policy and a health check."""
    block = _merged(_block(COMPOSE, f"  {service}:"))
    lines = {line.strip() for line in block.splitlines()}
    assert {"read_only: true", "cap_drop: [ALL]", "restart: unless-stopped", "healthcheck:"} <= lines
    assert 'security_opt: ["no-new-privileges:true"]' in lines
    assert "test: [CMD, " in block
    assert not re.search(r"privileged: true|cap_add|container_name", block)


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_runs_as_root(service: str) -> None:
    """Ours by the image's last USER, a fixed number that Kubernetes can check; others by `user`."""
    block = _merged(_block(COMPOSE, f"  {service}:"))
    user = re.search(r'^ +user: "(\d+):\d+"', block, re.MULTILINE)
    if "image: deltawire:local" in block:
        assert user is None
        assert re.findall(r"^USER (\d+):\d+$", DOCKERFILE.split("\nFROM ")[-1], re.MULTILINE)[-1] != "0"
    else:
        assert user is not None
        assert user[1] != "0"


def test_only_the_relay_is_published_and_on_loopback_only() -> None:
    """The demo key is known to everybody, so nothing may be reached from another machine."""
    assert re.findall(r"^ +ports: (.*?)(?: #.*)?$", COMPOSE, re.MULTILINE) == [
        '["127.0.0.1:${DELTAWIRE_PORT:-8080}:8080"]'
    ]
    assert "ports:" in _block(COMPOSE, "  relay:")


def test_the_demo_key() -> None:
    """`dw_demo` opens the relay of an untouched compose file; an empty value takes that away."""
    default = re.search(r"\$\{DELTAWIRE_API_KEYS-([^}]+)\}", COMPOSE)
    assert default is not None
    (key,) = parse_api_keys(default[1])
    assert key.sha256 == digest("dw_demo") == hashlib.sha256(b"dw_demo").digest()
    assert (key.tenant, key.scopes) == ("default", SCOPES)


def test_the_worker_has_time_to_finish_its_streams() -> None:
    """Docker kills later than the worker gives up."""
    block = _block(COMPOSE, "  worker:")
    grace = re.search(r'DELTAWIRE_SHUTDOWN_GRACE_S: "(\d+)"', block)
    stop = re.search(r"stop_grace_period: (\d+)s", block)
    assert grace is not None
    assert stop is not None
    assert int(stop[1]) >= int(grace[1]) + 10


def test_the_images_process_gets_signals() -> None:
    """Exec form everywhere: a shell as PID 1 would keep SIGTERM to itself."""
    assert not re.findall(r"^(?:CMD|ENTRYPOINT) (?!\[)", DOCKERFILE, re.MULTILINE)
    assert not re.findall(r"^ +command: (?!\[)", COMPOSE, re.MULTILINE)
