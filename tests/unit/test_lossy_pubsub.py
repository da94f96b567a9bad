"""The filter loses published messages, whole ones, and nothing else."""

import random

import pytest

from tests.support.lossy_pubsub import Losses, value_end

OTHERS = (
    b"+OK\r\n",
    b"$5\r\nhello\r\n",
    b"%1\r\n$1\r\na\r\n*2\r\n:1\r\n_\r\n",
    b">3\r\n$9\r\nsubscribe\r\n$1\r\nc\r\n:1\r\n",
)


def message(payload: bytes, kind: bytes = b"message") -> bytes:
    return b">3\r\n$%d\r\n%s\r\n$1\r\nc\r\n$%d\r\n%s\r\n" % (len(kind), kind, len(payload), payload)


@pytest.mark.parametrize("size", [1, 7, 1_000])
@pytest.mark.parametrize("kind", [b"message", b"smessage"])
def test_messages_go_and_replies_stay(size: int, kind: bytes) -> None:
    """However the bytes are cut into pieces."""
    losses = Losses(random.Random(1), share=1, share_of_last=1)
    filter_ = losses.new_filter()
    sent = b"".join(other + message(b'{"type":"completed",\r\n', kind) for other in OTHERS)
    passed = b"".join(filter_(sent[at : at + size]) for at in range(0, len(sent), size))
    assert passed == b"".join(OTHERS)
    assert (losses.lost, losses.lost_last) == (4, 4)


def test_without_bad_luck_nothing_is_lost() -> None:
    filter_ = Losses(random.Random(1), share=0, share_of_last=0).new_filter()
    assert filter_(message(b"x")) == message(b"x")


def test_half_a_value_waits_for_its_other_half() -> None:
    assert value_end(b"$5\r\nhel", 0) is None
    assert value_end(b"*2\r\n:1\r\n", 0) is None
    assert value_end(b"$-1\r\n", 0) == 5
