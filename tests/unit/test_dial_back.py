"""Dialling back for a peer that asks: only where it is connected from, seldom, and with an honest answer."""

from __future__ import annotations

import asyncio

import pytest

from braniac.node import dial_back, transport_libp2p
from braniac.node.clock import FakeClock
from braniac.node.dial_back import ANSWERING_MAX, PAUSE_S, TRIED_MAX, DialBacks, is_global, is_relayed
from braniac.node.transport_libp2p import greets
from braniac.protocol import limits
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.identity import PeerId, peer_id_text
from tests.unit.node_harness import identity, until

ASKER, OTHER = identity(1).peer_id, identity(2).peer_id
SEEN = "203.0.113.7"


def at(host: str, port: int = 4001, peer: PeerId = ASKER, kind: str = "ip4") -> str:
    return f"/{kind}/{host}/tcp/{port}/p2p/{peer_id_text(peer)}"


class Prober:
    """Dial-backs over a network in which only some places answer."""

    def __init__(self, *seen: str, answering: tuple[tuple[str, int], ...] = ()) -> None:
        self.seen = list(seen)
        self.answering = answering
        self.tried: list[tuple[str, int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.clock = FakeClock()
        self.dial_backs = DialBacks(self._seen_from, self._probe, self.clock)

    async def _seen_from(self, peer: PeerId) -> list[str]:
        return self.seen

    async def _probe(self, host: str, port: int) -> bool:
        self.tried.append((host, port))
        await self.gate.wait()
        return (host, port) in self.answering


async def test_what_answers_and_what_does_not() -> None:
    prober = Prober(SEEN, answering=((SEEN, 4001),))
    reply = await prober.dial_backs.answer(ASKER, [at(SEEN), at(SEEN, 4002)])
    assert (list(reply.answered), list(reply.silent)) == ([at(SEEN)], [at(SEEN, 4002)])


@pytest.mark.parametrize(
    "address",
    [
        at("203.0.113.8"),  # somebody else's
        at("192.168.1.5"),  # in a network of ours, perhaps
        at("127.0.0.1"),
        at(SEEN, 22),  # a service that everybody has
        at(SEEN, dial_back.PORT_MIN - 1),
        at(SEEN, peer=OTHER),
        at("example.org", kind="dns4"),  # may lead anywhere
        f"/ip4/{SEEN}/udp/4001/quic-v1/p2p/{peer_id_text(ASKER)}",
        f"/ip4/{SEEN}/tcp/4001/p2p/{peer_id_text(OTHER)}/p2p-circuit/p2p/{peer_id_text(ASKER)}",
        "nonsense",
        "",
    ],
)
async def test_nobody_can_aim_it_elsewhere(address: str) -> None:
    prober = Prober(SEEN, answering=((SEEN, 4001),))
    reply = await prober.dial_backs.answer(ASKER, [address])
    assert not prober.tried
    assert not reply.answered
    assert not reply.silent


async def test_a_peer_of_the_same_private_network_is_tried_where_it_is() -> None:
    prober = Prober("192.168.1.5", answering=(("192.168.1.5", 4001),))
    reply = await prober.dial_backs.answer(ASKER, [at("192.168.1.5"), at("172.17.0.1")])
    assert list(reply.answered) == [at("192.168.1.5")]
    assert prober.tried == [("192.168.1.5", 4001)]


async def test_a_mapped_address_is_the_same_address() -> None:
    prober = Prober(f"::ffff:{SEEN}", answering=((SEEN, 4001),))
    assert (await prober.dial_backs.answer(ASKER, [at(SEEN)])).answered


async def test_who_is_not_connected_is_not_tried() -> None:
    prober = Prober()
    await prober.dial_backs.answer(ASKER, [at(SEEN)])
    assert not prober.tried


async def test_few_addresses_and_seldom() -> None:
    prober = Prober(SEEN)
    await prober.dial_backs.answer(ASKER, [at(SEEN, 4000 + n) for n in range(limits.ADDRESSES_MAX)])
    assert len(prober.tried) == TRIED_MAX
    with pytest.raises(WireError) as refused:
        await prober.dial_backs.answer(ASKER, [at(SEEN)])
    assert refused.value.refusal is Refusal.OVERLOADED
    await prober.dial_backs.answer(OTHER, [])
    prober.clock.advance(PAUSE_S)
    await prober.dial_backs.answer(ASKER, [at(SEEN)])
    assert len(prober.tried) == TRIED_MAX + 1


async def test_only_so_many_at_a_time() -> None:
    prober = Prober(SEEN)
    prober.gate.clear()
    async with asyncio.TaskGroup() as group:
        peers = [identity(n).peer_id for n in range(ANSWERING_MAX)]
        for peer in peers:
            group.create_task(prober.dial_backs.answer(peer, [at(SEEN, peer=peer)]))
        await until(lambda: len(prober.tried) == ANSWERING_MAX)
        with pytest.raises(WireError):
            await prober.dial_backs.answer(identity(99).peer_id, [])
        prober.gate.set()
    await prober.dial_backs.answer(identity(99).peer_id, [])


async def test_what_it_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROSTER_PEERS_MAX", 3)
    prober = Prober()
    for number in range(5):
        await prober.dial_backs.answer(identity(number).peer_id, [])
    assert len(prober.dial_backs._asked_s) == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [(b"\x13/multistream/1.0.0\n", True), (b"HTTP/1.1 400 Bad Request\r\n\r\n", False), (b"\x13/multi", False)],
)
async def test_the_greeting(words: bytes, expected: bool) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await greets("127.0.0.1", port) is expected
    assert not await greets("127.0.0.1", port), "nobody listens there any more"


async def test_one_who_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_libp2p, "PROBE_S", 0.05)
    ended = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        ended.set()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        assert not await greets("127.0.0.1", server.sockets[0].getsockname()[1])
        await asyncio.wait_for(ended.wait(), 60)  # the connection was closed


def test_kinds_of_addresses() -> None:
    relayed = f"/ip4/{SEEN}/tcp/4001/p2p/{peer_id_text(OTHER)}/p2p-circuit/p2p/{peer_id_text(ASKER)}"
    assert is_relayed(relayed)
    assert not is_relayed(at(SEEN))
    assert is_global(at("8.8.8.8"))
    assert is_global(at("example.org", kind="dns4")), "a name may lead here"
    assert not is_global(at("192.168.1.5"))
    assert not is_global(relayed)
    assert not is_global("nonsense")
