"""The alert rules and the dashboard that are shipped, taken apart."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

DIRECTORY: Final = Path(__file__).parents[2] / "deploy" / "observability"
DASHBOARD: Final = DIRECTORY / "grafana" / "dashboards" / "deltawire.json"

Rule = dict[str, Any]
Panel = dict[str, Any]


def _rules() -> list[Rule]:
    groups = yaml.safe_load((DIRECTORY / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def alerts() -> list[Rule]:
    return [rule for rule in _rules() if "alert" in rule]


def recorded() -> list[Rule]:
    return [rule for rule in _rules() if "record" in rule]


def panels() -> list[Panel]:
    """Those that show something; rows do not."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """All queries, each with where it stands."""
    for panel in panels():
        for target in panel["targets"]:
            yield f"panel {panel['title']}: {target['legendFormat']}", target["expr"]
    for rule in _rules():
        yield rule.get("alert") or rule["record"], rule["expr"]
