"""The container files stay true to the code. Read as YAML: no engine."""

import hashlib
import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from deltawire import __version__
from deltawire.api_keys import SCOPES, digest, parse_api_keys
from deltawire.variables import declarations
from deltawire_relay.server import DRAIN_WINDOW_S, LEAVE_S
from deltawire_relay.settings import Settings as Relay
from deltawire_worker.settings import Settings as Worker
from docs.configuration import names

ROOT: Final = Path(__file__).parents[2]
COMPOSE: Final = (ROOT / "docker-compose.yml").read_text()
PRODUCTION: Final = (ROOT / "docker-compose.production.yml").read_text()
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text()
ENV_EXAMPLE: Final = (ROOT / ".env.example").read_text()
#: Of the compose files alone; docs/operations.md has them.
OF_COMPOSE: Final = {"DELTAWIRE_IMAGE", "DELTAWIRE_SECRETS"}
DEFAULT: Final = {"redis", "gateway", "worker", "relay", "proxy"}
OURS: Final = {"gateway", "worker", "relay"}


class _Tagged(yaml.YAMLObject):  # type: ignore[misc] # yaml ships no types
    """What compose has tags for: !reset takes away, !override takes the place."""

    yaml_loader = yaml.SafeLoader

    def __init__(self, value: Any) -> None:
        self.value = value

    @classmethod
    def from_yaml(cls, loader: yaml.SafeLoader, node: yaml.Node) -> "_Tagged":
        if isinstance(node, yaml.MappingNode):
            return cls(loader.construct_mapping(node, deep=True))
        if isinstance(node, yaml.SequenceNode):
            return cls(loader.construct_sequence(node, deep=True))
        return cls(None)


class _Reset(_Tagged):
    yaml_tag = "!reset"


class _Override(_Tagged):
    yaml_tag = "!override"


def _merged(base: Any, over: Any, key: str = "") -> Any:
    """As compose merges files."""
    if isinstance(over, _Tagged):
        return over.value
    if isinstance(base, dict) and isinstance(over, dict):
        both = {name: _merged(base.get(name), value, name) for name, value in over.items()}
        return {
            name: value for name, value in {**base, **both}.items() if not isinstance(over.get(name), _Reset)
        }
    if isinstance(base, list) and isinstance(over, list) and key not in {"command", "test", "entrypoint"}:
        return [*base, *over]
    return base if over is None else over


BASE: Final[dict[str, Any]] = yaml.safe_load(COMPOSE)
WHOLE: Final[dict[str, Any]] = _merged(BASE, yaml.safe_load(PRODUCTION))
EVERY: Final = [
    pytest.param(service, id=f"{file}-{name}")
    for file, compose in (("trial", BASE), ("production", WHOLE))
    for name, service in compose["services"].items()
]


def _seconds(duration: str) -> int:
    assert duration.endswith("s")
    return int(duration[:-1])


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


FILES: Final = [
    ROOT / "Dockerfile",
    ROOT / "docker-compose.yml",
    ROOT / "docker-compose.production.yml",
    *(path for path in (ROOT / "deploy").rglob("*") if path.is_file()),
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_deployed_names_only_variables_that_the_code_reads(path: Path) -> None:
    """A setting that was renamed or removed does not live on in a container file."""
    assert set(re.findall(r"DELTAWIRE_[A-Z0-9_]+", path.read_text())) <= names() | OF_COMPOSE


def test_the_operations_page_has_what_only_compose_reads() -> None:
    """No other page has it."""
    page = (ROOT / "docs" / "operations.md").read_text()
    assert set(re.findall(r"DELTAWIRE_[A-Z0-9_]+", page)) >= OF_COMPOSE
    assert set(re.findall(r"DELTAWIRE_[A-Z0-9_]+", page)) <= names() | OF_COMPOSE


def test_the_services() -> None:
    """What comes up by default, what profiles add, and what is left in production."""
    profiles = {name: service.get("profiles", []) for name, service in BASE["services"].items()}
    assert {name for name, some in profiles.items() if not some} == DEFAULT
    assert {name for name, some in profiles.items() if "observability" in some} == {"prometheus", "grafana"}
    assert {name for name, some in profiles.items() if "scale" in some} == {"rabbitmq"}
    assert {*WHOLE["services"]} == {*profiles} - {"gateway", "rabbitmq"}


@pytest.mark.parametrize("service", EVERY)
def test_every_service_is_confined_and_watched(service: dict[str, Any]) -> None:
    """Read-only root, no capabilities, no way to new privileges, a restart policy and a health check."""
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] in {"always", "unless-stopped"}
    assert service["healthcheck"]["test"][0] == "CMD"
    assert service["logging"]["driver"] == "local"
    assert not {"privileged", "cap_add", "container_name"} & {*service}


@pytest.mark.parametrize("service", EVERY)
def test_no_service_runs_as_root(service: dict[str, Any]) -> None:
    """Ours by the image's last USER, a fixed number that Kubernetes can check; others by `user`."""
    user = service.get("user")
    if user is None:
        assert "deltawire" in service["image"].lower()
        (user,) = re.findall(r"^USER (\d+:\d+)$", DOCKERFILE.split("\nFROM ")[-1], re.MULTILINE)
    assert int(user.partition(":")[0]) > 0


