"""The tutorial pattern: FastAPI under uvicorn, redis-py, and one `pubsub.listen()` for each socket."""

from typing import ClassVar

from benchmarks.processes import Servers
from benchmarks.relays.base import Publisher, Relay
from benchmarks.relays.floors import ROOT, PlainPublisher, PlainViewer
from deltawire.redis_server import free_port

PYTHON = ROOT / ".venv-bench/bin/python"


class Tutorial(Relay):
    name: ClassVar = "tutorial"
    is_peer: ClassVar = False

    def missing(self) -> str | None:
        return None if PYTHON.exists() else "run `make .venv-bench/.installed`"

    def start(self, servers: Servers, redis_port: int) -> None:
        self.port = free_port()
        servers.start(
            "relay",
            (
                *(PYTHON, "-m", "uvicorn", "benchmarks.relays.tutorial_app:app"),
                *("--port", str(self.port), "--log-level", "warning"),
            ),
            environment={"REDIS_URL": f"redis://127.0.0.1:{redis_port}/0"},
            port=self.port,
            cwd=ROOT,
        )

    def publisher(self, redis_port: int) -> Publisher:
        return PlainPublisher(redis_port)

    def viewer(self, job_id: str, *, from_start: bool = False) -> PlainViewer:
        return PlainViewer(f"/ws/{job_id}")
