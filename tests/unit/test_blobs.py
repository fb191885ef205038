"""Blobs pulled over the in-memory network: of any size, from liars, and from holders that are not there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from braniac.node.exchange import BlobUnavailable
from braniac.protocol import limits
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.errors import Refusal
from braniac.protocol.identity import PeerId
from tests.unit.exchange_nodes import Liar, Nodes
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
        await asker.blobs.fetch(asker.transport, digest, len(blob), [liar.peer])
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
