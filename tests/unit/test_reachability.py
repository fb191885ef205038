"""Asking others whether they can reach this node, over the in-memory network, and what follows from their answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from braniac.node.clock import FakeClock, SwarmClock
from braniac.node.config import NetworkSection
from braniac.node.exchange import VERSION_MAX, Exchange
from braniac.node.metrics import Metrics
from braniac.node.network import Network
from braniac.node.p2pd import P2pdOptions
from braniac.node.reachability import AGAIN_S, FRESH_S, UNKNOWN_AGAIN_S, Reachability
from braniac.node.store import Store
from braniac.node.transport import Transport
from braniac.node.transport_memory import MemoryNetwork
from braniac.protocol import limits
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.engine import Engine
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.history import History
from braniac.protocol.identity import PeerId, peer_id_text
from braniac.protocol.messages import Heartbeat
from tests.unit.node_harness import EPOCH_S, identity, make_manifest

ME = identity(0)
HERE = f"/ip4/203.0.113.7/tcp/4001/p2p/{peer_id_text(ME.peer_id)}"
HOME = f"/ip4/192.168.1.5/tcp/4001/p2p/{peer_id_text(ME.peer_id)}"
GLOBAL = f"/ip4/8.8.8.8/tcp/4001/p2p/{peer_id_text(ME.peer_id)}"
RELAYED = f"/ip4/8.8.4.4/tcp/4001/p2p/{peer_id_text(identity(1).peer_id)}/p2p-circuit/p2p/{peer_id_text(ME.peer_id)}"


class Sleeper:
    """Sleeps by advancing the clock; stops after so many naps."""

    def __init__(self, clock: FakeClock, naps: int) -> None:
        self.clock = clock
        self.naps = naps

    async def __call__(self, seconds: float) -> None:
        if not self.naps:
            raise asyncio.CancelledError
        self.naps -= 1
        self.clock.advance(seconds)
        await asyncio.sleep(0)


class Asker:
    """A node in a run, with peers that answer what the test says."""

    def __init__(self, root: Path) -> None:
        self.wire = MemoryNetwork()
        self.clock = FakeClock()
        self.store = Store.open(root)
        self.exchange = Exchange(self.store, Metrics("test", 1), self.clock, SwarmClock(self.clock), 10.0)
        self.network = Network(NetworkSection(), root / "key", ME, self.clock, start_transport=self._start)
        manifest = make_manifest(ME)
        self.engine = Engine(manifest, ME, 0, incarnation=1, now=EPOCH_S, history=History(manifest))
        self.exchange.engine = self.engine
        self.reachability = Reachability(self.network, self.exchange, self.engine, self.clock, random.Random(0))
        self.asked: list[PeerId] = []

    async def _start(self, path: Path, options: P2pdOptions) -> Transport:
        return self.wire.join(ME.peer_id)

    async def add(self, number: int, answer: pb.DialBack | None, *, unreachable: bool = False) -> PeerId:
        """A live peer with one answer; None: it does not know the question."""
        peer = identity(number).peer_id
        heartbeat = Heartbeat(0, 0, 0, unreachable_slot=1 if unreachable else 0)
        self.engine.roster.hear(peer, heartbeat, 0, number)

        async def reply(asker: PeerId, data: bytes) -> bytes:
            assert pb.Request.FromString(data).WhichOneof("kind") == "dial_back"
            self.asked.append(peer)
            if answer is None:
                return pb.Reply(refusal=Refusal.MALFORMED.value).SerializeToString()
            return pb.Reply(dial_back=answer).SerializeToString()

        await self.wire.join(peer).serve(reply)
        return peer

    @property
    def hidden(self) -> bool:
        return self.engine._standing.unreachable_slot > 0


@pytest.fixture
async def asker(tmp_path: Path) -> AsyncIterator[Asker]:
    node = Asker(tmp_path)
    await node.network.start(node.exchange.answer)
    node.engine.addresses = (HERE,)
    yield node
    await node.network.close()
    node.store.close()


def said(answered: Sequence[str] = (), silent: Sequence[str] = ()) -> pb.DialBack:
    return pb.DialBack(answered=answered, silent=silent)


YES, NO, NOTHING = said([HERE]), said(silent=[HERE]), said()


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([YES], "public"),
        ([NO], "private"),
        ([NO, YES, YES], "public"),
        ([YES, NO, NO], "private"),
        ([YES, NO], "public"),
        ([NOTHING, NO], "private"),
        ([None, YES], "public"),
        ([None, None], "unknown"),
    ],
)
async def test_most_decide(asker: Asker, answers: list[pb.DialBack | None], expected: str) -> None:
    for number, answer in enumerate(answers, 1):
        await asker.add(number, answer)
    reply = await asker.reachability.check()
    assert reply.reachability == expected
    assert reply.detail
    assert bool(reply.asked) == (expected != "unknown")
    assert list(reply.dialed) == ([HERE] if YES in answers else [])
    assert asker.hidden == (expected == "private")
    assert len(asker.asked) == len(answers)


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        ((HOME,), "private"),  # connected from where it does not know itself: behind a router
        ((HOME, RELAYED), "relayed"),
        ((HOME, GLOBAL), "unknown"),  # it may be reached there, who knows
    ],
)
async def test_a_peer_that_found_nothing_to_try(asker: Asker, addresses: tuple[str, ...], expected: str) -> None:
    asker.engine.addresses = addresses
    await asker.add(1, NOTHING)
    assert (await asker.reachability.check()).reachability == expected


async def test_addresses_of_others_in_an_answer_mean_nothing(asker: Asker) -> None:
    asker.engine.addresses = (GLOBAL,)
    await asker.add(1, said([HOME], [HERE]))
    reply = await asker.reachability.check()
    assert reply.reachability == "unknown"
    assert not reply.dialed


async def test_nobody_to_ask(asker: Asker) -> None:
    assert (await asker.reachability.check()).detail == "there is no peer to ask"
    await asker.add(1, YES)
    asker.exchange.engine = None  # at rest
    assert (await asker.reachability.check()).reachability == "unknown"
    assert not asker.asked


async def test_peers_that_can_be_dialled_are_asked_first(asker: Asker) -> None:
    hidden = await asker.add(1, YES, unreachable=True)
    asker.engine.roster.get(hidden).unreachable_slot = -100  # type: ignore[union-attr]
    seen = await asker.add(2, YES)
    await asker.reachability.check()
    assert asker.asked == [seen]


async def test_asked_again_at_once_it_says_the_same(asker: Asker) -> None:
    await asker.add(1, YES)
    first = await asker.reachability.check()
    assert await asker.reachability.check() == first
    assert len(asker.asked) == 1
    asker.clock.advance(FRESH_S)
    await asker.reachability.check()
    assert len(asker.asked) == 2


async def test_no_answer_leaves_the_last_one_in_force(asker: Asker) -> None:
    peer = await asker.add(1, NO)
    await asker.reachability.check()
    assert asker.hidden
    asker.wire.find(peer).fail()  # type: ignore[union-attr]
    asker.clock.advance(FRESH_S)
    assert (await asker.reachability.check()).reachability == "unknown"
    assert asker.reachability.latest.reachability == "private"
    assert asker.hidden


async def test_it_is_checked_now_and_then_and_when_the_addresses_change(asker: Asker) -> None:
    await asker.add(1, YES)

    async def keep(seconds: float) -> None:
        with pytest.raises(asyncio.CancelledError):
            await asker.reachability.keep(Sleeper(asker.clock, int(seconds / 5)))

    await keep(AGAIN_S - 10)
    assert len(asker.asked) == 1
    asker.engine.addresses = (HOME, HERE)
    await keep(FRESH_S)
    assert len(asker.asked) == 2
    await keep(AGAIN_S + 10)
    assert len(asker.asked) == 3


async def test_while_nothing_is_known_it_asks_more_often(asker: Asker) -> None:
    await asker.add(1, None)
    with pytest.raises(asyncio.CancelledError):
        await asker.reachability.keep(Sleeper(asker.clock, int(2 * UNKNOWN_AGAIN_S / 5)))
    assert len(asker.asked) == 3


# --- the exchange's part ---------------------------------------------------------------------------------------------


async def test_the_exchange_asks_for_the_addresses_in_the_heartbeat(asker: Asker) -> None:
    calls: list[tuple[PeerId, Sequence[str]]] = []

    async def dial_back(peer: PeerId, addresses: Sequence[str]) -> pb.DialBack:
        calls.append((peer, addresses))
        return said(addresses[:1])

    asker.exchange.dial_back = dial_back
    stranger, known = identity(5).peer_id, identity(6).peer_id
    request = pb.Request(dial_back=pb.DialBackRequest()).SerializeToString()
    reply = pb.Reply.FromString(await asker.exchange.answer(stranger, request))
    assert reply.refusal == Refusal.UNKNOWN_PEER.value
    assert not calls
    asker.engine.roster.hear(known, Heartbeat(0, 0, 0, ("/a", "/b")), 0, 1)
    reply = pb.Reply.FromString(await asker.exchange.answer(known, request))
    assert list(reply.dial_back.answered) == ["/a"]
    assert calls == [(known, ("/a", "/b"))]

    async def too_often(peer: PeerId, addresses: Sequence[str]) -> pb.DialBack:
        raise WireError(Refusal.OVERLOADED, "again")

    asker.exchange.dial_back = too_often
    reply = pb.Reply.FromString(await asker.exchange.answer(known, request))
    assert reply.refusal == Refusal.OVERLOADED.value


async def test_a_newer_protocol_is_noticed_once(asker: Asker, capsys: pytest.CaptureFixture[str]) -> None:
    exchange, ours = asker.exchange, limits.PROTOCOL_VERSION
    assert exchange.newest_protocol == ours
    for version in (ours, 0, ours + 1, ours, VERSION_MAX + 1):
        request = pb.Request(manifest=pb.ManifestRequest(protocol_version=version))
        await exchange.answer(identity(5).peer_id, request.SerializeToString())
    assert exchange.newest_protocol == ours + 1
    exchange.hear_version(ours + 5)
    assert exchange.newest_protocol == ours + 5
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("newer protocol") == 1
