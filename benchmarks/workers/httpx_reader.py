"""A plain asyncio program: httpx reads each stream line by line, redis.asyncio publishes each line.

python -m benchmarks.workers.httpx_reader PORT REDIS_URL GATEWAY_URL     (in .venv-bench)
"""

import asyncio
import sys

import httpx
import redis.asyncio

from benchmarks.workers.asked import serve


async def main(port: int, redis_url: str, gateway_url: str) -> None:
    unlimited = httpx.Limits(max_connections=None)
    publisher = redis.asyncio.Redis.from_url(redis_url, max_connections=10_000)
    async with publisher, httpx.AsyncClient(limits=unlimited, timeout=None) as client:

        async def stream(number: int, model: str) -> None:
            body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "stream": True}
            async with client.stream("POST", f"{gateway_url}/chat/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        await publisher.publish(f"job:{number}", line[6:])

        await serve(port, stream)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], sys.argv[3]))
