"""Blobs pulled over the in-memory network: of any size, from liars, and from holders that are not there."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from braniac.node.blobs import Blobs
from braniac.node.clock import FakeClock
from braniac.node.exchange import BlobUnavailable
from braniac.node.holders import Holders
from braniac.protocol import limits
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.errors import Refusal
from braniac.protocol.identity import PeerId
from tests.unit.exchange_nodes import Liar, Node, Nodes
from tests.unit.node_harness import identity

CHUNK = limits.CHUNK_BYTES_MAX


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    yield nodes
    nodes.close()


def blob_of(size: int) -> bytes:
    return (hashlib.sha256(b"%d" % size).digest() * (size // 32 + 1))[:size]


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 6 * CHUNK + 17])
async def test_a_blob_of_any_number_of_chunks_arrives(nodes: Nodes, size: int) -> None:
    asker, holder = await nodes.pair()
    blob = blob_of(size)
    digest = holder.store.put(blob)
    advanced: list[int] = []
    await asker.blobs.fetch(asker.transport, digest, size, [holder.peer], on_bytes=advanced.append)
    assert asker.store.get(digest) == blob
    assert sum(advanced) == size
    assert len(advanced) == -(-size // CHUNK)


async def test_what_is_here_is_not_asked_for(nodes: Nodes) -> None:
    asker = await nodes.asker()
    digest = asker.store.put(b"here")
    await asker.blobs.fetch(asker.transport, digest, 4, [identity(9).peer_id])
    assert not asker.transport.traffic.calls


async def test_what_is_here_in_another_size_is_not_what_was_meant(nodes: Nodes) -> None:
    asker, holder = await nodes.pair()
    digest = asker.store.put(b"here")
    holder.store.put(b"here")
    with pytest.raises(BlobUnavailable):
        await asker.blobs.fetch(asker.transport, digest, 5, [holder.peer])
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
async def test_a_liar_is_passed_over(nodes: Nodes, lie: Liar) -> None:
    asker, holder = await nodes.pair()
    blob = blob_of(3 * CHUNK)
    liar = nodes.make(2)
    await liar.lie(blob, lie)
    digest = hashlib.sha256(blob).digest()
    with pytest.raises(BlobUnavailable) as caught:
        await asker.blobs.fetch(asker.transport, digest, len(blob), [liar.peer, holder.peer])
    assert len(str(caught.value)) < 300
    assert not asker.store.has(digest)
    holder.store.put(blob)
    await asker.blobs.fetch(asker.transport, digest, len(blob), [liar.peer, holder.peer])
    assert asker.store.get(digest) == blob
    assert asker.refused(Refusal.WRONG_DIGEST) == (2 if lie is _other_bytes else 0)


async def test_a_holder_that_is_not_there_or_never_answers_is_passed_over(nodes: Nodes) -> None:
    asker, holder = await nodes.pair()
    silent = nodes.make(2)
    await silent.serve()
    nodes.network.suspend(silent.peer)
    digest = holder.store.put(b"wanted")
    nobody = [asker.peer, identity(9).peer_id, silent.peer]
    with pytest.raises(BlobUnavailable, match=r"undialable.*timeout"):
        await asker.blobs.fetch(asker.transport, digest, 6, nobody)
    assert not asker.store.has(digest)
    with pytest.raises(BlobUnavailable, match="nobody else has it"):
        await asker.blobs.fetch(asker.transport, digest, 6, [asker.peer])
    await asker.blobs.fetch(asker.transport, digest, 6, [*nobody, holder.peer])
    assert asker.store.get(digest) == b"wanted"


async def test_a_holder_of_garbage_is_counted(nodes: Nodes) -> None:
    asker = await nodes.asker()

    async def garbage(peer: PeerId, data: bytes) -> bytes:
        return b"\xff\xff\xff"

    babbler = nodes.make(2)
    await babbler.serve(garbage)
    with pytest.raises(BlobUnavailable, match="malformed"):
        await asker.blobs.fetch(asker.transport, bytes(32), 6, [babbler.peer])
    assert asker.refused(Refusal.MALFORMED) == 1


# --- holders that are to have it soon --------------------------------------------------------------------------------


async def test_who_is_to_have_it_soon_is_waited_for(nodes: Nodes) -> None:
    asker, holder = await nodes.pair()
    parent = nodes.make(2)
    parent.take_part()
    await parent.serve()
    digest = holder.store.put(b"wanted")
    holders = [parent.peer, holder.peer]
    for _ in range(3):
        with pytest.raises(BlobUnavailable, match="not_ready"):
            await asker.blobs.fetch(asker.transport, digest, 6, holders, patient=True)
    assert not holder.transport.traffic.answers
    parent.store.put(b"wanted")
    await asker.blobs.fetch(asker.transport, digest, 6, holders, patient=True)
    assert asker.store.get(digest) == b"wanted"
    assert not holder.transport.traffic.answers, "that it had to be waited for is not held against the parent"


async def test_who_cannot_give_it_is_not_waited_for(nodes: Nodes) -> None:
    """Neither one that is not there, nor one that is silent, nor one that lies."""
    asker, holder = await nodes.pair()
    silent, liar = nodes.make(2), nodes.make(3)
    await silent.serve()
    nodes.network.suspend(silent.peer)
    await liar.lie(b"wanted", _other_bytes)
    digest = holder.store.put(b"wanted")
    holders = [identity(9).peer_id, silent.peer, liar.peer, holder.peer]
    await asker.blobs.fetch(asker.transport, digest, 6, holders, patient=True)
    assert asker.store.get(digest) == b"wanted"


@pytest.mark.parametrize("patient", [False, True])
async def test_a_silent_holder_is_not_waited_for_longer_than_the_grace(nodes: Nodes, patient: bool) -> None:
    """Unless nobody else is going to be asked."""
    asker = await nodes.asker()
    asker.blobs = Blobs(asker.store, asker.exchange, asker.metrics, asker.clock, grace_s=0.25)
    silent, last = nodes.make(2), nodes.make(3)
    for node in (silent, last):
        await node.serve()
        nodes.network.suspend(node.peer)
    with pytest.raises(BlobUnavailable) as caught:
        await asker.blobs.fetch(asker.transport, bytes(32), 1 << 14, [silent.peer, last.peer], patient=patient)
    waits_s = [float(wait) for wait in re.findall(r"no answer in (\S+) s", str(caught.value))]
    assert waits_s == pytest.approx([1.25, 1.25 if patient else 30.0])


# --- slow holders ----------------------------------------------------------------------------------------------------


async def slow_holder(nodes: Nodes, asker: Node, blob: bytes) -> Node:
    """It gives the least that it may at a time, and each piece takes two seconds."""
    holder = nodes.make(2)

    async def answer(peer: PeerId, data: bytes) -> bytes:
        asker.clock.advance(2.0)
        request = pb.Request.FromString(data).chunk
        end = request.offset + min(request.length, limits.PIECE_BYTES_MIN)
        return pb.Reply(chunk=blob[request.offset : end], blob_bytes=len(blob)).SerializeToString()

    await holder.serve(answer)
    return holder


async def test_a_slow_holder_is_left_for_another_one_and_asked_last_from_then_on(nodes: Nodes) -> None:
    asker, holder = await nodes.pair()
    blob = blob_of(CHUNK // 2)
    slow = await slow_holder(nodes, asker, blob)
    digest = holder.store.put(blob)
    await asker.blobs.fetch(asker.transport, digest, len(blob), [slow.peer, holder.peer])
    assert asker.store.get(digest) == blob
    asked = slow.transport.traffic.answers["ok"]
    assert 1 < asked < len(blob) // limits.PIECE_BYTES_MIN
    other = holder.store.put(b"another")
    await asker.blobs.fetch(asker.transport, other, 7, [slow.peer, holder.peer])
    assert slow.transport.traffic.answers["ok"] == asked, "it would have been asked first"


async def test_a_slow_holder_is_better_than_none(nodes: Nodes) -> None:
    asker = await nodes.asker()
    blob = blob_of(CHUNK // 4)
    slow = await slow_holder(nodes, asker, blob)
    await asker.blobs.fetch(asker.transport, hashlib.sha256(blob).digest(), len(blob), [slow.peer])
    assert asker.store.has(hashlib.sha256(blob).digest())


def test_faults_are_forgiven_when_a_holder_delivers() -> None:
    a, b, c = (identity(n).peer_id for n in range(3))
    holders = Holders(FakeClock())
    assert holders.in_order([c, a, b]) == [c, a, b]
    for _ in range(3):
        holders.failed(c)
    holders.failed(a)
    assert holders.in_order([c, a, b]) == [b, a, c]
    holders.delivered(a)
    assert holders.in_order([c, a, b]) == [a, b, c]
    for _ in range(2):
        holders.delivered(c)
    assert holders.in_order([c, a, b]) == [c, a, b]


def test_faults_of_long_ago_are_forgiven() -> None:
    """Who is asked last never gets a chance to deliver, and must be somebody's first again some day."""
    clock, (a, b) = FakeClock(), (identity(n).peer_id for n in range(2))
    holders = Holders(clock)
    holders.failed(a)
    clock.advance(500)
    assert holders.in_order([a, b]) == [b, a]
    clock.advance(500)
    assert holders.in_order([a, b]) == [a, b]
