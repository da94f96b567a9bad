"""The Lua scripts, and how they are called. Each file's header says what it reads, writes and answers."""

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Final, Protocol, cast

import hiredis
import msgspec

from .errors import RedisRefusedError
from .redis_connection import Reply


class Script(msgspec.Struct, frozen=True):
    """A Lua script and the digest under which a server knows it."""

    text: str
    sha: str


def _load(*names: str) -> Script:
    """The script of the last name, behind the functions that it takes from the others."""
    text = "".join(files("deltawire").joinpath("lua", f"{name}.lua").read_text() for name in names)
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


SUBMIT: Final = _load("tombstone", "submit")
CLAIM: Final = _load("tombstone", "claim")
APPEND: Final = _load("append")
REWRITE: Final = _load("tombstone", "rewrite")
RENEW: Final = _load("renew")
PARK: Final = _load("park")
CANCEL: Final = _load("cancel")
HEAD: Final = _load("head")
OWNERS: Final = _load("owners")
ADD: Final = _load("add")
ONCE: Final = _load("once")
TAKE: Final = _load("take")
REVOKE: Final = _load("revoke")
DUE: Final = _load("due")
KEEP: Final = _load("keep")
NOTE: Final = _load("note")
MARK: Final = _load("mark")
ADMIT: Final = _load("admit")
TURNS: Final = _load("turns")
ERASE: Final = _load("erase")


class Executor(Protocol):
    """What commands go through: a RedisClient, or a double of one in unit tests."""

    async def execute(self, *args: str | bytes | float) -> Reply:
        """One command's raw reply. Raises hiredis.ReplyError and RedisUnavailableError."""


class Scripts:
    """Commands and scripts of one Redis. Raises RedisUnavailableError, RedisRefusedError where it refuses."""

    def __init__(self, redis: Executor) -> None:
        self._redis = redis

    async def execute(self, *args: str | bytes | float) -> Reply:
        """As the executor's; a refusal (out of memory, no permission) is an unavailable Redis to callers."""
        try:
            return await self._redis.execute(*args)
        except hiredis.ReplyError as error:
            raise RedisRefusedError(f"Redis refuses: {error}") from error

    async def run(self, script: Script, keys: Sequence[str], *args: str | bytes | float) -> list[Any]:
        return await self.evalsha(script, len(keys), *keys, *args)

    async def evalsha(self, script: Script, *args: str | bytes | float) -> list[Any]:
        try:
            reply = await self._redis.execute("EVALSHA", script.sha, *args)
        except hiredis.ReplyError as error:
            if not str(error).startswith("NOSCRIPT"):
                raise RedisRefusedError(f"Redis refuses: {error}") from error
            reply = await self.execute("EVAL", script.text, *args)
        return cast("list[Any]", reply)
