"""Requests between peers over the in-memory network: answers to anything, manifests of liars, honest counts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from braniac.node.transport import Unreachable
from braniac.protocol import limits
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.engine import Engine
from braniac.protocol.errors import ManifestError, Refusal, VersionMismatch
from braniac.protocol.history import History
from braniac.protocol.identity import PeerId
from braniac.protocol.manifest import sign_manifest
from tests.unit.exchange_nodes import Node, Nodes
from tests.unit.node_harness import EPOCH_S, identity, make_manifest

CHUNK = limits.CHUNK_BYTES_MAX


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    yield nodes
    nodes.close()


async def test_a_chunk_out_of_bounds_is_refused(nodes: Nodes) -> None:
    asker, holder = await nodes.pair()
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


async def test_before_a_run_is_known_everything_about_it_is_refused(nodes: Nodes) -> None:
    asker = await nodes.asker()
    holder = nodes.make(1)
    await holder.serve()
    digest = holder.store.put(b"here")
    chunk = pb.ChunkRequest(digest=digest, length=4)
    assert (await asker.ask(holder.peer, pb.Request(chunk=chunk))).refusal == "not_ready"
    assert (await asker.ask(holder.peer, pb.Request(envelope=b"hello"))).refusal == "not_ready"
    assert (await asker.ask(holder.peer, pb.Request(manifest=pb.ManifestRequest()))).refusal == "not_ready"
    assert holder.received() == holder.refused(Refusal.NOT_READY) == 1  # the question was no message
    with pytest.raises(ManifestError, match="no run to join"):
        await asker.exchange.ask_manifest(asker.transport, holder.peer)


async def test_messages_reach_the_engine_and_are_counted(nodes: Nodes) -> None:
    asker, holder = await nodes.pair()
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
def node(nodes: Nodes) -> Node:
    node = nodes.make(0)
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


async def test_the_run_of_a_peer_can_be_asked_for(nodes: Nodes) -> None:
    asker, holder = await nodes.pair()
    holder.take_part()
    manifest, body, signature = await asker.exchange.ask_manifest(asker.transport, holder.peer)
    assert (body, signature) == holder.exchange.manifest
    assert manifest == make_manifest(holder.identity)
    with pytest.raises(Unreachable):
        await asker.exchange.ask_manifest(asker.transport, identity(9).peer_id)


async def test_a_run_that_is_forged_or_of_another_version_is_not_joined(nodes: Nodes) -> None:
    asker, holder = await nodes.pair()
    body, signature = sign_manifest(make_manifest(holder.identity), holder.identity)
    holder.exchange.manifest = body.replace(b'"seed":0', b'"seed":1'), signature
    with pytest.raises(ManifestError, match="signed"):
        await asker.exchange.ask_manifest(asker.transport, holder.peer)
    holder.exchange.manifest = body.replace(b'"protocol":%d' % limits.PROTOCOL_VERSION, b'"protocol":777'), signature
    with pytest.raises(VersionMismatch, match="version 7"):
        await asker.exchange.ask_manifest(asker.transport, holder.peer)

    async def garbage(peer: PeerId, data: bytes) -> bytes:
        return pb.Reply(manifest=b"\xff\xff").SerializeToString()

    holder.transport._handlers.clear()
    await holder.serve(garbage)
    with pytest.raises(ManifestError, match="not a manifest"):
        await asker.exchange.ask_manifest(asker.transport, holder.peer)


async def test_what_a_peer_says_of_a_refusal_is_not_repeated(nodes: Nodes) -> None:
    asker = await nodes.asker()

    async def rude(peer: PeerId, data: bytes) -> bytes:
        return pb.Reply(refusal="\x1b[2J" + "x" * 5000).SerializeToString()

    node = nodes.make(2)
    await node.serve(rude)
    with pytest.raises(ManifestError, match="words we do not know") as caught:
        await asker.exchange.ask_manifest(asker.transport, node.peer)
    assert len(str(caught.value)) < 200


async def test_bytes_are_counted_by_kind_on_both_sides(nodes: Nodes) -> None:
    asker, holder = await nodes.pair()
    blob, anchor = holder.store.put(bytes(1000)), holder.store.put(bytes(2000))
    holder.exchange.is_anchor = lambda digest: digest == anchor
    await asker.blobs.fetch(asker.transport, blob, 1000, [holder.peer])
    await asker.blobs.fetch(asker.transport, anchor, 2000, [holder.peer], "anchor")
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


async def test_only_peers_that_know_the_time_are_believed(nodes: Nodes) -> None:
    asker, holder = await nodes.pair()
    holder.swarm_clock.set(asker.swarm_clock.now() + 5000)
    holder.take_part()
    await asker.exchange.ask_manifest(asker.transport, holder.peer)
    assert asker.swarm_clock.peers == 0
    holder.exchange.synchronised = True
    await asker.exchange.ask_manifest(asker.transport, holder.peer)
    assert asker.swarm_clock.peers == 1
    assert asker.swarm_clock.step() == pytest.approx(5000)


async def test_a_time_that_is_no_number_is_ignored(nodes: Nodes) -> None:
    asker = await nodes.asker()
    node = nodes.make(2)
    times = iter([float("nan"), float("inf"), -5.0])

    async def confused(peer: PeerId, data: bytes) -> bytes:
        return pb.Reply(swarm_time_s=next(times)).SerializeToString()

    await node.serve(confused)
    for _ in range(3):
        await asker.exchange.send(asker.transport, node.peer, b"hello")
    assert asker.swarm_clock.peers == 0
