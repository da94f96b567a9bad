"""The models that the upstreams serve, as workers say it and relays pass it on: OpenAI's model objects."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from .keys import MODELS_TTL_S, Keys
from .scripts import Executor

Model = dict[str, Any]
"""{id, object: "model", created, owned_by}, and what else an upstream says of one."""

_decoder: Final = msgspec.json.Decoder(list[Model])


async def publish_models(redis: Executor, keys: Keys, models: Sequence[Model]) -> None:
    """Says so for MODELS_TTL_S; the last worker that says it is right.

    Raises hiredis.ReplyError and RedisUnavailableError.
    """
    await redis.execute("SET", keys.models, msgspec.json.encode(models), "EX", MODELS_TTL_S)


async def read_models(redis: Executor, keys: Keys) -> list[Model]:
    """Empty where no worker has said anything lately. Raises as `publish_models`."""
    value = await redis.execute("GET", keys.models)
    return _decoder.decode(value) if isinstance(value, bytes) else []
