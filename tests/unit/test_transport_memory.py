"""The in-memory network: the transport contract, every fault it can make, and parsing of addresses."""

import asyncio
import contextlib
import random

import pytest

from braniac.node.errors import ConfigError
from braniac.node.transport import (
    Bounds,
    Handler,
    Reason,
    Refused,
    Transport,
    Unreachable,
    parse_address,
    split_host_port,
)
from braniac.node.transport_memory import MemoryNetwork, MemoryTransport
from braniac.protocol.identity import Identity, PeerId, peer_id_text
from braniac.protocol.limits import MESSAGE_BYTES_MAX

ALICE, BOB, CAROL = (Identity.from_seed(bytes([number]) * 32).peer_id for number in (1, 2, 3))
BOB_TEXT = peer_id_text(BOB)


async def echo(peer: PeerId, request: bytes) -> bytes:
    return b"echo " + request


async def never(peer: PeerId, request: bytes) -> bytes:
    await asyncio.Event().wait()
    raise AssertionError("an event that nobody sets")


async def pair(network: MemoryNetwork, handler: Handler) -> tuple[MemoryTransport, MemoryTransport]:
    alice, bob = network.join(ALICE), network.join(BOB)
    await bob.serve(handler)
    return alice, bob


async def refusal(transport: Transport, peer: PeerId, request: bytes = b"?", timeout_s: float = 5.0) -> Unreachable:
    with pytest.raises(Unreachable) as caught:
        await transport.call(peer, request, timeout_s=timeout_s)
    assert caught.value.peer == peer
    return caught.value


async def test_a_call_brings_the_reply_and_counts() -> None:
    alice, bob = await pair(MemoryNetwork(), echo)
    assert await alice.call(BOB, b"hi", timeout_s=1) == b"echo hi"
    assert (alice.traffic.sent_bytes, alice.traffic.received_bytes) == (2, 7)
    assert (bob.traffic.sent_bytes, bob.traffic.received_bytes) == (7, 2)
    assert alice.traffic.calls == {"ok": 1}
    assert bob.traffic.answers == {"ok": 1}


async def test_the_handler_learns_who_asks() -> None:
    async def who(peer: PeerId, request: bytes) -> bytes:
        return peer

    alice, _ = await pair(MemoryNetwork(), who)
    assert await alice.call(BOB, b"", timeout_s=1) == ALICE


async def test_protocols_are_apart() -> None:
    alice, bob = await pair(MemoryNetwork(), echo)
    await bob.serve(never, protocol="other")
    assert await alice.call(BOB, b"1", timeout_s=1) == b"echo 1"
    error = await refusal(bob, ALICE)
    assert (error.reason, error.detail) == (Reason.REFUSED, "unknown")


async def test_a_handlers_error_stays_at_home() -> None:
    async def fail(peer: PeerId, request: bytes) -> bytes:
        raise ValueError("a secret path")

    alice, bob = await pair(MemoryNetwork(), fail)
    error = await refusal(alice, BOB)
    assert error.reason is Reason.REFUSED
    assert "secret" not in str(error)
    assert bob.traffic.answers == {"failed": 1}


async def test_sizes_are_bounded_both_ways() -> None:
    async def big(peer: PeerId, request: bytes) -> bytes:
        return bytes(MESSAGE_BYTES_MAX + len(request))

    alice, bob = await pair(MemoryNetwork(), big)
    assert len(await alice.call(BOB, b"", timeout_s=1)) == MESSAGE_BYTES_MAX
    assert (await refusal(alice, BOB, b"1")).reason is Reason.REFUSED
    assert (await refusal(alice, BOB, bytes(MESSAGE_BYTES_MAX + 1))).reason is Reason.OVERSIZE
    with pytest.raises(Refused, match="oversize"):
        await bob.answer(ALICE, bytes(MESSAGE_BYTES_MAX + 1), "/braniac/exchange/1")


async def test_a_handler_that_never_answers_times_out() -> None:
    alice, _ = await pair(MemoryNetwork(), never)
    error = await refusal(alice, BOB, timeout_s=0.01)
    assert error.reason is Reason.TIMEOUT
    assert alice.traffic.calls == {"timeout": 1}


