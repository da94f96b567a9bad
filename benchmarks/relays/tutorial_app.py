"""What tutorials show: one `pubsub.listen()` for each WebSocket. Run by uvicorn in `.venv-bench`."""

import os

from fastapi import FastAPI, WebSocket, WebSocketDisconnect
from redis.asyncio import Redis

app = FastAPI()
# Tutorials do not bound the pool; redis-py 8 would, at 100 connections.
redis = Redis.from_url(os.environ["REDIS_URL"], max_connections=100_000)


@app.websocket("/ws/{job_id}")
async def stream(websocket: WebSocket, job_id: str) -> None:
    async with redis.pubsub() as pubsub:
        await pubsub.subscribe(job_id)
        await websocket.accept()
        try:
            async for message in pubsub.listen():
                if message["type"] == "message":
                    await websocket.send_text(message["data"].decode())
        except WebSocketDisconnect:
            pass
