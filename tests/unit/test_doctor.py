"""What the doctor thinks of what it sees, without a server."""

import re
from pathlib import Path
from typing import Any, Final, cast

import pytest

from deltawire.cli import doctor
from deltawire.cli.redis_findings import (
    of_clock,
    of_refusals,
    of_round_trips,
    of_sample,
    of_server,
    read_info,
)
from deltawire.findings import Finding, as_text, decode_findings, encode_findings, exit_code, of_open_files
from deltawire.keys import Keys
from deltawire.redis_connection import RedisConnection

ROOT: Final = Path(__file__).parents[2]
COMMAND: Final = re.compile(r"""(?:redis\.p?call|execute)\(\s*['"]([A-Z]+)['"]""")
#: How a service connects, what only a cluster or a sentinel is asked, and what the doctor looks at by itself.
NOT_TRIED: Final = {"PING", "TIME", "SELECT", "CLUSTER", "ASKING", "SENTINEL"}

INFO = {
    "redis_version": "7.0.15",
    "loading": "0",
    "aof_enabled": "1",
    "aof_last_write_status": "ok",
    "maxmemory_policy": "noeviction",
    "used_memory": "1000000",
    "maxmemory": "1000000000",
}
CONFIG = {
    "appendfsync": "everysec",
    "client-output-buffer-limit": "normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60",
    "timeout": "0",
}


def levels(info: dict[str, str], config: dict[str, str] | None = None) -> dict[str, str]:
    """What is not ok, by subject; whatever is wrong also says what to change."""
    found = [each for each in of_server("redis", INFO | info, CONFIG | (config or {})) if each.level != "ok"]
    assert all(each.change for each in found)
    return {each.subject.removeprefix("redis "): each.level for each in found}


def test_a_server_as_it_should_be() -> None:
    """Nothing to change."""
    assert levels({}) == {}


@pytest.mark.parametrize(
    ("info", "config", "expected"),
    [
        ({"redis_version": "6.2.1"}, {}, {"version": "error"}),
        ({"redis_version": "7.2.4", "valkey_version": "9.0.1"}, {}, {}),
        ({"aof_enabled": "0"}, {}, {"persistence": "warning"}),
        ({"aof_last_write_status": "err"}, {}, {"persistence": "error"}),
        ({}, {"appendfsync": "no"}, {"persistence": "warning"}),
        ({"maxmemory_policy": "allkeys-lru"}, {}, {"eviction": "error"}),
        ({"maxmemory": "0"}, {}, {"memory": "warning"}),
        ({"used_memory": "900000000"}, {}, {"memory": "warning"}),
        ({}, {"client-output-buffer-limit": "pubsub 0 0 0"}, {"output buffers": "warning"}),
        ({}, {"client-output-buffer-limit": "pubsub 1048576 0 60"}, {"output buffers": "warning"}),
        ({}, {"timeout": "10"}, {"timeout": "warning"}),
        ({}, {"timeout": "300"}, {}),
    ],
)
def test_what_is_wrong_with_a_server(
    info: dict[str, str], config: dict[str, str], expected: dict[str, str]
) -> None:
    """One thing at a time."""
    assert levels(info, config) == expected


def test_a_server_that_does_not_tell_its_configuration() -> None:
    """As those of most clouds: what is not known is said."""
    found = of_server("redis", INFO, None)
    assert [each.subject for each in found if each.level != "ok"] == ["redis configuration"]


def test_info_is_read() -> None:
    """Sections are headings; a value may hold colons."""
    assert read_info("# Server\r\nredis_version:7.0\r\nos:a:b\r\n\r\n") == {
        "redis_version": "7.0",
        "os": "a:b",
    }


def test_clock_latency_and_sample() -> None:
    """Each has its thresholds."""
    assert [of_clock("r", ahead_s).level for ahead_s in (0.2, -5, 60)] == ["ok", "warning", "error"]
    assert of_round_trips("r", [0.1, 0.001, 0.001]).level == "ok"
    assert of_round_trips("r", [0.1, 0.1, 0.001]).level == "warning"
    assert of_sample("r", 10, []).level == "ok"
    assert "not known" in of_sample("r", None, []).message
    assert "dw:a, dw:b, dw:c" in of_sample("r", 10, ["dw:a", "dw:b", "dw:c", "dw:d"]).message


def test_permissions() -> None:
    """A command that lacks is an error; a user that may only look is an operator's, not a service's."""
    assert of_refusals("r", []).level == "ok"
    assert of_refusals("r", ["XADD"]).level == "error"
    assert of_refusals("r", ["SET", "EVAL", "XADD"]).level == "warning"


async def test_all_is_tried_that_every_service_needs() -> None:
    """What the scripts call, and what is sent by itself; but for what takes messages, as only workers do."""
    tried: set[str] = set()

    class Connection:
        async def execute(self, *command: Any) -> None:
            tried.add(command[0])

    assert await doctor._refused(cast(RedisConnection, Connection()), Keys()) == []
    core = ROOT / "core" / "deltawire"
    paths = {*core.glob("*.py"), *core.glob("lua/*.lua")} - {core / "lua" / "take.lua"}
    named = {name for path in paths for name in COMMAND.findall(path.read_text())}
    assert named >= {"XADD", "EVALSHA", "ZRANGE"}  # the pattern still finds them
    assert named - NOT_TRIED <= tried


NOT_FOUND: Final = (
    '{"error":{"message":"GET /v1: Not Found","type":"not_found_error","param":null,"code":"not_found"'
)


@pytest.mark.parametrize(
    ("pages", "level"),
    [
        ({"/readyz": (200, '{"status":"ok"}')}, "ok"),
        ({"/readyz": (200, '{"status":"degraded"}')}, "warning"),
        ({"/readyz": (503, '{"status":"redis_unavailable"}')}, "error"),
        ({"/readyz": (404, "<html>"), "/v1": (404, NOT_FOUND)}, "ok"),
        ({"/readyz": (404, "<html>"), "/v1": (404, "<html>")}, "error"),
    ],
    ids=["ready", "degraded", "not ready", "probes kept inside", "no relay"],
)
async def test_a_relay(
    monkeypatch: pytest.MonkeyPatch, pages: dict[str, tuple[int, str]], level: str
) -> None:
    """Our own recipes for proxies answer 404 to probes from outside: nothing is wrong with that."""
    monkeypatch.setattr(doctor, "_get", lambda url: pages[url.removeprefix("https://relay")])
    (finding,) = await doctor._relay("https://relay")
    assert finding.level == level
    assert finding.change or level != "error"


def test_findings_travel_and_decide_the_exit_code() -> None:
    """From a service's check to the doctor, one a line; only errors count."""
    findings = [of_open_files("a", 1024, 2000, "streams"), of_open_files("a", -1, 2000, "streams")]
    assert [finding.level for finding in findings] == ["warning", "ok"]
    assert decode_findings(encode_findings(findings).encode()) == findings
    assert exit_code(findings) == 0
    assert exit_code([*findings, Finding("error", "b", "no")]) == 1
    assert as_text([Finding("error", "b", "no", "do")]) == "error    b: no\n         → do\n"