@pytest.mark.parametrize("service", EVERY)
def test_the_processes_get_signals(service: dict[str, Any]) -> None:
    """Exec form everywhere: a shell as PID 1 would keep SIGTERM to itself."""
    assert isinstance(service.get("command", []), list)
    assert isinstance(service.get("entrypoint", []), list)


def test_the_image() -> None:
    """Its process gets signals, its last stage has one thing from each other one, and it says what it is."""
    assert not re.findall(r"^(?:CMD|ENTRYPOINT) (?!\[)", DOCKERFILE, re.MULTILINE)
    last = DOCKERFILE.split("\nFROM ")[-1]
    assert last.startswith("scratch\n")
    assert "RUN " not in last
    assert f'org.opencontainers.image.version="{__version__}"' in last


def test_what_is_published_is_on_loopback_only() -> None:
    """The demo key is known to everybody, so nothing may be reached from another machine."""
    ports = {name: service["ports"] for name, service in BASE["services"].items() if "ports" in service}
    assert ports.pop("proxy") == ["127.0.0.1:${DELTAWIRE_PORT:-8080}:8080"]
    assert {*ports} == {"prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for some in ports.values() for port in some)


def test_in_production_others_reach_tls_only() -> None:
    """Prometheus and Grafana stay on loopback."""
    ports = {name: service["ports"] for name, service in WHOLE["services"].items() if "ports" in service}
    assert ports.pop("proxy") == ["443:8443"]
    assert all(port.startswith("127.0.0.1:") for some in ports.values() for port in some)


def test_the_demo_key() -> None:
    """`dw_demo` opens the relay of an untouched compose file; an empty value takes that away."""
    default = re.search(r"\$\{DELTAWIRE_API_KEYS-([^}]+)\}", COMPOSE)
    assert default is not None
    (key,) = parse_api_keys(default[1])
    assert key.sha256 == digest("dw_demo") == hashlib.sha256(b"dw_demo").digest()
    assert (key.tenant, key.scopes) == ("default", SCOPES)
    assert (ROOT / BASE["secrets"]["metrics_key"]["file"]).read_text() == "dw_demo"


def test_production_has_no_demo_key_and_its_secrets_come_from_files() -> None:
    """Whatever the trial says in a variable is set to nothing, which counts as not set."""
    for name in ("worker", "relay"):
        service = WHOLE["services"][name]
        environment = service["environment"]
        assert environment["DELTAWIRE_API_KEYS"] == ""
        files = {variable: path for variable, path in environment.items() if variable.endswith("_FILE")}
        assert {"DELTAWIRE_API_KEYS_FILE", "DELTAWIRE_REDIS_URL_FILE"} <= {*files}
        for variable, path in files.items():
            assert environment[variable.removesuffix("_FILE")] == ""
            assert path.removeprefix("/run/secrets/") in service["secrets"]
    used = {secret for service in WHOLE["services"].values() for secret in service.get("secrets", [])}
    assert used == {*WHOLE["secrets"]}
    assert all("${DELTAWIRE_SECRETS:-./secrets}/" in secret["file"] for secret in WHOLE["secrets"].values())


def test_production_says_what_is_missing() -> None:
    """Compose refuses, with a sentence, what has no image or address."""
    for name in ("DELTAWIRE_IMAGE", "DELTAWIRE_PUBLIC_URL"):
        assert re.search(rf"\$\{{{name}:\?[^}}]+\}}", PRODUCTION)


def test_production_bounds_what_each_service_takes() -> None:
    """CPU, memory and processes; and logs rotate."""
    for service in WHOLE["services"].values():
        assert {*service["deploy"]["resources"]["limits"]} == {"cpus", "memory", "pids"}
        assert {*service["logging"]["options"]} == {"max-size", "max-file"}


@pytest.mark.parametrize("compose", [BASE, WHOLE], ids=["trial", "production"])
def test_there_is_time_to_stop(compose: dict[str, Any]) -> None:
    """Docker kills later than the worker gives up, and than the relay has drained."""
    worker, relay = compose["services"]["worker"], compose["services"]["relay"]
    grace_s = int(worker["environment"]["DELTAWIRE_SHUTDOWN_GRACE_S"])
    assert _seconds(worker["stop_grace_period"]) >= grace_s + 10
    assert _seconds(relay["stop_grace_period"]) >= 2 * DRAIN_WINDOW_S + LEAVE_S + 5


@pytest.mark.parametrize(("service", "kind"), [("worker", Worker), ("relay", Relay)])
def test_every_setting_can_be_set(service: str, kind: type[Worker | Relay]) -> None:
    """What the environment or .env says is handed on, but for the ports inside of containers."""
    declared = {each.name for _, some, _ in declarations(kind) for each in some}
    handed_on = {*BASE["services"][service]["environment"]}
    assert declared - handed_on <= {"DELTAWIRE_PORT", "DELTAWIRE_WORKER_PORT"}
