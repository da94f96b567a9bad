"""deploy/kubernetes: what kustomize makes of it fits together, and fits the code.

Rendered by kubectl where there is one; and, for machines without, put together here from the files.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from deltawire_relay.server import DRAIN_WINDOW_S, LEAVE_S
from docs.configuration import names
from tests.unit.test_compose import DOCKERFILE, PRODUCTION

ROOT: Final = Path(__file__).parents[2] / "deploy"
KUBERNETES: Final = ROOT / "kubernetes"
SECRETS: Final = {
    *re.findall(
        r"> (?:\"\$\{user\}_redis_url\"|([a-z_.]+))$", (ROOT / "make-secrets").read_text(), re.MULTILINE
    ),
    *("worker_redis_url", "relay_redis_url", "users.acl", "upstreams.toml"),
}

KUBECTL: Final = shutil.which("kubectl")

Manifest = dict[str, Any]


def _files(directory: Path) -> Iterator[Manifest]:
    """The manifests that a kustomization names, as they stand but for the labels that it gives to pods."""
    kustomization = yaml.safe_load((directory / "kustomization.yaml").read_text())
    labels = {key: text for each in kustomization.get("labels", []) for key, text in each["pairs"].items()}
    for name in [*kustomization.get("resources", []), *kustomization.get("components", [])]:
        path = directory / name
        for each in _files(path) if path.is_dir() else yaml.safe_load_all(path.read_text()):
            if "template" in each["spec"]:
                each["spec"]["template"]["metadata"]["labels"].update(labels)
            yield each


def _rendered(name: str, *, by_kubectl: bool) -> list[Manifest]:
    directory = KUBERNETES / name
    if not by_kubectl:
        return list(_files(directory))
    if KUBECTL is None:
        pytest.skip("there is no kubectl here; the files are read all the same")
    command = [KUBECTL, "kustomize", str(directory)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr
    return list(yaml.safe_load_all(said.stdout))


@pytest.fixture(scope="module", params=["kubectl", "files"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def manifests(way: str) -> list[Manifest]:
    """All that the example installs."""
    return _rendered("overlays/example", by_kubectl=way == "kubectl")


def _of(manifests: list[Manifest], kind: str) -> dict[str, Manifest]:
    return {each["metadata"]["name"]: each for each in manifests if each["kind"] == kind}


def _pods(manifests: list[Manifest]) -> dict[str, Manifest]:
    """Their templates, by who makes them."""
    makers = _of(manifests, "Deployment") | _of(manifests, "StatefulSet")
    return {name: maker["spec"]["template"] for name, maker in makers.items()}


def _container(pod: Manifest) -> Manifest:
    (container,) = pod["spec"]["containers"]
    return dict(container)


def _ports(pod: Manifest) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in _container(pod)["ports"]}


def test_the_base_stands_alone(way: str) -> None:
    """Relay and worker, a budget for each, and nothing that a bare cluster does not know."""
    base = _rendered("base", by_kubectl=way == "kubectl")
    kinds = sorted(each["kind"] for each in base if each["kind"] != "ConfigMap")
    assert kinds == sorted(["Deployment", "PodDisruptionBudget", "NetworkPolicy"] * 2 + ["Service"])


def test_pods_are_confined(manifests: list[Manifest]) -> None:
    """As the "restricted" standard of Kubernetes wants it, and with a read-only root."""
    for pod in _pods(manifests).values():
        context = pod["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["enableServiceLinks"] is False
        container = _container(pod)
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= {*container["resources"]["requests"]}
        assert "memory" in container["resources"]["limits"]
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= {*container}


@pytest.mark.parametrize("name", ["relay", "worker"])
def test_ours_run_the_image_as_it_is(manifests: list[Manifest], way: str, name: str) -> None:
    """Its user, its programs, its ports and its probes."""
    pod = _pods(manifests)[name]
    (user,) = re.findall(r"^USER (\d+):\d+$", DOCKERFILE, re.MULTILINE)
    assert pod["spec"]["securityContext"]["runAsUser"] == int(user)
    container = _container(pod)
    assert container["command"] == ["python", "-m", f"deltawire_{name}"]
    (exposed,) = re.findall(r"^EXPOSE (\d+) (\d+)$", DOCKERFILE, re.MULTILINE)
    assert [*_ports(pod).values()] == [int(exposed[0 if name == "relay" else 1])]
    for kind, path in {"startup": "/readyz", "readiness": "/readyz", "liveness": "/healthz"}.items():
        assert container[f"{kind}Probe"]["httpGet"] == {"path": path, "port": next(iter(_ports(pod)))}
    if way == "kubectl":  # which puts the image's name in
        assert container["image"] == "registry.example.com/deltawire:0.1.0"


def test_variables_are_known_and_secrets_come_from_files(manifests: list[Manifest]) -> None:
    """No secret stands in a variable, and each file that is named is mounted from the Secret that is made."""
    for name in ("relay", "worker"):
        pod = _pods(manifests)[name]
        container = _container(pod)
        (mount,) = container["volumeMounts"]
        (volume,) = (each for each in pod["spec"]["volumes"] if each["name"] == mount["name"])
        assert volume["secret"]["secretName"] == "deltawire"
        files = {f"{mount['mountPath']}/{item['path']}" for item in volume["secret"]["items"]}
        assert {item["key"] for item in volume["secret"]["items"]} <= SECRETS
        set_here = {each["name"]: each["value"] for each in container["env"]}
        assert {value for key, value in set_here.items() if key.endswith("_FILE")} == files
        assert {*set_here} <= names()
    for config in _of(manifests, "ConfigMap").values():
        assert {*config["data"]} <= names()
        assert not any(f"{key}_FILE" in names() for key in config["data"])


def test_there_is_time_to_stop(manifests: list[Manifest]) -> None:
    """Kubernetes kills later than the worker gives up, and than the relay has drained after its preStop."""
    pods = _pods(manifests)
    (grace,) = (
        float(each["value"])
        for each in _container(pods["worker"])["env"]
        if each["name"] == "DELTAWIRE_SHUTDOWN_GRACE_S"
    )
    assert pods["worker"]["spec"]["terminationGracePeriodSeconds"] >= grace + 10
    command = _container(pods["relay"])["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    drain_s = int(command[1]) + 2 * DRAIN_WINDOW_S + LEAVE_S
    assert pods["relay"]["spec"]["terminationGracePeriodSeconds"] >= drain_s + 5
    # Meanwhile the pod is found unready, or has left the balancers.
    probe = _container(pods["relay"])["readinessProbe"]
    assert int(command[1]) >= probe["periodSeconds"]


def _selects(selector: Manifest, pod: Manifest) -> bool:
    labels = pod["metadata"]["labels"]
    return all(labels.get(key) == value for key, value in selector.items())


def test_everything_that_selects_pods_finds_some(manifests: list[Manifest], way: str) -> None:
    """Services, budgets, policies and monitors; and the ports that they name are there."""
    pods = _pods(manifests)
    for service in _of(manifests, "Service").values():
        (pod,) = (pod for pod in pods.values() if _selects(service["spec"]["selector"], pod))
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= {*_ports(pod)}
    for kind in ("PodDisruptionBudget", "PodMonitor", "NetworkPolicy"):
        for name, each in _of(manifests, kind).items():
            selector = each["spec"].get("podSelector") or each["spec"]["selector"]
            (pod,) = (pod for pod in pods.values() if _selects(selector["matchLabels"], pod))
            assert _selects({"app.kubernetes.io/component": name}, pod)
            for endpoint in each["spec"].get("podMetricsEndpoints", []):
                assert endpoint["port"] in _ports(pod)
                assert endpoint["authorization"]["credentials"] == {"name": "deltawire", "key": "metrics_key"}
                # The alerts go by this name, and the operator's own would be NAMESPACE/relay.
                assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": f"deltawire-{name}"}]
            for rule in each["spec"].get("ingress", []):
                assert {port["port"] for port in rule["ports"]} <= {*_ports(pod)}
    for autoscaler in _of(manifests, "HorizontalPodAutoscaler").values():
        target = autoscaler["spec"]["scaleTargetRef"]
        maker = _of(manifests, target["kind"])[target["name"]]
        assert way == "files" or "replicas" not in maker["spec"]


def test_the_ingress_leads_to_the_relay_and_does_not_buffer(manifests: list[Manifest]) -> None:
    """What is for insiders is not among its paths."""
    (ingress,) = _of(manifests, "Ingress").values()
    (rule,) = ingress["spec"]["rules"]
    assert rule["host"] in ingress["spec"]["tls"][0]["hosts"]
    for path in rule["http"]["paths"]:
        assert path["path"].startswith("/v1/")
        target = path["backend"]["service"]
        ports = _of(manifests, "Service")[target["name"]]["spec"]["ports"]
        assert target["port"]["name"] in {port["name"] for port in ports}
    annotations = ingress["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-buffering"] == "off"
    assert int(annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"]) > 15


def test_redis_runs_as_in_the_compose_files(manifests: list[Manifest]) -> None:
    """The same arguments: nothing is evicted, the append-only file is on, and users are ours."""
    command = _container(_pods(manifests)["redis"])["command"]
    compose = re.search(r"command:\s+\[(redis-server.*?)\]", PRODUCTION, re.DOTALL)
    assert compose is not None
    words = [word.strip().strip('"') for word in compose[1].replace("\n", " ").split(",")]
    assert command == [word.replace("/run/secrets/", "/run/secrets/deltawire/") for word in words]
