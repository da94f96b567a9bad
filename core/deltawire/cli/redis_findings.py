"""What to think of a Redis server, by what it says of itself. Pure."""

from collections.abc import Mapping, Sequence
from typing import Final

from deltawire.findings import Finding

MIN_VERSION: Final = (7, 0)
SLOW_S: Final = 0.005
MIN_PUBSUB_BYTES: Final = 8 * 1024**2
HEADROOM: Final = 0.8
LONG_IDLE_S: Final = 60
CLOCK_WARNING_S: Final = 1.0
CLOCK_ERROR_S: Final = 30.0

_APPENDONLY: Final = "set `appendonly yes`"


def read_info(text: str) -> dict[str, str]:
    """The lines of INFO."""
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#"))


def of_server(subject: str, info: Mapping[str, str], config: Mapping[str, str] | None) -> list[Finding]:
    """`config`: what CONFIG GET says; None where the server does not tell, as those of most clouds."""
    findings = [_version(subject, info), *_persistence(subject, info, config), *_memory(subject, info)]
    if config is None:
        message = "CONFIG is not to be read, so appendfsync, output-buffer limits and timeout are not known"
        findings.append(Finding("warning", f"{subject} configuration", message, "look at them yourself"))
        return findings
    return [*findings, *_buffers(subject, config), *_idle(subject, config)]


def _version(subject: str, info: Mapping[str, str]) -> Finding:
    name, text = "Redis", info.get("redis_version", "")
    if valkey := info.get("valkey_version"):
        name, text = "Valkey", valkey
    subject = f"{subject} version"
    numbers = tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())
    if not numbers:
        return Finding("warning", subject, "it does not tell its version")
    if numbers < MIN_VERSION:
        return Finding("error", subject, f"{name} {text} is too old", "run Redis 7.0, Valkey, or later")
    return Finding("ok", subject, f"{name} {text}")


def _persistence(subject: str, info: Mapping[str, str], config: Mapping[str, str] | None) -> list[Finding]:
    subject = f"{subject} persistence"
    if info.get("loading") == "1":
        return [Finding("warning", subject, "it is loading its data", "wait")]
    if info.get("aof_enabled") != "1":
        message = "no append-only file: a restart of Redis forgets jobs"
        return [Finding("warning", subject, message, _APPENDONLY)]
    if info.get("aof_last_write_status", "ok") != "ok":
        return [Finding("error", subject, "it cannot write its append-only file", "look at its log and disk")]
    fsync = (config or {}).get("appendfsync", "")
    if fsync == "no":
        message = "appendfsync no: a crash of its machine loses up to half a minute"
        return [Finding("warning", subject, message, "set `appendfsync everysec`")]
    if fsync == "always":
        message = "appendfsync always: each append waits for the disk"
        return [Finding("warning", subject, message, "set `appendfsync everysec`, unless you mean it")]
    return [Finding("ok", subject, f"append-only file{f', fsync {fsync}' if fsync else ''}")]


def _memory(subject: str, info: Mapping[str, str]) -> list[Finding]:
    findings: list[Finding] = []
    policy = info.get("maxmemory_policy", "")
    if policy and policy != "noeviction":
        message = f"maxmemory-policy {policy} deletes logs and records of jobs that run"
        findings.append(Finding("error", f"{subject} eviction", message, "set `maxmemory-policy noeviction`"))
    elif policy:
        findings.append(Finding("ok", f"{subject} eviction", policy))
    subject = f"{subject} memory"
    used, limit = _number(info, "used_memory"), _number(info, "maxmemory")
    if limit == 0:
        message = f"{_mb(used)} used, and no maxmemory: a flood ends in the kernel's out-of-memory killer"
        findings.append(Finding("warning", subject, message, "set `maxmemory` below what the machine has"))
    elif used > HEADROOM * limit:
        change = "raise `maxmemory`, or let jobs go sooner (options.retention_s)"
        findings.append(Finding("warning", subject, f"{_mb(used)} of {_mb(limit)} used", change))
    else:
        findings.append(Finding("ok", subject, f"{_mb(used)} of {_mb(limit)} used"))
    return findings


