"""The server of channels_relay.py; runs in .venv-bench."""

import os

from django.conf import settings

settings.configure(
    SECRET_KEY="not one",
    CHANNEL_LAYERS={
        "default": {
            "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
            "CONFIG": {"hosts": [("127.0.0.1", int(os.environ["REDIS_PORT"]))]},
        }
    },
)

from channels.generic.websocket import AsyncWebsocketConsumer  # noqa: E402
from channels.routing import ProtocolTypeRouter, URLRouter  # noqa: E402
from django.urls import path  # noqa: E402


class JobConsumer(AsyncWebsocketConsumer):  # type: ignore[misc] # Channels is not in the environment that mypy sees
    async def connect(self) -> None:
        self.job_id = self.scope["url_route"]["kwargs"]["job_id"]
        await self.channel_layer.group_add(self.job_id, self.channel_name)
        await self.accept()

    async def disconnect(self, code: int) -> None:
        await self.channel_layer.group_discard(self.job_id, self.channel_name)

    async def delta(self, event: dict[str, str]) -> None:
        await self.send(text_data=event["text"])


application = ProtocolTypeRouter({"websocket": URLRouter([path("jobs/<job_id>", JobConsumer.as_asgi())])})
