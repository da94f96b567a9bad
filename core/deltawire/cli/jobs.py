"""`deltawire jobs`: what jobs there are, and what became of one."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.table import Table

from deltawire.client import AsyncClient

from .printing import cell

STYLES: Final = {"completed": "green", "failed": "red", "in_progress": "cyan", "queued": "dim"}


async def listed(client: AsyncClient, *, status: str, limit: int) -> list[dict[str, Any]]:
    """The latest jobs, from as many pages as it takes. Raises JobUnavailableError."""
    jobs: list[dict[str, Any]] = []
    after = ""
    while len(jobs) < limit:
        page = await client.list(limit=min(100, limit - len(jobs)), after=after, status=status)
        jobs += page["data"]
        if not page["has_more"]:
            break
        after = page["last_id"]
    return jobs


def table(jobs: Sequence[Mapping[str, Any]], now: float) -> Table:
    """One line a job."""
    rows = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("job", "status", "age", "took", "attempt", "tokens", "why"):
        rows.add_column(column, overflow="fold", no_wrap=column != "why")
    for job in jobs:
        rows.add_row(
            *(cell(job["id"]), cell(job["status"], STYLES.get(job["status"], "yellow"))),
            *(_seconds(now - job["created_at"]), _took(job)),
            *(cell(str(job["attempt"])), cell(_tokens(job)), cell(why(job))),
        )
    return rows


def text(job: Mapping[str, Any]) -> str:
    """One job, readably."""
    created_at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job["created_at"]))
    lines = [
        f"job       {job['id']}",
        f"status    {job['status']}{f': {why(job)}' if why(job) else ''}",
        f"created   {created_at}",
        f"attempt   {job['attempt']}",
        f"events    {job['latest_sequence_number']}",
    ]
    timings = job.get("timings") or {}
    if timings:
        names = {"queued_s": "queued", "first_delta_s": "first delta after", "total_s": "took"}
        said = (f"{name} {timings[key]:.2f} s" for key, name in names.items() if timings.get(key) is not None)
        lines.append(f"times     {', '.join(said)}")
    if job.get("usage"):
        lines.append(f"tokens    {_tokens(job)} ({job['usage_source']})")
    if job.get("metadata"):
        lines.append("metadata  " + ", ".join(f"{key}={value}" for key, value in job["metadata"].items()))
    for choice in (job.get("completion") or {}).get("choices", ()):
        lines += ["", str(choice["message"].get("content") or "")]
    return "\n".join(lines)


def why(job: Mapping[str, Any]) -> str:
    """Why it did not complete."""
    if error := job.get("error"):
        return f"{error['message']} ({error['code']})"
    details = job.get("incomplete_details") or job.get("cancel") or {}
    return str(details.get("reason", ""))


def _tokens(job: Mapping[str, Any]) -> str:
    usage = job.get("usage") or {}
    counts = (usage.get("prompt_tokens"), usage.get("completion_tokens"))
    return " + ".join(str(count) for count in counts if count is not None)


def _took(job: Mapping[str, Any]) -> str:
    timings = job.get("timings") or {}
    return _seconds(timings["total_s"]) if timings.get("total_s") is not None else ""


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
