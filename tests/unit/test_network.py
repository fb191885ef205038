"""Transport, directory and knocking, kept alive; with the in-memory transport and without real time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from braniac.node import identity_file
from braniac.node import network as network_module
from braniac.node.clock import SystemClock
from braniac.node.config import NetworkSection
from braniac.node.directory import Directory, Record
from braniac.node.errors import ConfigError, ResourceError
from braniac.node.network import Network
from braniac.node.p2pd import P2pdOptions
from braniac.node.transport import Unreachable
from braniac.node.transport_memory import MemoryNetwork, MemoryTransport
from braniac.protocol import limits
from braniac.protocol.identity import Identity, PeerId, peer_id_text
from tests.unit.node_harness import identity, until

RUN = bytes(range(32))


async def echo(peer: PeerId, data: bytes) -> bytes:
    return data


def address_of(peer: PeerId, host: str = "203.0.113.7") -> str:
    return f"/ip4/{host}/tcp/4001/p2p/{peer_id_text(peer)}"


class Node:
    """A Network over memory, whose pauses are noted and take no time."""

    def __init__(self, memory: MemoryNetwork, root: Path, peers: tuple[str, ...] = ()) -> None:
        self.memory = memory
        self.pauses_s: list[float] = []
        self.starts: list[MemoryTransport] = []
        self.failures: list[Exception] = []
        """What the next starts of a transport raise."""
        root.mkdir(exist_ok=True)
        self.identity: Identity = identity_file.load_or_create(root / "identity.key")
        self.network = Network(
            NetworkSection(peers=peers, call_timeout_s=0.1),
            root / "identity.key",
            self.identity,
            SystemClock(),  # hivemind looks at the real time
            start_transport=self._start,
            sleep=self._sleep,
        )

    async def _start(self, path: Path, options: P2pdOptions) -> MemoryTransport:
        if self.failures:
            raise self.failures.pop(0)
        self.starts.append(self.memory.join(identity_file.load(path).peer_id))
        return self.starts[-1]

    async def _sleep(self, seconds: float) -> None:
        self.pauses_s.append(seconds)
        await asyncio.sleep(0)

    async def pauses(self, count: int) -> None:
        await until(lambda: len(self.pauses_s) >= count)


class Background:
    """Tasks that never end by themselves, cancelled when the test is over."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def run(self, work: Any) -> asyncio.Task[None]:
        self.tasks.append(asyncio.ensure_future(work))
        return self.tasks[-1]


@pytest.fixture
async def background() -> AsyncIterator[Background]:
    background = Background()
    yield background
    for task in background.tasks:
        task.cancel()
    for result in await asyncio.gather(*background.tasks, return_exceptions=True):
        assert result is None or isinstance(result, asyncio.CancelledError), result


@pytest.fixture
def memory() -> MemoryNetwork:
    return MemoryNetwork()


def test_a_malformed_bootstrap_address_is_refused_at_once(memory: MemoryNetwork, tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        Node(memory, tmp_path, ("/ip4/1.2.3.4/tcp/4001",))


async def test_it_knocks_for_ever_with_growing_jittered_pauses(
    memory: MemoryNetwork, tmp_path: Path, background: Background
) -> None:
    address = address_of(identity(1).peer_id)
    node = Node(memory, tmp_path, (address,))
    await node.network.start(echo)
    task = background.run(node.network.keep_knocking(node.network.bootstrap, lambda peer: pytest.fail("who?")))
    await node.pauses(300)
    assert not task.done()
    bounds = [min(60.0, 0.5 * 2**attempt) for attempt in range(300)]
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(node.pauses_s, bounds, strict=False))
    assert len({round(pause, 6) for pause in node.pauses_s}) > 250  # never in step with others
    assert node.network.failures == {address: "nobody listens there"}


