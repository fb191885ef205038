"""Finding a run: asking for ever, refusing the wrong one, hearing the time, showing how far the download is."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from braniac.node import identity_file, joiner
from braniac.node.clock import FakeClock, SwarmClock
from braniac.node.config import NetworkSection
from braniac.node.errors import Incompatible
from braniac.node.exchange import Exchange
from braniac.node.joiner import DownloadBar
from braniac.node.metrics import Metrics
from braniac.node.network import Network
from braniac.node.p2pd import P2pdOptions
from braniac.node.store import Store
from braniac.node.transport_memory import MemoryNetwork, MemoryTransport
from braniac.protocol import limits
from braniac.protocol.errors import VersionMismatch
from braniac.protocol.manifest import Manifest, sign_manifest
from tests.unit.node_harness import make_manifest


class Node:
    """Network and exchange of one peer; its pauses take no time, and what happens in them can be scripted."""

    def __init__(self, memory: MemoryNetwork, root: Path, peers: tuple[str, ...] = ()) -> None:
        self.memory = memory
        self.pauses = 0
        self.script: dict[int, object] = {}
        """Pause number -> what to do in it."""
        self.store = Store.open(root)
        self.identity = identity_file.load_or_create(root / "identity.key")
        clock = FakeClock()
        self.swarm_clock = SwarmClock(clock)
        self.exchange = Exchange(self.store, Metrics("test", 1), clock, self.swarm_clock, 30.0)
        settings = NetworkSection(peers=peers)
        key = root / "identity.key"
        self.network = Network(
            settings, key, self.identity, clock, start_transport=self._start_transport, sleep=self._sleep
        )

    async def _start_transport(self, path: Path, options: P2pdOptions) -> MemoryTransport:
        return self.memory.join(self.identity.peer_id)

    async def _sleep(self, seconds: float) -> None:
        assert 0 < seconds <= 30
        self.pauses += 1
        action = self.script.get(self.pauses)
        if callable(action):
            action()
        await asyncio.sleep(0)

    async def start(self) -> str:
        await self.network.start(self.exchange.answer)
        return self.network.transport.addresses()[0]

    def found(self) -> Manifest:
        manifest = make_manifest(self.identity)
        self.exchange.manifest = sign_manifest(manifest, self.identity)
        return manifest

    async def close(self) -> None:
        await self.network.close()
        self.store.close()


class Nodes:
    def __init__(self, root: Path) -> None:
        self.memory = MemoryNetwork()
        self.root = root
        self.made: list[Node] = []

    def make(self, *peers: str) -> Node:
        self.made.append(Node(self.memory, self.root / f"n{len(self.made)}", peers))
        return self.made[-1]


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[Nodes]:
    nodes = Nodes(tmp_path)
    yield nodes
    for node in nodes.made:
        await node.close()


async def test_it_asks_until_somebody_knows_the_run(nodes: Nodes) -> None:
    silent, founder = nodes.make(), nodes.make()
    addresses = await silent.start(), await founder.start()
    seeker = nodes.make(*addresses)
    await seeker.start()
    reasons: list[dict[str, str]] = []
    seeker.script = {3: lambda: reasons.append(dict(seeker.network.failures)), 5: founder.found}
    manifest, signed = await joiner.find_run(seeker.network, seeker.exchange)
    assert seeker.pauses == 5
    assert manifest == make_manifest(founder.identity)
    assert signed == founder.exchange.manifest
    assert set(reasons[0]) == set(addresses)  # meanwhile it says what is wrong
    assert all("no run to join (not_ready)" in reason for reason in reasons[0].values())


async def test_another_protocol_ends_the_search(nodes: Nodes) -> None:
    founder = nodes.make()
    address = await founder.start()
    body, signature = sign_manifest(make_manifest(founder.identity), founder.identity)
    founder.exchange.manifest = body.replace(b'"protocol":%d' % limits.PROTOCOL_VERSION, b'"protocol":777'), signature
    seeker = nodes.make(address)
    await seeker.start()
    with pytest.raises(VersionMismatch, match="install"):
        await joiner.find_run(seeker.network, seeker.exchange)
    with pytest.raises(VersionMismatch):
        await joiner.check_run(seeker.network, seeker.exchange, make_manifest(seeker.identity))


async def test_the_peers_we_were_given_are_checked_however_late_they_come(nodes: Nodes) -> None:
    founder = nodes.make()
    address = await founder.start()
    resumer = nodes.make(address)
    await resumer.start()
    resumer.script = {4: founder.found}
    await joiner.check_run(resumer.network, resumer.exchange, make_manifest(founder.identity))
    assert resumer.pauses == 4
    other = dataclasses.replace(make_manifest(founder.identity), seed=1)
    with pytest.raises(Incompatible, match="use another --state-dir"):
        await joiner.check_run(resumer.network, resumer.exchange, other)


async def test_the_time_is_heard_from_peers_of_this_run_only(nodes: Nodes) -> None:
    ours, stranger = nodes.make(), nodes.make()
    addresses = [await ours.start(), await stranger.start()]
    manifest = ours.found()
    stranger.found()
    for node, ahead_s in ((ours, 100.0), (stranger, 9e6)):
        node.swarm_clock.set(node.swarm_clock.now() + ahead_s)
        node.exchange.synchronised = True
    sleeper = nodes.make(*addresses)
    gone = "/ip4/10.9.9.9/tcp/1/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
    await sleeper.start()
    await joiner.ask_the_time(sleeper.network, sleeper.exchange, [*addresses, gone], manifest)
    assert sleeper.swarm_clock.peers == 1
    assert sleeper.swarm_clock.step() == pytest.approx(100.0)


def test_the_download_is_counted() -> None:
    bar = DownloadBar(1000)
    bar.start()
    for _ in range(4):
        bar.advance(250)
    bar.stop()
    assert (bar.done_bytes, bar.total_bytes) == (1000, 1000)
    nothing = DownloadBar(0)
    nothing.start()
    nothing.advance(0)
    nothing.stop()
