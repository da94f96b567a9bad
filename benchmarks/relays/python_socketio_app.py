"""The server of python_socketio.py; runs in .venv-bench."""

import os

import socketio

server = socketio.AsyncServer(
    async_mode="asgi",
    client_manager=socketio.AsyncRedisManager(f"redis://127.0.0.1:{os.environ['REDIS_PORT']}/0"),
    transports=["websocket"],
    ping_interval=int(os.environ["PING_INTERVAL_S"]),
)


@server.event  # type: ignore[untyped-decorator] # python-socketio is not in the environment that mypy sees
async def connect(sid: str, environ: dict[str, object], auth: dict[str, str]) -> None:
    await server.enter_room(sid, auth["job"])


application = socketio.ASGIApp(server)
