"""What a stream and a reader cost each process: the figures that docs/scaling.md calculates with.

    .venv/bin/python -m benchmarks.costs [--jobs 500] [--rate 20] [--seconds 10] [--readers 1]

Real processes on this machine, the load side included; CPU is that of each process alone (/proc, Linux), so a
busy machine changes it little. Memory is resident memory above that of the idle process.
"""

import argparse
import asyncio
import json
from pathlib import Path
from typing import Final

from tests.support.system import System, backend_app, request, send_task

from benchmarks.processes import cpu_s
from benchmarks.relays.base import upgrade

CONNECTING: Final = 50
NUMBER: Final = b'"sequence_number":'


class Reader(asyncio.Protocol):
    """A WebSocket client that counts events and looks at nothing else."""

    delivered = 0  # of all readers

    def __init__(self, path: str) -> None:
        self._path = path
        self._rest = b""
        self.is_open = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(upgrade(self._path))

    def data_received(self, data: bytes) -> None:
        if not self.is_open.done():
            self.is_open.set_result(None)
        data = self._rest + data
        Reader.delivered += data.count(NUMBER)
        self._rest = data[-len(NUMBER) + 1 :]


def resident_kb(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise ValueError("no VmRSS")


async def measure(
    system: System, *, jobs: int, rate: float, seconds: float, readers: int
) -> dict[str, float]:
    pids = {"worker": system.workers[0].pid, "relay": system.relay.pid, "redis": system.redis.pid}
    idle_kb = {name: resident_kb(pid) for name, pid in pids.items()}
    loop = asyncio.get_running_loop()
    ids = [f"costs-{number}" for number in range(jobs)]
    body = request("a river", deltas=round(rate * (seconds + 30)))
    app = backend_app(system.redis_url)
    await asyncio.to_thread(lambda: [send_task(app, body, task_id=job_id) for job_id in ids])
    app.close()
    door = asyncio.Semaphore(CONNECTING)

    async def read(job_id: str) -> None:
        async with door:
            path = f"/v1/jobs/{job_id}/ws"
            _, reader = await loop.create_connection(lambda: Reader(path), "127.0.0.1", system.relay_port)
            await reader.is_open

    await asyncio.gather(*(read(job_id) for job_id in ids for _ in range(readers)))
    await asyncio.sleep(3)
    before = {name: cpu_s(pid) for name, pid in pids.items()}
    delivered, began = Reader.delivered, loop.time()
    await asyncio.sleep(seconds)
    used = {name: cpu_s(pid) - before[name] for name, pid in pids.items()}
    took, delivered = loop.time() - began, Reader.delivered - delivered
    deltas = delivered / readers
    grown_kb = {name: resident_kb(pid) - idle_kb[name] for name, pid in pids.items()}
    return {
        "deltas_per_s": deltas / took,
        "worker_us_per_delta": 1e6 * used["worker"] / deltas,
        "redis_us_per_delta": 1e6 * used["redis"] / deltas,
        "relay_us_per_delivery": 1e6 * used["relay"] / delivered,
        "worker_kb_per_stream": grown_kb["worker"] / jobs,
        "redis_kb_per_job": grown_kb["redis"] / jobs,
        "relay_kb_per_reader": grown_kb["relay"] / (jobs * readers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What a stream and a reader cost each process.")
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--rate", type=float, default=20)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--readers", type=int, default=1)
    args = parser.parse_args()
    with System(gateway_rate=args.rate) as system:
        figures = asyncio.run(
            measure(system, jobs=args.jobs, rate=args.rate, seconds=args.seconds, readers=args.readers)
        )
    print(json.dumps({name: round(value, 1) for name, value in figures.items()}, indent=2))


if __name__ == "__main__":
    main()
