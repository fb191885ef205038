"""Requests between peers over the in-memory network: blobs from liars, answers to anything, honest counts."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from braniac.node.clock import FakeClock, SwarmClock
from braniac.node.exchange import BlobUnavailable, Exchange
from braniac.node.metrics import Metrics
from braniac.node.store import Store
from braniac.node.transport import Unreachable
from braniac.node.transport_memory import MemoryNetwork
from braniac.protocol import limits
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.engine import Engine
from braniac.protocol.errors import ManifestError, Refusal, VersionMismatch
from braniac.protocol.history import History
from braniac.protocol.identity import Identity, PeerId
from braniac.protocol.manifest import sign_manifest
from tests.unit.node_harness import EPOCH_S, identity, make_manifest

CHUNK = limits.CHUNK_BYTES_MAX
Liar = Callable[[pb.ChunkRequest, pb.Reply], None]


class Node:
    """A peer with a store and an exchange, and nothing above."""

    def __init__(self, network: MemoryNetwork, root: Path, number: int) -> None:
        self.identity: Identity = identity(number)
        self.peer = self.identity.peer_id
        self.store = Store.open(root / f"n{number}")
        self.metrics = Metrics("test", 1)
        self.clock = FakeClock()
        self.swarm_clock = SwarmClock(self.clock)
        self.exchange = Exchange(self.store, self.metrics, self.clock, self.swarm_clock, 30.0)
        self.transport = network.join(self.peer)

    async def serve(self, handler: Callable[[PeerId, bytes], Awaitable[bytes]] | None = None) -> None:
        await self.transport.serve(handler or self.exchange.answer)

    def take_part(self) -> None:
        """Be in a run that this node founded."""
        manifest = make_manifest(self.identity)
        self.exchange.manifest = sign_manifest(manifest, self.identity)
        self.exchange.engine = Engine(manifest, self.identity, 0, incarnation=1, now=EPOCH_S, history=History(manifest))

    def refused(self, refusal: Refusal) -> float:
        value = self.metrics.registry.get_sample_value("braniac_messages_refused_total", {"code": refusal.value})
        assert value is not None
        return value

    def received(self) -> float:
        value = self.metrics.registry.get_sample_value("braniac_messages_received_total")
        assert value is not None
        return value

    async def ask(self, peer: PeerId, request: pb.Request) -> pb.Reply:
        return pb.Reply.FromString(await self.transport.call(peer, request.SerializeToString(), timeout_s=1))

    async def lie(self, blob: bytes, lie: Liar) -> None:
        """Serve one blob, with every reply spoilt by `lie`."""

        async def answer(peer: PeerId, data: bytes) -> bytes:
            request = pb.Request.FromString(data).chunk
            reply = pb.Reply(chunk=blob[request.offset : request.offset + request.length], blob_bytes=len(blob))
            lie(request, reply)
            return reply.SerializeToString()

        await self.transport.serve(answer)


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


@pytest.fixture
def make(network: MemoryNetwork, tmp_path: Path) -> Iterator[Callable[[int], Node]]:
    made: list[Node] = []

    def make_node(number: int) -> Node:
        made.append(Node(network, tmp_path, number))
        return made[-1]

    yield make_node
    for node in made:
        node.store.close()


@pytest.fixture
async def asker(make: Callable[[int], Node]) -> Node:
    node = make(0)
    await node.serve()
    return node


@pytest.fixture
async def holder(make: Callable[[int], Node]) -> Node:
    """In a run, because who rests or is not in one yet serves nothing."""
    node = make(1)
    node.take_part()
    await node.serve()
    return node


def blob_of(size: int) -> bytes:
    return (hashlib.sha256(b"%d" % size).digest() * (size // 32 + 1))[:size]


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 6 * CHUNK + 17])
async def test_a_blob_of_any_number_of_chunks_arrives(asker: Node, holder: Node, size: int) -> None:
    blob = blob_of(size)
    digest = holder.store.put(blob)
    advanced: list[int] = []
    await asker.exchange.fetch(asker.transport, digest, size, [holder.peer], on_bytes=advanced.append)
    assert asker.store.get(digest) == blob
    assert sum(advanced) == size
    assert len(advanced) == -(-size // CHUNK)


async def test_what_is_here_is_not_asked_for(asker: Node) -> None:
    digest = asker.store.put(b"here")
    await asker.exchange.fetch(asker.transport, digest, 4, [identity(9).peer_id])
    assert not asker.transport.traffic.calls


async def test_what_is_here_in_another_size_is_not_what_was_meant(asker: Node, holder: Node) -> None:
    digest = asker.store.put(b"here")
    holder.store.put(b"here")
    with pytest.raises(BlobUnavailable):
        await asker.exchange.fetch(asker.transport, digest, 5, [holder.peer])
    assert asker.store.get(digest) == b"here"


def _other_bytes(request: pb.ChunkRequest, reply: pb.Reply) -> None:
    reply.chunk = bytes(len(reply.chunk))


def _short(request: pb.ChunkRequest, reply: pb.Reply) -> None:
    reply.chunk = reply.chunk[:-1]


def _long(request: pb.ChunkRequest, reply: pb.Reply) -> None:
    reply.chunk += b"x"


def _other_size(request: pb.ChunkRequest, reply: pb.Reply) -> None:
    reply.blob_bytes += 1


def _refusal(request: pb.ChunkRequest, reply: pb.Reply) -> None:
    reply.refusal = "anything at all " * 1000


def _second_chunk_only(request: pb.ChunkRequest, reply: pb.Reply) -> None:
    if request.offset:
        reply.chunk = b""


@pytest.mark.parametrize("lie", [_other_bytes, _short, _long, _other_size, _refusal, _second_chunk_only])
async def test_a_liar_is_passed_over(make: Callable[[int], Node], asker: Node, holder: Node, lie: Liar) -> None:
    blob = blob_of(3 * CHUNK)
    liar = make(2)
    await liar.lie(blob, lie)
    digest = hashlib.sha256(blob).digest()
    with pytest.raises(BlobUnavailable) as caught:
        await asker.exchange.fetch(asker.transport, digest, len(blob), [liar.peer])
    assert len(str(caught.value)) < 300
    assert not asker.store.has(digest)
    holder.store.put(blob)
    await asker.exchange.fetch(asker.transport, digest, len(blob), [liar.peer, holder.peer])
    assert asker.store.get(digest) == blob
    assert asker.refused(Refusal.WRONG_DIGEST) == (2 if lie is _other_bytes else 0)


async def test_a_holder_that_is_not_there_or_never_answers_is_passed_over(
    network: MemoryNetwork, make: Callable[[int], Node], asker: Node, holder: Node
) -> None:
    silent = make(2)
    await silent.serve()
    network.suspend(silent.peer)
    digest = holder.store.put(b"wanted")
    nobody = [asker.peer, identity(9).peer_id, silent.peer]
    with pytest.raises(BlobUnavailable, match=r"undialable.*timeout"):
        await asker.exchange.fetch(asker.transport, digest, 6, nobody)
    assert not asker.store.has(digest)
    with pytest.raises(BlobUnavailable, match="nobody else has it"):
        await asker.exchange.fetch(asker.transport, digest, 6, [asker.peer])
    await asker.exchange.fetch(asker.transport, digest, 6, [*nobody, holder.peer])
    assert asker.store.get(digest) == b"wanted"


async def test_a_holder_of_garbage_is_counted(make: Callable[[int], Node], asker: Node) -> None:
    async def garbage(peer: PeerId, data: bytes) -> bytes:
        return b"\xff\xff\xff"

    babbler = make(2)
    await babbler.serve(garbage)
    with pytest.raises(BlobUnavailable, match="malformed"):
        await asker.exchange.fetch(asker.transport, bytes(32), 6, [babbler.peer])
    assert asker.refused(Refusal.MALFORMED) == 1


async def test_a_chunk_out_of_bounds_is_refused(asker: Node, holder: Node) -> None:
    digest = holder.store.put(b"0123456789")
    for request, refusal in (
        (pb.ChunkRequest(digest=digest, offset=11, length=1), "not_ready"),
        (pb.ChunkRequest(digest=digest, offset=(1 << 64) - 1, length=1), "not_ready"),
        (pb.ChunkRequest(digest=digest, length=CHUNK + 1), "malformed"),
        (pb.ChunkRequest(digest=digest[:-1], length=1), "malformed"),
        (pb.ChunkRequest(digest=bytes(32), length=1), "not_ready"),
    ):
        reply = await asker.ask(holder.peer, pb.Request(chunk=request))
        assert (reply.refusal, reply.chunk) == (refusal, b"")
    reply = await asker.ask(holder.peer, pb.Request(chunk=pb.ChunkRequest(digest=digest, offset=8, length=100)))
    assert (reply.refusal, reply.chunk, reply.blob_bytes) == ("", b"89", 10)


async def test_before_a_run_is_known_everything_about_it_is_refused(asker: Node, make: Callable[[int], Node]) -> None:
    holder = make(1)
    await holder.serve()
    digest = holder.store.put(b"here")
    chunk = pb.ChunkRequest(digest=digest, length=4)
    assert (await asker.ask(holder.peer, pb.Request(chunk=chunk))).refusal == "not_ready"
    assert (await asker.ask(holder.peer, pb.Request(envelope=b"hello"))).refusal == "not_ready"
    assert (await asker.ask(holder.peer, pb.Request(manifest=pb.ManifestRequest()))).refusal == "not_ready"
    assert holder.received() == holder.refused(Refusal.NOT_READY) == 1  # the question was no message
    with pytest.raises(ManifestError, match="no run to join"):
        await asker.exchange.ask_manifest(asker.transport, holder.peer)


async def test_messages_reach_the_engine_and_are_counted(asker: Node, holder: Node) -> None:
    holder.take_part()
    asker.exchange.engine = None
    woken: list[None] = []
    holder.exchange.on_input = lambda: woken.append(None)
    assert holder.exchange.engine is not None
    manifest = holder.exchange.engine.manifest
    engine = Engine(manifest, asker.identity, 0, incarnation=1, now=EPOCH_S, history=History(manifest))
    engine.introduce(holder.peer)
    [(peer, greeting)] = engine.messages_to_send()
    assert await asker.exchange.send(asker.transport, peer, greeting)
    assert [member.peer for member in holder.exchange.engine.roster] == [asker.peer]
    assert await asker.exchange.send(asker.transport, peer, greeting)  # delivered, though refused as a replay
    assert await asker.exchange.send(asker.transport, peer, b"nonsense")
    assert holder.received() == 3
    assert holder.refused(Refusal.REPLAYED) == holder.refused(Refusal.MALFORMED) == 1
    assert holder.exchange.engine.accepted == 1
    assert len(woken) == 3
    assert not await asker.exchange.send(asker.transport, identity(9).peer_id, greeting)


@pytest.fixture
def node(make: Callable[[int], Node]) -> Node:
    node = make(0)
    node.take_part()
    return node


@settings(
    derandomize=True, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    data=st.binary(max_size=200)
    | st.builds(lambda e: pb.Request(envelope=e).SerializeToString(), st.binary(max_size=200))
    | st.builds(
        lambda d, o, n: pb.Request(chunk=pb.ChunkRequest(digest=d, offset=o, length=n)).SerializeToString(),
        st.binary(min_size=31, max_size=33),
        st.integers(0, (1 << 64) - 1),
        st.integers(0, (1 << 32) - 1),
    )
)
def test_any_bytes_get_a_reply(node: Node, data: bytes) -> None:
    reply = pb.Reply.FromString(asyncio.run(node.exchange.answer(identity(5).peer_id, data)))
    assert not reply.chunk
    known = {refusal.value for refusal in Refusal}
    assert reply.refusal in known or reply.manifest


async def test_the_run_of_a_peer_can_be_asked_for(asker: Node, holder: Node) -> None:
    holder.take_part()
    manifest, body, signature = await asker.exchange.ask_manifest(asker.transport, holder.peer)
    assert (body, signature) == holder.exchange.manifest
    assert manifest == make_manifest(holder.identity)
    with pytest.raises(Unreachable):
        await asker.exchange.ask_manifest(asker.transport, identity(9).peer_id)


async def test_a_run_that_is_forged_or_of_another_version_is_not_joined(asker: Node, holder: Node) -> None:
    body, signature = sign_manifest(make_manifest(holder.identity), holder.identity)
    holder.exchange.manifest = body.replace(b'"seed":0', b'"seed":1'), signature
    with pytest.raises(ManifestError, match="signed"):
        await asker.exchange.ask_manifest(asker.transport, holder.peer)
    holder.exchange.manifest = body.replace(b'"protocol":1', b'"protocol":2'), signature
    with pytest.raises(VersionMismatch, match="version 2"):
        await asker.exchange.ask_manifest(asker.transport, holder.peer)

    async def garbage(peer: PeerId, data: bytes) -> bytes:
        return pb.Reply(manifest=b"\xff\xff").SerializeToString()

    holder.transport._handlers.clear()
    await holder.serve(garbage)
    with pytest.raises(ManifestError, match="not a manifest"):
        await asker.exchange.ask_manifest(asker.transport, holder.peer)


async def test_what_a_peer_says_of_a_refusal_is_not_repeated(asker: Node, make: Callable[[int], Node]) -> None:
    async def rude(peer: PeerId, data: bytes) -> bytes:
        return pb.Reply(refusal="\x1b[2J" + "x" * 5000).SerializeToString()

    node = make(2)
    await node.serve(rude)
    with pytest.raises(ManifestError, match="words we do not know") as caught:
        await asker.exchange.ask_manifest(asker.transport, node.peer)
    assert len(str(caught.value)) < 200


async def test_bytes_are_counted_by_kind_on_both_sides(asker: Node, holder: Node) -> None:
    blob, anchor = holder.store.put(blob_of(1000)), holder.store.put(blob_of(2000))
    holder.exchange.is_anchor = lambda digest: digest == anchor
    await asker.exchange.fetch(asker.transport, blob, 1000, [holder.peer])
    await asker.exchange.fetch(asker.transport, anchor, 2000, [holder.peer], "anchor")
    await asker.exchange.send(asker.transport, holder.peer, b"nonsense")
    assert asker.exchange.sent == holder.exchange.received
    assert asker.exchange.received == holder.exchange.sent
    assert 1000 < holder.exchange.sent["blob"] < 1100
    assert 2000 < holder.exchange.sent["anchor"] < 2100
    assert 0 < holder.exchange.sent["message"] < 100
    labels = {"direction": "sent", "kind": "blob"}
    exported = holder.metrics.registry.get_sample_value("braniac_net_bytes_total", labels)
    assert exported == holder.exchange.sent["blob"]
    assert holder.exchange.sent.total() == holder.transport.traffic.sent_bytes


async def test_only_peers_that_know_the_time_are_believed(asker: Node, holder: Node) -> None:
    holder.swarm_clock.set(asker.swarm_clock.now() + 5000)
    holder.take_part()
    await asker.exchange.ask_manifest(asker.transport, holder.peer)
    assert asker.swarm_clock.peers == 0
    holder.exchange.synchronised = True
    await asker.exchange.ask_manifest(asker.transport, holder.peer)
    assert asker.swarm_clock.peers == 1
    assert asker.swarm_clock.step() == pytest.approx(5000)


async def test_a_time_that_is_no_number_is_ignored(asker: Node, make: Callable[[int], Node]) -> None:
    node = make(2)
    times = iter([float("nan"), float("inf"), -5.0])

    async def confused(peer: PeerId, data: bytes) -> bytes:
        return pb.Reply(swarm_time_s=next(times)).SerializeToString()

    await node.serve(confused)
    for _ in range(3):
        await asker.exchange.send(asker.transport, node.peer, b"hello")
    assert asker.swarm_clock.peers == 0
