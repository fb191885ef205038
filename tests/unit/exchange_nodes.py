"""Peers with an exchange and nothing above, in one in-memory network."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from braniac.node.blobs import Blobs
from braniac.node.clock import FakeClock, SwarmClock
from braniac.node.exchange import Exchange
from braniac.node.metrics import Metrics
from braniac.node.store import Store
from braniac.node.transport_memory import MemoryNetwork
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.engine import Engine
from braniac.protocol.errors import Refusal
from braniac.protocol.history import History
from braniac.protocol.identity import Identity, PeerId
from braniac.protocol.manifest import sign_manifest
from tests.unit.node_harness import EPOCH_S, identity, make_manifest

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
        self.blobs = Blobs(self.store, self.exchange, self.metrics, self.clock)
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


class Nodes:
    """Makes them, and closes their stores."""

    def __init__(self, root: Path) -> None:
        self.network = MemoryNetwork()
        self._root = root
        self._made: list[Node] = []

    def make(self, number: int) -> Node:
        """It answers nobody yet."""
        self._made.append(Node(self.network, self._root, number))
        return self._made[-1]

    async def asker(self) -> Node:
        """It answers, and is in no run yet."""
        node = self.make(0)
        await node.serve()
        return node

    async def holder(self) -> Node:
        """In a run, because who rests or is not in one yet serves nothing."""
        node = self.make(1)
        node.take_part()
        await node.serve()
        return node

    async def pair(self) -> tuple[Node, Node]:
        """One that asks and one that has what it wants."""
        return await self.asker(), await self.holder()

    def close(self) -> None:
        for node in self._made:
            node.store.close()
