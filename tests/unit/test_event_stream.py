"""What a sink for event streams gathers (PROTOCOL §7)."""

from deltawire.errors import WireError
from deltawire.messages import Snapshot
from deltawire_relay.event_stream import EventStream


async def test_nothing_comes_after_the_end() -> None:
    """A token is revoked while its stream still opens: what it has asked for is not given to it any more."""
    stream = EventStream()
    stream.put_out(WireError("token_revoked", "the token was revoked"))
    stream.write_message(Snapshot(job_id="j1", sequence_number=3, completion={"secret": 1}))
    stream.put_out(WireError("token_expired", "again"))
    told = await stream.take()
    assert b"token_revoked" in told
    assert told.count(b"data: ") == 1
    assert await stream.take() == b""
