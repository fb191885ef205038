"""Everything bulky is pulled by its hash, in chunks of bounded size, from whoever has it.

A holder is not trusted: the whole is checked against its hash before anybody sees it, and then the next one is asked.
Who is slow is left for the next one, if there is one: else a single holder could keep a blob from us for hours.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Sequence

from braniac.node.clock import Clock
from braniac.node.exchange import BlobNotThere, BlobUnavailable, Exchange
from braniac.node.holders import Holders
from braniac.node.metrics import Metrics
from braniac.node.store import Store
from braniac.node.transport import Transport, Unreachable
from braniac.protocol import limits
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.errors import Refusal
from braniac.protocol.identity import PeerId, short_name

_CHUNKS_AT_A_TIME = 4
_GRACE_S_MAX = 5.0
_SLOW_BYTES_PER_S = 1 << 14


class Blobs:
    """Brings blobs from peers into the store."""

    def __init__(
        self,
        store: Store,
        exchange: Exchange,
        metrics: Metrics,
        clock: Clock,
        *,
        grace_s: float = _GRACE_S_MAX,
        patience_s: float = 0.0,
    ) -> None:
        """Of a holder, if somebody else may have what is wanted.

        `grace_s`: so long it may be silent before it is called slow; `patience_s`: so long it may take at least for a
        blob, if some of it comes now and then.
        """
        self._store = store
        self._exchange = exchange
        self._metrics = metrics
        self._clock = clock
        self._grace_s = min(_GRACE_S_MAX, grace_s)
        self._patience_min_s = patience_s
        self._holders = Holders(clock)

    async def fetch(
        self,
        transport: Transport,
        digest: bytes,
        size: int,
        holders: Sequence[PeerId],
        kind: str = "blob",
        on_bytes: Callable[[int], None] = lambda count: None,
        *,
        patient: bool = False,
    ) -> None:
        """Bring a blob into the store, trying the holders in turn, the best first. Raises BlobUnavailable, DiskFull.

        `kind` is what its bytes are counted as; `on_bytes` hears of each chunk how long it was. `patient`: who does not
        have it is about to, and will be asked once more, so that holders after it are left alone.
        """
        if self._store.size(digest) == size:
            return
        reasons = []
        others = self._holders.in_order(holder for holder in holders if holder != transport.peer_id)
        for number, holder in enumerate(others, 1):
            patience_s = self._patience_s(size) if patient or number < len(others) else float("inf")
            try:
                data = await self._pull(transport, holder, digest, size, patience_s, kind, on_bytes)
            except (Unreachable, BlobUnavailable) as error:
                reasons.append(str(error))
                if patient and isinstance(error, BlobNotThere):
                    break
                self._holders.failed(holder)
                continue
            self._holders.delivered(holder)
            stored = await asyncio.to_thread(self._store.put, data)
            assert stored == digest
            return
        why = "; ".join(reasons) or "nobody else has it"
        raise BlobUnavailable(f"blob {digest.hex()[:8]} cannot be had now ({why})")

    def _patience_s(self, size: int) -> float:
        """How long one holder may take for so many bytes, if there is another one; for ever if this node is slow."""
        slow = self._exchange.throttle.download.rate
        return float("inf") if slow else self._grace_s + max(self._patience_min_s, size / _SLOW_BYTES_PER_S)

    async def _pull(
        self,
        transport: Transport,
        holder: PeerId,
        digest: bytes,
        size: int,
        patience_s: float,
        kind: str,
        on_bytes: Callable[[int], None],
    ) -> bytes:
        """The whole blob from one holder, in a few chunks at a time, checked against its hash."""
        throttle = self._exchange.throttle
        data = bytearray(size)
        missing = size
        offsets = iter(range(0, size, limits.CHUNK_BYTES_MAX))
        failures: list[Unreachable | BlobUnavailable] = []
        heard_s = self._clock.monotonic()
        deadline_s = heard_s + patience_s
        asked_bytes = min(size, _CHUNKS_AT_A_TIME * limits.CHUNK_BYTES_MAX)  # at once: they share the holder's uplink
        silence_s = self._grace_s + asked_bytes / _SLOW_BYTES_PER_S if math.isfinite(patience_s) else math.inf

        async def pull_chunk(begin: int) -> None:
            nonlocal missing, heard_s
            offset, end = begin, min(begin + limits.CHUNK_BYTES_MAX, size)
            while offset < end and not failures and not throttle.used_up:
                left_s = min(deadline_s, heard_s + silence_s) - self._clock.monotonic()
                if left_s <= 0:
                    raise BlobUnavailable(f"peer {short_name(holder)} is too slow")
                length = min(end - offset, throttle.piece_bytes(throttle.download))
                request = pb.ChunkRequest(digest=digest, offset=offset, length=length)
                piece = await self._exchange.ask_chunk(transport, holder, request, size, kind, left_s)
                heard_s = self._clock.monotonic()
                data[offset : offset + len(piece)] = piece
                offset += len(piece)  # a holder with little bandwidth may give less than was asked for
                missing -= len(piece)
                on_bytes(len(piece))

        async def worker() -> None:
            try:
                for begin in offsets:
                    await pull_chunk(begin)
            except (Unreachable, BlobUnavailable) as error:
                failures.append(error)  # calls under way may end: what they bring must be counted

        workers = min(_CHUNKS_AT_A_TIME, -(-size // limits.CHUNK_BYTES_MAX))
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(worker())
        if failures:
            raise failures[0]
        if missing:
            raise BlobUnavailable("the quota of bytes for today is used up")
        if await asyncio.to_thread(_sha256, data) != digest:
            self._metrics.refuse_message(Refusal.WRONG_DIGEST)
            raise BlobUnavailable(f"peer {short_name(holder)} sent other bytes than their hash says")
        return bytes(data)


def _sha256(data: bytearray) -> bytes:
    return hashlib.sha256(data).digest()
