"""Connecting to the first address of a name that answers (RFC 8305)."""

import asyncio
import itertools
import socket
from collections import deque
from typing import Any

HAPPY_EYEBALLS_DELAY_S = 0.25  # RFC 8305, section 5


async def open_socket(loop: asyncio.AbstractEventLoop, host: bytes, port: int) -> socket.socket:
    """Connect to the first address of `host` that answers, trying the next after 0.25 s (RFC 8305).

    By hand, because uvloop's create_connection tries one address after the other, however long each
    takes, and because asyncio's drops a socket that was won in the step in which it is cancelled.
    """
    found = await _resolve(loop, host, port)
    same = [(family, address) for family, *_, address in found if family == found[0][0]]
    other = [(family, address) for family, *_, address in found if family != found[0][0]]
    addresses = deque(pair for turn in itertools.zip_longest(same, other) for pair in turn if pair)
    if len(addresses) == 1:
        return await _connect_socket(loop, *addresses[0])
    errors: list[BaseException] = []
    attempts: set[asyncio.Task[socket.socket]] = set()
    try:
        while addresses or attempts:
            if addresses:
                attempts.add(asyncio.create_task(_connect_socket(loop, *addresses.popleft())))
            delay_s = HAPPY_EYEBALLS_DELAY_S if addresses else None
            done, _ = await asyncio.wait(attempts, timeout=delay_s, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                attempts.remove(attempt)
                error = attempt.exception()
                if error is None:
                    return attempt.result()
                errors.append(error)
        raise OSError("no address answered: " + "; ".join(map(str, errors)))
    finally:
        for attempt in attempts:
            attempt.add_done_callback(_close_socket)
            attempt.cancel()
        if attempts:
            await asyncio.wait(attempts)


async def _resolve(loop: asyncio.AbstractEventLoop, host: bytes, port: int) -> list[tuple[Any, ...]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:  # not a number: ask, in a thread
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [*found]


async def _connect_socket(loop: asyncio.AbstractEventLoop, family: int, address: Any) -> socket.socket:
    # `address` is Any: its shape depends on the family, and goes from one call of the system to another
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return sock


def _close_socket(attempt: asyncio.Task[socket.socket]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()
