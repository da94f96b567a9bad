"""Performs a plan on a transport: each step when it is due and the client has room for it."""

import asyncio
import time
from collections.abc import Callable

from deltawire.gateway.plan import MAX_SILENCE_S, Ending, Plan, Step
from deltawire.gateway.records import Ledger, RequestRecord
from deltawire.gateway.wheel import TICK_S, TimerWheel
from deltawire.gateway.wire import LAST_CHUNK, encode_chunk

# Per turn of the loop, so that a stream without a rate leaves the others their turns.
_MAX_TURN_BYTES = 65_536
_MAX_TURN_WRITES = 512
# Between half a chunk and the reset: a reset can overtake bytes that the client has not read yet.
_BEFORE_RESET_S = 4 * TICK_S


class Player:
    """One streamed answer under way; starts at once, the headers are written already.

    A paused transport gets nothing. What became due meanwhile is sent when there is room again, so a slow
    reader costs the transport's buffer (64 KiB) and one turn's writes. `on_end` is called once, after the
    last write (for "abort": a moment later), but never after `stop`.
    """

    def __init__(
        self,
        plan: Plan,
        record: RequestRecord,
        *,
        transport: asyncio.Transport,
        wheel: TimerWheel,
        ledger: Ledger,
        is_chunked: bool,
        now: float,
        on_end: Callable[[Ending], None],
    ) -> None:
        self._plan = plan
        self._record = record
        self._transport = transport
        self._wheel = wheel
        self._ledger = ledger
        self._is_chunked = is_chunked
        self._started_at = now
        self._on_end = on_end
        self._joins = plan.joins_due_steps
        self._steps = plan.steps()
        self._step: Step | None = next(self._steps, None)
        self._is_paused = False
        self._is_played = False
        wheel.add_soon(self)

    def pause(self) -> None:
        self._is_paused = True

    def resume(self) -> None:
        self._is_paused = False
        if not self._is_played:
            self._wheel.add_soon(self)

    def stop(self) -> None:
        """Write nothing more. Repeating it is harmless."""
        self._wheel.remove(self)

    def wake(self, now: float) -> None:
        if self._is_played:
            self._on_end("close" if self._plan.ending == "hold" else self._plan.ending)
            return
        if self._is_paused:
            return  # `resume` goes on
        frames, due = self._take_due(now)
        if due is None:
            self._is_played = True
            frames += self._last_frames()
        if frames:
            self._write(frames)
        if due is None:
            self._end(now)
        elif due > now:
            self._wheel.add(self, due)
        else:
            self._wheel.add_soon(self)  # this turn's share is used up

    def _take_due(self, now: float) -> tuple[list[bytes], float | None]:
        """The chunks of all steps that are due, up to a turn's share, and when the next is; None: never."""
        frames: list[bytes] = []
        room = _MAX_TURN_BYTES
        step = self._step
        sent = 0
        due: float | None = None
        while step is not None:
            due = self._started_at + step.at_s
            if due > now or room <= 0 or len(frames) >= _MAX_TURN_WRITES:
                break
            for data in step.writes:
                frames.append(encode_chunk(data) if self._is_chunked else data)
                room -= len(data)
            sent += step.deltas
            step, due = next(self._steps, None), None
        else:
            # An answer without any step ends when its first byte would have come.
            first = self._started_at + self._plan.script.first_delta_s
            due = first if first > now else None
        self._step = step
        if sent:
            self._record.sent_deltas += sent
            self._ledger.deltas_sent += sent
        return frames, due

    def _last_frames(self) -> list[bytes]:
        match self._plan.ending:
            case "finish" | "close":
                return [LAST_CHUNK] if self._is_chunked else []
            case "abort":
                torn = self._plan.torn
                announced = b"%x\r\n" % len(torn) if self._is_chunked else b""
                return [announced + torn[: len(torn) // 2]]
            case "hold":
                return []

    def _write(self, frames: list[bytes]) -> None:
        if self._record.first_byte_at is None:
            self._record.first_byte_at = time.time()
        if len(frames) == 1:
            self._transport.write(frames[0])
        elif self._joins:
            self._transport.write(b"".join(frames))
        else:
            for frame in frames:
                self._transport.write(frame)

    def _end(self, now: float) -> None:
        match self._plan.ending:
            case "abort":
                self._wheel.add(self, now + _BEFORE_RESET_S)
            case "hold":
                self._wheel.add(self, now + MAX_SILENCE_S)
            case ending:
                self._on_end(ending)
