"""What is shipped for Prometheus and Grafana, as far as it can be checked without them.

There is no Grafana here: that it loads the dashboard is not tested, only that the file is what it wants.
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.support.absent import lack
from tests.support.observability import DASHBOARD, DIRECTORY, alerts, expressions, panels, recorded

ROOT: Final = Path(__file__).parents[2]
UNITS: Final = frozenset({"short", "s", "bytes", "percentunit", "reqps", "cps"})  # of Grafana's
CHANGING: Final = re.compile(r"\bdeltawire_[a-z_]+")


def promtool(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["promtool", *arguments], capture_output=True, text=True, cwd=DIRECTORY, check=False
        )
    except FileNotFoundError:
        lack("promtool is not installed (Debian: prometheus)")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "--syntax-only", "prometheus.yml"),
        ("check", "rules", "rules.yml"),
        ("test", "rules", "rules.test.yml"),
    ],
    ids=["prometheus.yml", "rules.yml", "rules.test.yml"],
)
def test_promtool_takes_it(arguments: tuple[str, ...]) -> None:
    """Each alert fires on series that should fire it, and on no others."""
    promtool(*arguments)


def test_each_alert_has_tests_of_both_kinds() -> None:
    """One in which it fires, one in which it does not."""
    tests = yaml.safe_load((DIRECTORY / "rules.test.yml").read_text())["tests"]
    seen: dict[str, set[bool]] = {}
    for test in tests:
        samples = [bool(each["exp_samples"]) for each in test["promql_expr_test"]]
        seen.setdefault(test["name"].partition(":")[0], set()).update(samples)
    assert seen == {alert["alert"]: {True, False} for alert in alerts()}


def test_each_alert_says_what_it_means_and_what_to_do() -> None:
    """A summary, a description, and a section of docs/operations.md; which has none for others."""
    anchors = re.findall(r"^### (Deltawire\w+)$", (ROOT / "docs/operations.md").read_text(), re.MULTILINE)
    assert sorted(anchors) == sorted(alert["alert"] for alert in alerts())
    for alert in alerts():
        said = alert["annotations"]
        assert said["summary"]
        assert said["description"].endswith(".")
        assert said["runbook_url"] == f"docs/operations.md#{alert['alert'].lower()}"
        assert alert["labels"]["severity"] in {"warning", "critical"}


def test_they_ask_for_nothing_that_does_not_exist() -> None:
    """Every metric in a panel or a rule is in docs/metrics.md."""
    documented = set(re.findall(r"`(deltawire_[a-z_]+)`", (ROOT / "docs/metrics.md").read_text()))
    asked = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for _, expression in expressions()
        for name in CHANGING.findall(expression)
    }
    assert asked - documented == set()
    recordings = {
        name for _, expression in expressions() for name in re.findall(r"deltawire:[a-z0-9_:]+", expression)
    }
    assert recordings == {rule["record"] for rule in recorded()}


def test_the_dashboard_is_what_grafana_loads() -> None:
    """Ids once each, known units and types, a data source that is provisioned, no panel over another."""
    board = json.loads(DASHBOARD.read_text())
    assert (board["uid"], board["title"], board["schemaVersion"]) == ("deltawire", "deltawire", 39)
    assert "id" not in board  # Grafana's own, by which another board would be replaced
    every = board["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    assert len({panel["title"] for panel in every}) == len(every)
    source = {"type": "prometheus", "uid": "${datasource}"}
    taken: set[tuple[int, int]] = set()
    for panel in every:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert all(x < 24 for x, _ in cells), panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["type"] in {"timeseries", "stat"}
        assert panel["datasource"] == source
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        refs = [target["refId"] for target in panel["targets"]]
        assert refs
        assert len(set(refs)) == len(refs)
        assert all(target["expr"] for target in panel["targets"])
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board)))
    variables = {variable["name"] for variable in board["templating"]["list"]}
    assert used - {"__rate_interval", "__all"} == variables == {"datasource", "instance"}


def test_the_dashboard_is_provisioned() -> None:
    """Its data source's uid, and the directory where docker-compose.yml mounts it."""
    provisioning = DIRECTORY / "grafana" / "provisioning"
    (source,) = _read(provisioning / "datasources" / "deltawire.yml")["datasources"]
    (provider,) = _read(provisioning / "dashboards" / "deltawire.yml")["providers"]
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    assert variables[0]["current"]["value"] == source["uid"]
    assert (provider["type"], provider["options"]["path"]) == ("file", "/var/lib/deltawire/dashboards")


def test_prometheus_finds_every_replica_and_shows_its_key() -> None:
    """By the services' names; the key is a file, so that it is in no configuration."""
    config = _read(DIRECTORY / "prometheus.yml")
    jobs = {each["job_name"]: each for each in config["scrape_configs"]}
    for service, port in (("relay", 8080), ("worker", 8081)):
        job = jobs[f"deltawire-{service}"]
        (found,) = job["dns_sd_configs"]
        assert (found["names"], found["type"], found["port"]) == ([service], "A", port)
        assert job["authorization"] == {"credentials_file": "/run/secrets/metrics_key"}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    return content
