"""Requests between peers, above the transport: signed messages, chunks of blobs, the run's manifest.

Each is one call with a deadline, bounded in size, throttled and counted. blobs.py makes blobs of the chunks.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence

import structlog
from google.protobuf.message import DecodeError

from braniac.node.clock import Clock, SwarmClock
from braniac.node.config import CapsSection
from braniac.node.daily_meter import DailyMeter
from braniac.node.errors import NodeError
from braniac.node.metrics import BaseMetrics
from braniac.node.store import BlobMissing, Store
from braniac.node.throttle import Throttle
from braniac.node.transport import Reason, Transport, Unreachable
from braniac.protocol import limits
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.engine import Engine
from braniac.protocol.errors import ManifestError, Refusal, VersionMismatch, WireError
from braniac.protocol.identity import PeerId, short_name
from braniac.protocol.manifest import Manifest, open_manifest

log = structlog.get_logger(__name__)

VERSION_MAX = 1 << 16


class BlobUnavailable(NodeError):
    """A blob cannot be had, from one holder or from any."""


class BlobNotThere(BlobUnavailable):
    """A holder says that it has it not, or not yet."""


class Exchange:
    """Answers peers' requests, and asks them."""

    def __init__(
        self,
        store: Store,
        metrics: BaseMetrics,
        clock: Clock,
        swarm_clock: SwarmClock,
        call_timeout_s: float,
        throttle: Throttle | None = None,
    ) -> None:
        """`throttle` bounds what is exchanged; None: nothing does."""
        self.engine: Engine | None = None
        """Set once the run is known; before that, messages are refused."""
        self.on_input: Callable[[], None] = lambda: None
        """Called after a message reached the engine."""
        self.manifest: tuple[bytes, bytes] | None = None
        """Signed manifest, as it is given to joiners."""
        self.synchronised = False
        """Whether this node's swarm clock may be believed by others."""
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self.swarm_clock = swarm_clock
        self._timeout_s = call_timeout_s
        self.throttle = throttle or Throttle(CapsSection(), clock, DailyMeter(None, clock))
        self.is_anchor: Callable[[bytes], bool] = lambda digest: False
        """Whether a blob is an anchor: serving a newcomer's download is counted apart, and has no pace."""
        self.dial_back: Callable[[PeerId, Sequence[str]], Awaitable[pb.DialBack]] | None = None
        """Tries whether a peer can be reached where it says it can."""
        self.newest_protocol = limits.PROTOCOL_VERSION
        """The highest protocol version that anybody claimed to speak: worth a notice, and no more trust."""
        self.sent: Counter[str] = Counter()
        """Bytes sent by kind: message, blob (contributions and updates), anchor."""
        self.received: Counter[str] = Counter()

    # --- answering ---------------------------------------------------------------------------------------------------

    async def answer(self, peer: PeerId, data: bytes) -> bytes:
        """Reply to one request; never raises for what a peer may have sent."""
        reply, kind = pb.Reply(swarm_time_s=self.swarm_clock.belief() if self.synchronised else 0.0), "message"
        self.throttle.received(len(data))
        try:
            request = pb.Request.FromString(data)
            match request.WhichOneof("kind"):
                case "envelope":
                    self._receive(request.envelope)
                case "chunk":
                    kind = "anchor" if self.is_anchor(request.chunk.digest) else "blob"
                    await self._read_chunk(request.chunk, reply)
                case "manifest":
                    self.hear_version(request.manifest.protocol_version)
                    self._give_manifest(reply)
                case "dial_back":
                    reply.dial_back.CopyFrom(await self._dial_back(peer))
                case _:
                    raise DecodeError("an empty request")
        except DecodeError:
            reply.refusal = Refusal.MALFORMED.value
            self._metrics.refuse_message(Refusal.MALFORMED)
        except WireError as error:
            reply.refusal = error.refusal.value
        if not reply.chunk:
            await self.throttle.send(reply.ByteSize())
        elif self.throttle.upload.rate or self.throttle.pace.rate:
            reply.swarm_time_s = 0.0  # it has waited for its turn, so it says little about the time
        out = reply.SerializeToString()
        self._count(sent=len(out), received=len(data), kind=kind)
        return out

    def _receive(self, envelope: bytes) -> None:
        try:
            if self.engine is None:
                raise WireError(Refusal.NOT_READY, "this peer rests, or has not joined a run yet")
            self.engine.receive(envelope, self.swarm_clock.now())
        except WireError as error:
            self._metrics.refuse_message(error.refusal)
            log.debug("refused a message", reason=str(error))
            raise
        else:
            self._metrics.accept_message()
        finally:
            self.on_input()

    async def _read_chunk(self, request: pb.ChunkRequest, reply: pb.Reply) -> None:
        if len(request.digest) != 32 or request.length > limits.CHUNK_BYTES_MAX:
            raise WireError(Refusal.MALFORMED, "a chunk request out of bounds")
        if self.engine is None:
            raise WireError(Refusal.NOT_READY, "this peer rests, or has not joined a run yet")
        size = self._store.size(request.digest)
        if size is None or request.offset > size:
            raise WireError(Refusal.NOT_READY, "no such blob here")
        throttle = self.throttle
        paced = throttle.pace.rate > 0 and not self.is_anchor(request.digest)
        if throttle.used_up or throttle.busy(paced=paced):
            raise WireError(Refusal.OVERLOADED, "no bandwidth to spare")
        rates = (throttle.upload, throttle.pace) if paced else (throttle.upload,)
        length = min(request.length, size - request.offset, throttle.piece_bytes(*rates))
        await throttle.send_blob(length, paced_bytes=size if paced else 0)
        try:
            reply.chunk = await asyncio.to_thread(self._store.read, request.digest, request.offset, length)
        except BlobMissing:
            raise WireError(Refusal.NOT_READY, "no such blob here") from None
        reply.blob_bytes = size

    def _give_manifest(self, reply: pb.Reply) -> None:
        if self.manifest is None:
            raise WireError(Refusal.NOT_READY, "this peer has not joined a run yet")
        signed = pb.SignedManifest(body=self.manifest[0], signature=self.manifest[1])
        reply.manifest = signed.SerializeToString()

    async def _dial_back(self, peer: PeerId) -> pb.DialBack:
        member = self.engine.roster.get(peer) if self.engine is not None else None
        if member is None or self.dial_back is None:
            raise WireError(Refusal.UNKNOWN_PEER, "no heartbeat of the asker was heard yet")
        return await self.dial_back(peer, member.addresses)

    def hear_version(self, version: int) -> None:
        """Somebody says that it speaks this version of the protocol."""
        if self.newest_protocol < version <= VERSION_MAX:
            if self.newest_protocol == limits.PROTOCOL_VERSION:  # said once: whoever counts upwards fills no log
                log.warning("a peer speaks a newer protocol: look for a newer braniac-node", theirs=version)
            self.newest_protocol = version

    # --- asking ------------------------------------------------------------------------------------------------------

    async def send(self, transport: Transport, peer: PeerId, envelope: bytes) -> bool:
        """Deliver a message; whether the peer answered at all. What is lost is repeated by the protocol, not here."""
        request = pb.Request(envelope=envelope)
        try:
            await self._call(transport, peer, request, "message")
        except Unreachable as error:
            log.debug("could not deliver a message", peer=short_name(peer), reason=error.detail)
            return False
        return True

    async def ask_manifest(self, transport: Transport, peer: PeerId) -> tuple[Manifest, bytes, bytes]:
        """The run that `peer` takes part in, checked. Raises Unreachable, ManifestError."""
        request = pb.Request(manifest=pb.ManifestRequest(protocol_version=limits.PROTOCOL_VERSION))
        reply = await self._call(transport, peer, request, "message")
        if reply.refusal:
            raise ManifestError(f"peer {short_name(peer)} has no run to join ({_code(reply)})")
        try:
            signed = pb.SignedManifest.FromString(reply.manifest)
        except DecodeError:
            raise ManifestError(f"peer {short_name(peer)} sent something that is not a manifest") from None
        try:
            manifest = open_manifest(signed.body, signed.signature)
        except VersionMismatch as error:
            self.hear_version(error.version)
            raise
        return manifest, signed.body, signed.signature

    async def ask_dial_back(self, transport: Transport, peer: PeerId) -> pb.DialBack:
        """Let `peer` try to reach this node at the addresses in its heartbeats. Raises Unreachable, WireError."""
        reply = await self._call(transport, peer, pb.Request(dial_back=pb.DialBackRequest()), "message")
        if reply.refusal or not reply.HasField("dial_back"):
            raise WireError(Refusal.NOT_READY, f"peer {short_name(peer)} did not try ({_code(reply)})")
        return reply.dial_back

    async def ask_chunk(
        self,
        transport: Transport,
        holder: PeerId,
        chunk: pb.ChunkRequest,
        blob_bytes: int,
        kind: str,
        patience_s: float = float("inf"),
    ) -> bytes:
        """A piece of a blob of `blob_bytes` bytes, maybe less than asked for. Raises Unreachable, BlobUnavailable."""
        reply = await self._call(transport, holder, pb.Request(chunk=chunk), kind, patience_s)
        if reply.refusal == Refusal.NOT_READY:
            raise BlobNotThere(f"peer {short_name(holder)} does not have it (not_ready)")
        few = len(reply.chunk) < min(chunk.length, limits.PIECE_BYTES_MIN)
        if reply.refusal or few or len(reply.chunk) > chunk.length or reply.blob_bytes != blob_bytes:
            raise BlobUnavailable(f"peer {short_name(holder)} does not have it ({_code(reply)})")
        return reply.chunk

    async def _call(
        self, transport: Transport, peer: PeerId, request: pb.Request, kind: str, patience_s: float = float("inf")
    ) -> pb.Reply:
        data = request.SerializeToString()
        async with self.throttle.asking(request.chunk.length) as got:
            await self.throttle.send(len(data))
            sent_at = self._clock.monotonic()
            self._count(sent=len(data), received=0, kind=kind)
            try:
                answer = await transport.call(peer, data, timeout_s=min(self._timeout_s, patience_s))
            except Unreachable as error:
                got(0 if error.reason is Reason.UNDIALABLE else request.chunk.length)  # a late reply may have come
                raise
            got(len(answer))
        self._count(sent=0, received=len(answer), kind=kind)
        try:
            reply = pb.Reply.FromString(answer)
        except DecodeError:
            self._metrics.refuse_message(Refusal.MALFORMED)
            return pb.Reply(refusal=Refusal.MALFORMED.value)
        if reply.swarm_time_s > 0:
            self.swarm_clock.observe(peer, reply.swarm_time_s, sent_at, self._clock.monotonic())
        return reply

    def _count(self, *, sent: int, received: int, kind: str) -> None:
        self.sent[kind] += sent
        self.received[kind] += received
        self._metrics.net_bytes.labels("sent", kind).inc(sent)
        self._metrics.net_bytes.labels("received", kind).inc(received)


def _code(reply: pb.Reply) -> str:
    """Why a reply is of no use, in words of ours: what a peer writes there may be anything."""
    if not reply.refusal:
        return "not what was asked for"
    known = reply.refusal in Refusal.__members__.values()
    return reply.refusal if known else "in words we do not know"