async def test_a_door_that_opens_is_noticed_and_knocked_at_again(
    memory: MemoryNetwork, tmp_path: Path, background: Background
) -> None:
    other = identity(1).peer_id
    transport = memory.join(other)
    await transport.serve(echo)
    [address] = transport.addresses()
    node = Node(memory, tmp_path, (address,))
    await node.network.start(echo)
    memory.cut(node.identity.peer_id, other)
    answered: list[PeerId] = []
    background.run(node.network.keep_knocking([address, address], answered.append))
    await node.pauses(3)
    assert node.network.failures == {address: "no answer in 0.1 s"}
    assert not answered
    memory.mend(node.identity.peer_id, other)
    await node.pauses(20)
    assert set(answered) == {other}
    assert len(answered) > 1
    assert not node.network.failures
    assert node.network.known_peers() == {other: (address,)}
    assert all(30 <= pause <= 60 for pause in node.pauses_s[-5:])  # a good address is not pestered
    memory.cut(node.identity.peer_id, other)
    done = len(node.pauses_s)
    await node.pauses(done + 3)
    assert node.pauses_s[done + 1] <= 1.0  # and a lost one is sought with short pauses first


async def test_connecting_says_why_it_failed(memory: MemoryNetwork, tmp_path: Path) -> None:
    node = Node(memory, tmp_path)
    await node.network.start(echo)
    address = address_of(identity(1).peer_id)
    with pytest.raises(Unreachable, match="nobody listens there"):
        await node.network.connect(address)
    assert list(node.network.failures) == [address]
    assert node.network.known_peers() == {}


async def test_only_good_addresses_of_the_peer_itself_are_kept(memory: MemoryNetwork, tmp_path: Path) -> None:
    node = Node(memory, tmp_path)
    await node.network.start(echo)
    peer, other = identity(1).peer_id, identity(2).peer_id
    good = address_of(peer)
    node.network.remember(peer, ["", "nonsense", address_of(other), good, "/ip4/1.2.3.4/tcp/0/p2p/x", "/" * 5000])
    node.network.remember(other, ["nonsense"])
    node.network.remember(node.identity.peer_id, [address_of(node.identity.peer_id)])
    assert node.network.known_peers() == {peer: (good,)}


async def test_known_peers_are_bounded_and_still_updated(
    memory: MemoryNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "ROSTER_PEERS_MAX", 3)
    node = Node(memory, tmp_path)
    await node.network.start(echo)
    peers = [identity(n).peer_id for n in range(1, 6)]
    for peer in peers:
        node.network.remember(peer, [address_of(peer)])
    assert list(node.network.known_peers()) == peers[:3]
    node.network.remember(peers[0], [address_of(peers[0], "203.0.113.99")])
    assert node.network.known_peers()[peers[0]] == (address_of(peers[0], "203.0.113.99"),)


async def test_a_dead_transport_is_replaced_with_its_directory(
    memory: MemoryNetwork, tmp_path: Path, background: Background
) -> None:
    node = Node(memory, tmp_path)
    await node.network.start(echo)
    await node.network.open_directory(RUN)
    first_directory = node.network._directory
    peer = identity(1).peer_id
    node.network.remember(peer, [address_of(peer)])
    background.run(node.network.keep_alive())
    node.failures = [ResourceError("no port"), OSError("the socket is gone"), ResourceError("no port")]
    await asyncio.sleep(0)
    node.starts[0].fail()
    await until(lambda: len(node.starts) == 2 and node.network._directory is not first_directory)
    assert node.network.transport is node.starts[1]
    assert len(node.pauses_s) == 3
    assert node.network.known_peers() == {peer: (address_of(peer),)}
    caller = memory.join(peer)
    assert await caller.call(node.identity.peer_id, b"still there?", timeout_s=1) == b"still there?"
    node.starts[1].fail()
    await until(lambda: len(node.starts) == 3)