async def test_an_answer_has_a_deadline_of_its_own() -> None:
    network = MemoryNetwork()
    alice, bob = network.join(ALICE), network.join(BOB, Bounds(answer_s=0.01))
    await bob.serve(never)
    error = await refusal(alice, BOB)
    assert (error.reason, error.detail) == (Reason.REFUSED, "slow")


async def test_calls_at_a_time_are_bounded_per_peer_and_in_all() -> None:
    network = MemoryNetwork()
    alice, carol = network.join(ALICE), network.join(CAROL)
    bob = network.join(BOB, Bounds(calls_max=3, calls_per_peer_max=2))
    started: asyncio.Queue[PeerId] = asyncio.Queue()
    release = asyncio.Event()

    async def wait(peer: PeerId, request: bytes) -> bytes:
        started.put_nowait(peer)
        await release.wait()
        return b""

    await bob.serve(wait)
    async with asyncio.TaskGroup() as group:
        for caller in (alice, alice, carol):
            group.create_task(caller.call(BOB, b"", timeout_s=5))
            await started.get()
        assert (await refusal(alice, BOB)).detail == "busy"
        assert (await refusal(carol, BOB)).detail == "busy"
        release.set()
    assert await alice.call(BOB, b"", timeout_s=1) == b""
    assert bob.traffic.answers == {"ok": 4, "busy": 2}


async def test_a_cut_is_one_way() -> None:
    network = MemoryNetwork()
    served = []

    async def note(peer: PeerId, request: bytes) -> bytes:
        served.append(request)
        return b""

    alice, bob = await pair(network, note)
    await alice.serve(note)
    network.cut(ALICE, BOB)
    assert (await refusal(alice, BOB, b"lost on the way")).reason is Reason.TIMEOUT
    assert served == []
    assert (await refusal(bob, ALICE, b"reply lost")).reason is Reason.TIMEOUT
    assert served == [b"reply lost"]
    network.mend(ALICE, BOB)
    assert await alice.call(BOB, b"", timeout_s=1) == b""


async def test_a_suspended_peer_never_answers() -> None:
    network = MemoryNetwork()
    alice, _ = await pair(network, echo)
    network.suspend(BOB)
    assert (await refusal(alice, BOB)).reason is Reason.TIMEOUT
    network.resume(BOB)
    assert await alice.call(BOB, b"", timeout_s=1) == b"echo "


async def test_loss_follows_the_seed() -> None:
    async def outcomes(seed: int) -> list[str]:
        alice, _ = await pair(MemoryNetwork(loss=0.3, rng=random.Random(seed)), echo)
        results = await asyncio.gather(*(alice.call(BOB, b"", timeout_s=1) for _ in range(50)), return_exceptions=True)
        return [type(result).__name__ for result in results]

    first = await outcomes(1)
    assert first == await outcomes(1)
    assert first != await outcomes(2)
    assert 10 < first.count("Unreachable") < 40  # about half: a request and a reply both have to arrive


async def test_delays_and_deadlines_go_through_the_given_sleep() -> None:
    slept = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    network = MemoryNetwork(delay_s=0.25, sleep=sleep)
    alice, _ = await pair(network, echo)
    await alice.call(BOB, b"", timeout_s=7)
    network.suspend(BOB)
    await refusal(alice, BOB, timeout_s=7)
    assert slept == [0.25, 0.25, 0.25, 7]


async def test_failing_ends_calls_in_flight_on_both_sides() -> None:
    network = MemoryNetwork()
    alice, bob = await pair(network, never)
    await alice.serve(never)
    reasons = []

    async def call(caller: MemoryTransport, peer: PeerId) -> None:
        reasons.append((await refusal(caller, peer)).reason)

    async with asyncio.TaskGroup() as group:
        group.create_task(call(alice, BOB))
        group.create_task(call(bob, ALICE))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        bob.fail()
        await bob.wait_failed()
    assert sorted(reasons) == [Reason.CLOSED, Reason.LOST]
    assert (await refusal(bob, ALICE)).reason is Reason.CLOSED
    assert (await refusal(alice, BOB)).reason is Reason.UNDIALABLE


