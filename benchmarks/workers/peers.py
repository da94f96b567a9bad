"""What else streams completions: workers as tutorials write them, LiteLLM's proxy; and the floor."""

import asyncio
import itertools
import sys
from pathlib import Path
from typing import ClassVar, Final

from benchmarks.processes import Servers
from benchmarks.workers import asked
from benchmarks.workers.base import PEERS_BIN, ROOT, Marks, Worker, enqueue
from benchmarks.workers.ours import request
from deltawire.redis_server import free_port

LITELLM: Final = ROOT / ".venv-litellm" / "bin" / "litellm"
LITELLM_KEY: Final = "sk-bench-litellm"
LITELLM_CONFIGURATION: Final = """
model_list:
  - model_name: "*"
    litellm_params: {{model: "openai/*", api_key: sk-bench, api_base: "http://127.0.0.1:{port}/v1"}}
general_settings: {{master_key: {key}}}
litellm_settings: {{telemetry: false}}
"""


class CelerySdk(Worker):
    """A Celery worker with OpenAI's SDK; see celery_sdk_app."""

    counted_by = "publish"
    has_queue = True
    pool: ClassVar[str]

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def missing(self) -> str | None:
        return None if (PEERS_BIN / "celery").exists() else "needs celery, openai, redis in .venv-bench"

    def start(self, servers: Servers, streams: int) -> None:
        environment = {
            "BENCH_REDIS_URL": f"redis://127.0.0.1:{self.redis_port}/0",
            "BENCH_GATEWAY_URL": f"http://127.0.0.1:{self.gateway_port}/v1",
            "PYTHONPATH": str(ROOT),
        }
        words = ["-A", "benchmarks.workers.celery_sdk_app", "worker", "-P", self.pool, "-l", "INFO"]
        servers.start(
            "worker",
            [PEERS_BIN / "celery", *words, "-c", str(min(streams, self.most_streams))],
            environment=environment,
            is_ready=lambda: " ready." in servers.log("worker"),
            cwd=servers.folder,
        )

    async def ask(self, model: str, count: int) -> None:
        ids = [f"bench{next(self._numbers)}" for _ in range(count)]
        enqueue(self.redis_port, "stream", "celery", {"request": request(model)}, ids)


class Prefork(CelerySdk):
    name = "Celery prefork, OpenAI SDK"
    pool = "prefork"
    most_streams = 100
    tries = (100, 50)
    is_process_each = True


class Threads(CelerySdk):
    name = "Celery threads, OpenAI SDK"
    pool = "threads"
    most_streams = 1_000
    tries = (100, 40)


class HttpxReader(Worker):
    name = "asyncio, httpx, redis.asyncio"
    counted_by = "publish"
    most_streams = 1_000
    tries = (150, 50)

    def missing(self) -> str | None:
        return None if (PEERS_BIN / "httpx").exists() else "needs httpx and redis in .venv-bench"

    def start(self, servers: Servers, streams: int) -> None:
        self._port = free_port()
        urls = (f"redis://127.0.0.1:{self.redis_port}/0", f"http://127.0.0.1:{self.gateway_port}/v1")
        program: list[str | Path] = [
            PEERS_BIN / "python",
            "-m",
            "benchmarks.workers.httpx_reader",
            str(self._port),
            *urls,
        ]
        servers.start("worker", program, port=self._port, environment={"PYTHONPATH": str(ROOT)})

    async def ask(self, model: str, count: int) -> None:
        await asked.ask(self._port, model, count)


class LineCounter(Worker):
    name = "floor: reads bytes, counts line ends"
    is_peer = False

    def start(self, servers: Servers, streams: int) -> None:
        self._port = free_port()
        program = [sys.executable, "-m", "benchmarks.workers.line_counter"]
        ports = (str(self._port), str(self.gateway_port))
        servers.start("worker", [*program, *ports], port=self._port, environment={"PYTHONPATH": str(ROOT)})

    async def ask(self, model: str, count: int) -> None:
        await asked.ask(self._port, model, count)


class LiteLlm(Worker):
    """Its proxy, one process, read by this process by HTTP: it publishes nothing."""

    name = "LiteLLM proxy"
    most_streams = 1_000
    tries = (100, 40)

    def missing(self) -> str | None:
        return None if LITELLM.exists() else "make litellm installs it"

    def start(self, servers: Servers, streams: int) -> None:
        self._port = free_port()
        configuration = servers.folder / "litellm.yaml"
        configuration.write_text(LITELLM_CONFIGURATION.format(port=self.gateway_port, key=LITELLM_KEY))
        words: list[str | Path] = [
            "--config",
            configuration,
            "--host",
            "127.0.0.1",
            "--port",
            str(self._port),
        ]
        # Else it fetches a price list from the network at its start.
        environment = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
        servers.start("worker", [LITELLM, *words], environment=environment, port=self._port)

    async def ask(self, model: str, count: int) -> None:
        body = b'{"model":"%b","messages":[{"role":"user","content":"hi"}],"stream":true}' % model.encode()
        hello = (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            b"authorization: Bearer %b\r\ncontent-length: %d\r\n\r\n%b"
            % (LITELLM_KEY.encode(), len(body), body)
        )
        loop = asyncio.get_running_loop()
        for _ in range(count):
            await loop.create_connection(lambda: Marks(hello, self.delays_us), "127.0.0.1", self._port)

    async def delivered(self) -> int | None:
        return len(self.delays_us)
