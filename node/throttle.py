"""How many bytes this node exchanges with its peers: two rates and a count per day.

Messages go ahead of blobs: a blob waits until the rate allows all that was sent before it, a message borrows from the
seconds to come. So a heartbeat never stands behind a download, and the average holds all the same. What is counted is
what a wire carries, with the overhead of libp2p, TCP and IP.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable

from braniac.node.clock import Clock
from braniac.node.config import CapsSection
from braniac.node.daily_meter import DailyMeter
from braniac.protocol import limits

_MIB = 1 << 20
_SEGMENT_BYTES = 1448  # of data in a full TCP segment over Ethernet with timestamps
_SEGMENT_HEADERS_BYTES = 66  # Ethernet, IPv4, TCP with timestamps
_ACK_PER_BYTE = _SEGMENT_HEADERS_BYTES / (2 * _SEGMENT_BYTES)  # an acknowledgement for every other segment
_CALL_BYTES = 420  # a stream's opening and closing, the frames of p2pd, encryption; by benchmarks/caps.py
_FRAMING_PER_BYTE = 0.004  # of the encryption and the multiplexer

_BURST_S = 0.25  # of unused rate that is kept for later
_PIECE_S = 0.5  # a blob is sent in pieces that take so long, so that nothing waits behind one for much longer
_CREDIT_S = 2.0  # so much of the rate may messages borrow
_WAIT_S_MIN = 0.001
_QUEUE_S = 4.0  # a peer that would have to wait longer is told to ask another
_PACE_QUEUE_S = 8.0  # the same where it is only for the sake of an even pace; below the deadline of a call


def wire_bytes(payload_bytes: int) -> float:
    """What a wire carries in one direction for a request or a reply of so many bytes."""
    data = payload_bytes * (1 + _FRAMING_PER_BYTE) + _CALL_BYTES
    return data + math.ceil(data / _SEGMENT_BYTES) * _SEGMENT_HEADERS_BYTES


def ack_bytes(payload_bytes: int) -> float:
    """What a wire carries in the other direction for it."""
    return (payload_bytes + _CALL_BYTES) * _ACK_PER_BYTE


class TokenBucket:
    """Bytes per second, on average over some seconds; 0 means no bound."""

    def __init__(
        self, rate_bytes_per_s: float, clock: Clock, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    ) -> None:
        self.rate = rate_bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._level = 0.0  # bytes that may go now; below zero what was borrowed
        self._at_s = clock.monotonic()
        self._bulk = asyncio.Lock()  # fair: who asked first goes first
        self._queued = 0.0

    def charge(self, count: float) -> None:
        """Count bytes that cannot wait, or, below zero, some that were paid for and did not come."""
        if self.rate:
            self._refill()
            self._level -= count

    async def take_urgent(self, count: float) -> None:
        """Wait only if too much is borrowed already."""
        await self._wait_for(-_CREDIT_S * self.rate)
        self.charge(count)

    async def take_bulk(self, count: float) -> None:
        """Wait in turn until nothing is borrowed."""
        self._queued += count
        try:
            async with self._bulk:
                await self._wait_for(0.0)
                self.charge(count)
        finally:
            self._queued -= count

    async def take_first(self, count: float) -> None:
        """Like `take_bulk`, but ahead of all that wait in turn."""
        self._queued += count
        try:
            await self._wait_for(0.0)
            self.charge(count)
        finally:
            self._queued -= count

    def delay_s(self) -> float:
        """How long whoever asked for bulk now would wait."""
        if not self.rate:
            return 0.0
        self._refill()
        return max(0.0, self._queued - self._level) / self.rate

    def piece_bytes(self) -> int:
        """How much of a blob to move at a time."""
        if not self.rate:
            return limits.CHUNK_BYTES_MAX
        return min(limits.CHUNK_BYTES_MAX, max(limits.PIECE_BYTES_MIN, int(self.rate * _PIECE_S)))

    async def _wait_for(self, level: float) -> None:
        while self.rate:
            self._refill()
            if self._level >= level:
                return
            # At least a moment: what is missing may be less than a clock can show.
            await self._sleep(max(_WAIT_S_MIN, (level - self._level) / self.rate))

    def _refill(self) -> None:
        now = self._clock.monotonic()
        self._level = min(_BURST_S * self.rate, self._level + (now - self._at_s) * self.rate)
        self._at_s = now


class Throttle:
    """Both rates and the day's count of one node."""

    def __init__(
        self,
        caps: CapsSection,
        clock: Clock,
        meter: DailyMeter,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.upload = TokenBucket(caps.upload_kib_per_s * 1024, clock, sleep)
        self.download = TokenBucket(caps.download_kib_per_s * 1024, clock, sleep)
        self.pace = TokenBucket(0.0, clock, sleep)
        """Of contributions and updates, without what a wire adds; pacing.py sets it once the run is known."""
        self.first_bytes_max = 0
        """Blobs that are no longer than this go ahead of others at that pace."""
        self.meter = meter
        self.daily_bytes = int(caps.daily_mib * _MIB)
        self._asked_bytes = 0.0  # of pieces on their way to us

    @property
    def used_up(self) -> bool:
        """Whether no more blobs may be moved today."""
        return self._left_bytes() <= 0

    def piece_bytes(self, *buckets: TokenBucket) -> int:
        """How much of a blob to move at a time: what the rates and the rest of the quota allow."""
        rest = max(limits.PIECE_BYTES_MIN, self._left_bytes())
        return int(min(rest, *(bucket.piece_bytes() for bucket in buckets)))

    def _left_bytes(self) -> float:
        if not self.daily_bytes:
            return math.inf
        return self.daily_bytes - self.meter.used_bytes() - self._asked_bytes

    def busy(self, *, paced: bool) -> bool:
        """Whether a peer that asks for a blob would wait too long."""
        return self.upload.delay_s() > _QUEUE_S or (paced and self.pace.delay_s() > _PACE_QUEUE_S)

    async def send(self, payload_bytes: int) -> None:
        """Before a message goes out."""
        await self.upload.take_urgent(wire_bytes(payload_bytes))
        self._count_sent(payload_bytes)

    async def send_blob(self, payload_bytes: int, *, paced_bytes: int = 0) -> None:
        """Before a piece of a blob goes out; of a contribution or an update, the whole has `paced_bytes`."""
        if paced_bytes:
            take = self.pace.take_first if paced_bytes <= self.first_bytes_max else self.pace.take_bulk
            await take(payload_bytes)
        await self.upload.take_bulk(wire_bytes(payload_bytes))
        self._count_sent(payload_bytes)

    def received(self, payload_bytes: int) -> None:
        """A message has come in."""
        self.download.charge(wire_bytes(payload_bytes))
        self._count_received(payload_bytes)

    @contextlib.asynccontextmanager
    async def asking(self, asked_bytes: int) -> AsyncIterator[Callable[[int], None]]:
        """Around a request; inside, say how many bytes came. `asked_bytes` of a blob wait for their turn, 0 does not.

        If nothing is said, as when the request is cancelled, all that was asked for may have come and is counted.
        """
        paid = wire_bytes(asked_bytes) if asked_bytes else 0.0
        self._asked_bytes += paid  # before the wait: others must know how much of the quota is left
        try:
            if asked_bytes:
                await self.download.take_bulk(paid)
        except BaseException:
            self._asked_bytes -= paid
            raise
        came_bytes = asked_bytes

        def got(payload_bytes: int) -> None:
            nonlocal came_bytes
            came_bytes = payload_bytes

        try:
            yield got
        finally:
            self._asked_bytes -= paid
            if came_bytes:
                self.download.charge(wire_bytes(came_bytes) - paid)
                self._count_received(came_bytes)
            else:
                self.download.charge(-paid)

    def _count_sent(self, payload_bytes: int) -> None:
        self.download.charge(ack_bytes(payload_bytes))
        self.meter.add(wire_bytes(payload_bytes), ack_bytes(payload_bytes))

    def _count_received(self, payload_bytes: int) -> None:
        self.upload.charge(ack_bytes(payload_bytes))
        self.meter.add(ack_bytes(payload_bytes), wire_bytes(payload_bytes))
