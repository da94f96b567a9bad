"""What `GET /v1/models` lists: the models that can be asked for here, told to the relays by way of Redis."""

import asyncio
import logging
from typing import Any, Final

import hiredis

from deltawire.errors import RedisUnavailableError
from deltawire.keys import Keys
from deltawire.models import Model, publish_models
from deltawire.scripts import Executor

from .refusal import UpstreamError
from .upstream import UpstreamClient
from .upstreams import Upstream, Upstreams

INTERVAL_S: Final = 30.0
ASK_EVERY_S: Final = 300.0
MAX_MODELS: Final = 2_000
MAX_NAME_CHARACTERS: Final = 512

_log = logging.getLogger(__name__)


class Catalogue:
    """The models and aliases of all upstreams; of one without a list, what its own `GET /models` says."""

    def __init__(self, redis: Executor, keys: Keys, upstreams: Upstreams, client: UpstreamClient) -> None:
        self._redis = redis
        self._keys = keys
        self._upstreams = upstreams
        self._client = client
        self._listed: dict[str, list[Model]] = {}
        """What upstreams have answered, by their names."""
        self._asked_at = -ASK_EVERY_S
        self._names = {name for upstream in upstreams for name in upstream.names}

    async def keep(self) -> None:
        """Says so every INTERVAL_S, until cancelled: at once what is configured, then what was asked for."""
        loop = asyncio.get_running_loop()
        while True:
            await self._publish()
            if loop.time() - self._asked_at >= ASK_EVERY_S:
                self._asked_at = loop.time()
                unlisted = [upstream for upstream in self._upstreams if upstream.models is None]
                if unlisted:
                    await asyncio.gather(*map(self._ask, unlisted))
                    await self._publish()
            await asyncio.sleep(INTERVAL_S)

    def models(self) -> list[Model]:
        """One of each name: of the upstream that gets requests for it, which is the first."""
        models: dict[str, Model] = {}
        for upstream in self._upstreams:
            for name in upstream.names:
                models.setdefault(name, _model(name, 0, upstream.name))
        for listed in self._listed.values():
            for model in listed:
                models.setdefault(model["id"], model)
        return list(models.values())[:MAX_MODELS]

    def knows(self, name: str) -> bool:
        """Whether some upstream has a model of this name, as far as is known."""
        return name in self._names

    async def _ask(self, upstream: Upstream) -> None:
        """What it listed last stays, where it does not answer."""
        try:
            answer = await self._client.models(upstream)
        except (UpstreamError, TimeoutError) as error:
            why = error.code if isinstance(error, UpstreamError) else "no answer in time"
            _log.warning("upstream %s does not list its models: %s", upstream.name, why)
            return
        self._listed[upstream.name] = [
            model for entry in answer[:MAX_MODELS] if (model := _read(entry, upstream.name)) is not None
        ]

    async def _publish(self) -> None:
        models = self.models()
        self._names = {model["id"] for model in models}
        try:
            await publish_models(self._redis, self._keys, models)
        except (RedisUnavailableError, hiredis.ReplyError) as error:
            _log.warning("cannot say which models there are: %s", error)


def _read(entry: Any, upstream: str) -> Model | None:  # whatever JSON the gateway sent
    name = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
        return None
    created, owner = entry.get("created"), entry.get("owned_by")
    is_name = isinstance(owner, str) and 0 < len(owner) <= 64 and owner.isprintable()
    return _model(name, created if type(created) is int else 0, owner if is_name else upstream)


def _model(name: str, created: int, owned_by: str) -> Model:
    return {"id": name, "object": "model", "created": created, "owned_by": owned_by}