async def test_a_transport_without_directory_is_not_left_behind(
    memory: MemoryNetwork, tmp_path: Path, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(memory, tmp_path)
    await node.network.start(echo)
    await node.network.open_directory(RUN)
    create, errors = Directory.create, [RuntimeError("hivemind"), RuntimeError("hivemind")]

    async def sometimes(*arguments: Any) -> Directory:
        if errors:
            raise errors.pop()
        return await create(*arguments)

    monkeypatch.setattr(network_module.Directory, "create", sometimes)
    background.run(node.network.keep_alive())
    await asyncio.sleep(0)
    node.starts[0].fail()
    await until(lambda: len(node.starts) == 4 and node.starts[-1]._handlers)
    assert [transport._failed.is_set() for transport in node.starts] == [True, True, True, False]


async def test_peers_find_each_other_in_the_directory(
    memory: MemoryNetwork, tmp_path: Path, background: Background
) -> None:
    nodes = [Node(memory, tmp_path / f"n{number}") for number in range(3)]
    found: dict[PeerId, set[PeerId]] = {node.identity.peer_id: set() for node in nodes}
    for node in nodes:
        await node.network.start(echo)
        await node.network.open_directory(RUN)
    [middle] = nodes[0].network.transport.addresses()
    for node in nodes:
        background.run(node.network.keep_listed(1, found[node.identity.peer_id].add))
    for node in nodes[1:]:
        background.run(node.network.keep_knocking([middle], lambda peer: None))
    everybody = {node.identity.peer_id for node in nodes}
    await until(lambda: all(found[peer] == everybody - {peer} for peer in everybody))
    assert set(nodes[1].network.known_peers()) == everybody - {nodes[1].identity.peer_id}


async def test_the_directory_may_fail_as_it_likes(
    memory: MemoryNetwork, tmp_path: Path, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = memory.join(identity(1).peer_id)
    await other.serve(echo)
    node = Node(memory, tmp_path)
    await node.network.start(echo)
    await node.network.open_directory(RUN)

    async def fail(*arguments: object) -> None:
        raise AssertionError("deep inside hivemind")

    for name in ("announce", "find", "bootstrap"):
        monkeypatch.setattr(Directory, name, fail)
    answered: list[PeerId] = []
    listed = background.run(node.network.keep_listed(0, lambda peer: None))
    knocking = background.run(node.network.keep_knocking(other.addresses(), answered.append))
    await node.pauses(30)
    assert not listed.done()
    assert not knocking.done()
    assert len(answered) > 3


async def test_a_long_directory_is_read_seldom(
    tmp_path: Path, background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(MemoryNetwork(), tmp_path / "n")
    await node.network.start(echo)
    await node.network.open_directory(RUN)
    many = {identity(n).peer_id: Record((), 0, 1) for n in range(10 * limits.GREETED_PEERS_MAX)}
    lives_s: list[float] = []

    async def find(self: Directory) -> dict[PeerId, Record]:
        return many if lives_s else {}

    async def announce(self: Directory, record: Record, ttl_s: float) -> bool:
        lives_s.append(ttl_s)
        return True

    monkeypatch.setattr(Directory, "find", find)
    monkeypatch.setattr(Directory, "announce", announce)
    background.run(node.network.keep_listed(0, lambda peer: None))
    await node.pauses(2)
    assert 0.7 * 10 <= node.pauses_s[0] <= 1.3 * 10
    assert 0.7 * 100 <= node.pauses_s[1] <= 1.3 * 100
    assert lives_s[:2] == [120.0, 1200.0]


async def test_loopback_addresses_are_told_to_others_only_if_there_are_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(MemoryNetwork(), tmp_path / "n")
    await node.network.start(echo)
    peer = node.identity.peer_id
    here, there = address_of(peer, "127.0.0.1"), address_of(peer)
    for known, told in (([here, there], (there,)), ([here], (here,)), ([there], (there,)), ([], ())):
        monkeypatch.setattr(node.network.transport, "addresses", lambda known=known: list(known))
        assert node.network.public_addresses() == told
    await node.network.close()