def _buffers(subject: str, config: Mapping[str, str]) -> list[Finding]:
    """The limit for clients that listen: `class hard soft seconds`, several in a row."""
    words = config.get("client-output-buffer-limit", "").split()
    limits = {words[at]: words[at + 1 : at + 4] for at in range(0, len(words) - 3, 4)}
    if "pubsub" not in limits:
        return []
    subject = f"{subject} output buffers"
    hard, soft, seconds = (int(word) for word in limits["pubsub"])
    said = f"pubsub {_mb(hard)}, {_mb(soft)} for {seconds} s"
    change = "set `client-output-buffer-limit pubsub 32mb 8mb 60`, Redis' own default"
    if hard == 0 and soft == 0:
        return [Finding("warning", subject, "a relay that stalls may fill Redis' memory: no limit", change)]
    if 0 < hard < MIN_PUBSUB_BYTES:
        message = f"{said}: a relay is cut off by a burst, and has to read logs"
        return [Finding("warning", subject, message, change)]
    return [Finding("ok", subject, said)]


def _idle(subject: str, config: Mapping[str, str]) -> list[Finding]:
    timeout_s = int(config.get("timeout") or 0)
    if 0 < timeout_s < LONG_IDLE_S:
        message = f"closes what is idle for {timeout_s} s: services connect again and again"
        return [Finding("warning", f"{subject} timeout", message, "set `timeout 0`")]
    return [Finding("ok", f"{subject} timeout", f"{timeout_s} s" if timeout_s else "none")]


def of_round_trips(subject: str, took_s: Sequence[float]) -> Finding:
    """Of a few, one after the other."""
    subject, median_s = f"{subject} round trip", sorted(took_s)[len(took_s) // 2]
    said = f"{median_s * 1000:.1f} ms"
    if median_s > SLOW_S:
        change = "put it into the same network; each token waits for one round trip"
        return Finding("warning", subject, said, change)
    return Finding("ok", subject, said)


def of_clock(subject: str, ahead_s: float) -> Finding:
    """`ahead_s`: by how much this machine's clock is ahead of the server's."""
    subject = f"{subject} clock"
    said = f"this machine is {abs(ahead_s):.1f} s {'ahead of' if ahead_s > 0 else 'behind'} Redis"
    change = "have both keep time (chrony, systemd-timesyncd): deadlines and tokens are judged by the clock"
    if abs(ahead_s) > CLOCK_ERROR_S:
        return Finding("error", subject, said, change)
    if abs(ahead_s) > CLOCK_WARNING_S:
        return Finding("warning", subject, said, change)
    return Finding("ok", subject, "agrees with this machine's to a second")


def of_refusals(subject: str, refused: Sequence[str]) -> Finding:
    """Commands that its ACL refuses to the user of our URL."""
    subject = f"{subject} permissions"
    if "EVAL" in refused and "SET" in refused:
        change = "run the doctor with a service's own DELTAWIRE_REDIS_URL to see what that may do"
        return Finding("warning", subject, "this user may only look, as no service could work", change)
    if refused:
        message = f"refused to this user: {', '.join(refused)}"
        return Finding("error", subject, message, "allow them (ACL SETUSER): services need them all")
    return Finding("ok", subject, "every command that the services use is allowed")


def of_sample(subject: str, looked_at: int | None, without: Sequence[str]) -> Finding:
    """Keys of ours that would stay for ever, among those looked at; None: none may be."""
    subject = f"{subject} expiry"
    if looked_at is None:
        return Finding("ok", subject, "not known: this user may not SCAN, and need not")
    if without:
        message = f"{len(without)} of {looked_at} keys never expire, such as {', '.join(without[:3])}"
        return Finding("warning", subject, message, "delete them, unless they are somebody else's")
    return Finding("ok", subject, f"all of {looked_at} keys looked at expire")


def _number(info: Mapping[str, str], name: str) -> int:
    value = info.get(name, "0")
    return int(value) if value.isdecimal() else 0


def _mb(value: int) -> str:
    return f"{value / 1024**2:.0f} MB"