async def test_a_peer_may_come_back_elsewhere() -> None:
    network = MemoryNetwork()
    alice, bob = await pair(network, echo)
    [old] = bob.addresses()
    await bob.close()
    await bob.close()
    reborn = network.join(BOB)
    await reborn.serve(echo)
    assert await alice.connect(*reborn.addresses(), timeout_s=1) == BOB
    with pytest.raises(Unreachable) as caught:
        await alice.connect(old, timeout_s=1)
    assert (caught.value.reason, caught.value.address) == (Reason.UNDIALABLE, old)
    assert await alice.call(BOB, b"", timeout_s=1) == b"echo "


async def test_addresses_can_be_parsed_and_dialled() -> None:
    alice, bob = await pair(MemoryNetwork(), echo)
    [address] = bob.addresses()
    assert parse_address(address)[0] == BOB
    assert await alice.connect(address, timeout_s=1) == BOB
    with pytest.raises(ConfigError):
        await alice.connect("nonsense", timeout_s=1)


@pytest.mark.parametrize(
    "bare",
    [
        "/ip4/127.0.0.1/tcp/4001",
        "/ip6/::1/tcp/1",
        "/ip4/1.2.3.4/udp/4001/quic-v1",
        "/dns4/example.org/tcp/443/ws",
        "/dns/example.org/tcp/1",
        f"/ip4/1.2.3.4/tcp/1/p2p/{peer_id_text(ALICE)}/p2p-circuit",
    ],
)
def test_good_addresses(bare: str) -> None:
    assert parse_address(f"{bare}/p2p/{BOB_TEXT}") == (BOB, bare)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "example.org:4001",
        "/ip4/127.0.0.1/tcp/4001",
        f"/p2p/{BOB_TEXT}",
        f"/ip4/127.0.0.1/p2p/{BOB_TEXT}",
        f"/ip4/127.0.0.1/tcp/0/p2p/{BOB_TEXT}",
        f"/ip4/127.0.0.1/tcp/70000/p2p/{BOB_TEXT}",
        f"/ip4/127.0.0.300/tcp/1/p2p/{BOB_TEXT}",
        f"/unix/etc/passwd/p2p/{BOB_TEXT}",
        f"/ip4/127.0.0.1/tcp/4001/p2p/{BOB_TEXT[:-1]}",
        f"/ip4/127.0.0.1/tcp/4001/p2p/{BOB_TEXT}/",
        "/ip4/127.0.0.1/tcp/4001/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # an RSA peer
        f"/ip4/1.2.3.4/tcp/1/p2p/{BOB_TEXT}/p2p-circuit/p2p/{BOB_TEXT}",
        f"/ip4/1.2.3.4/tcp/1/p2p/{peer_id_text(ALICE)}/p2p/{BOB_TEXT}",
        f"/ip4/1.2.3.4/tcp/1/p2p/nobody/p2p-circuit/p2p/{BOB_TEXT}",
        f"/p2p/{peer_id_text(ALICE)}/p2p-circuit/p2p/{BOB_TEXT}",
        f"/dns4/{'a' * 300}/tcp/1/p2p/{BOB_TEXT}",
        f"/ip4/127.0.0.1/tcp/4001\0/p2p/{BOB_TEXT}",
        "/ip4/\udcff/tcp/4001/p2p/x",
    ],
)
def test_wrong_addresses_get_a_sentence_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="write it like /ip4/203"):
        parse_address(text)


def test_random_text_is_refused_and_nothing_else() -> None:
    rng = random.Random(5)
    words = ["ip4", "ip6", "ip6zone", "dns4", "tcp", "udp", "p2p", "p2p-circuit", "quic-v1", "certhash", "onion3"]
    words += ["unix", "ws", "http", "sni", "memory", "1.2.3.4", "::", "65535", "-1", "", "xn--", ".", "a" * 70]
    words += ["\N{SNOWMAN}", BOB_TEXT]
    accepted = 0
    for _ in range(3000):
        text = rng.choice(["/", "/ip4/1.2.3.4/tcp/1/"]) + "/".join(rng.choices(words, k=rng.randrange(1, 5)))
        with contextlib.suppress(ValueError):
            accepted += bool(split_host_port(text))
    assert accepted > 0
