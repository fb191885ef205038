"""The real thing: libp2p daemons on the loopback interface, their deaths, and the directory between them."""

import asyncio
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from braniac.node.clock import SystemClock
from braniac.node.dial_back import DialBacks
from braniac.node.directory import Directory, Record
from braniac.node.errors import ConfigError, ResourceError
from braniac.node.identity_file import load
from braniac.node.p2pd import P2pd, P2pdOptions, P2PHandlerError
from braniac.node.transport import EXCHANGE, Bounds, Reason, Unreachable, parse_address, split_host_port
from braniac.node.transport_libp2p import LibP2PTransport
from braniac.protocol.identity import Identity, PeerId
from braniac.protocol.limits import ADDRESSES_MAX, MESSAGE_BYTES_MAX

RUN = bytes(range(32))
Start = Callable[..., Awaitable[LibP2PTransport]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Starts transports by name (a name is an identity); afterwards checks that nothing is left of them."""
    sockets = Path(tempfile.mkdtemp(prefix="b-"))
    transports: list[LibP2PTransport] = []

    async def start_one(name: str, bounds: Bounds | None = None, **options: Any) -> LibP2PTransport:
        transport = await LibP2PTransport.start(
            tmp_path / name, P2pdOptions(socket_dir=sockets, **options), bounds or Bounds()
        )
        transports.append(transport)
        return transport

    yield start_one
    for transport in transports:
        await transport.close()
        await transport.wait_failed()
    async with asyncio.timeout(5):  # hivemind's own DHT tasks only have to notice that their calls failed
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)
    assert not any(psutil.pid_exists(transport.daemon_pid) for transport in transports)
    os.rmdir(sockets)  # it is empty


async def echo(peer: PeerId, request: bytes) -> bytes:
    return request


async def never(peer: PeerId, request: bytes) -> bytes:
    await asyncio.Event().wait()
    raise AssertionError("an event that nobody sets")


async def failure(call: Awaitable[object]) -> Unreachable:
    with pytest.raises(Unreachable) as caught:
        await call
    return caught.value


async def test_calls_both_ways_over_one_connection(start: Start) -> None:
    alice, bob = await asyncio.gather(start("alice"), start("bob"))

    async def who(peer: PeerId, request: bytes) -> bytes:
        return peer

    await alice.serve(who)
    await bob.serve(who)
    [address] = bob.addresses()
    assert (await failure(alice.call(bob.peer_id, b"?", timeout_s=5))).reason is Reason.UNDIALABLE
    assert await alice.connect(address, timeout_s=5) == bob.peer_id
    assert await alice.call(bob.peer_id, b"?", timeout_s=5) == alice.peer_id
    assert await bob.call(alice.peer_id, b"?", timeout_s=5) == bob.peer_id
    assert bob.traffic.answers == {"ok": 1}
    assert alice.traffic.calls == {"undialable": 1, "ok": 1}
    assert alice.addresses()[0].endswith(f"/p2p/{address_id(alice)}")
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)


def address_id(transport: LibP2PTransport) -> str:
    return transport.addresses()[0].rpartition("/")[2]


async def test_messages_of_one_mebibyte_and_not_more(start: Start) -> None:
    alice, bob = await asyncio.gather(start("alice"), start("bob"))

    async def longer(peer: PeerId, request: bytes) -> bytes:
        return request + b"x" * (len(request) % 2)

    await bob.serve(longer)
    await alice.connect(*bob.addresses(), timeout_s=5)
    message = os.urandom(MESSAGE_BYTES_MAX)
    assert await alice.call(bob.peer_id, message, timeout_s=10) == message
    assert (await failure(alice.call(bob.peer_id, message + b"x", timeout_s=10))).reason is Reason.OVERSIZE
    with pytest.raises(P2PHandlerError, match="oversize"):  # from a sender that keeps no rules
        await alice._daemon.call(bob.peer_id, EXCHANGE, message + b"x")
    assert bob.traffic.answers == {"ok": 1, "oversize": 1}


async def test_replies_over_the_limit_are_not_believed(start: Start) -> None:
    alice, bob = await asyncio.gather(start("alice"), start("bob"))

    async def rogue(peer: bytes, request: bytes) -> bytes:
        return bytes(MESSAGE_BYTES_MAX + 1)

    await bob._daemon.serve(EXCHANGE, rogue)
    await alice.connect(*bob.addresses(), timeout_s=5)
    assert (await failure(alice.call(bob.peer_id, b"", timeout_s=10))).reason is Reason.OVERSIZE


async def test_refusals_tell_one_known_word(start: Start) -> None:
    alice, bob = await asyncio.gather(start("alice"), start("bob", Bounds(calls_per_peer_max=1)))
    running = asyncio.Event()

    async def misbehave(peer: PeerId, request: bytes) -> bytes:
        if request == b"hang":
            running.set()
            await never(peer, request)
        raise ValueError("a secret")

    async def rogue(peer: bytes, request: bytes) -> bytes:
        raise ValueError("evil words")

    await alice.connect(*bob.addresses(), timeout_s=5)
    error = await failure(alice.call(bob.peer_id, b"", timeout_s=5))
    assert error.reason is Reason.REFUSED  # nothing is served yet
    await bob.serve(misbehave)
    error = await failure(alice.call(bob.peer_id, b"", timeout_s=5))
    assert (error.reason, error.detail) == (Reason.REFUSED, "failed")
    hanging = asyncio.create_task(failure(alice.call(bob.peer_id, b"hang", timeout_s=5)))
    await running.wait()
    assert (await failure(alice.call(bob.peer_id, b"", timeout_s=5))).detail == "busy"
    await bob._daemon.serve("rogue", rogue)
    assert "evil" not in str(await failure(alice.call(bob.peer_id, b"", timeout_s=5, protocol="rogue")))
    await alice.close()
    assert (await hanging).reason is Reason.CLOSED


async def test_a_handler_that_never_answers_times_out_and_is_cancelled_there(start: Start) -> None:
    alice, bob = await asyncio.gather(start("alice"), start("bob"))
    cancelled = asyncio.Event()

    async def hang(peer: PeerId, request: bytes) -> bytes:
        try:
            return await never(peer, request)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    await bob.serve(hang)
    await alice.connect(*bob.addresses(), timeout_s=5)
    for _ in range(3):
        assert (await failure(alice.call(bob.peer_id, b"", timeout_s=0.05))).reason is Reason.TIMEOUT
    await asyncio.wait_for(cancelled.wait(), 5)
    await bob.serve(echo, protocol="echo")
    assert await alice.call(bob.peer_id, b"x", timeout_s=5, protocol="echo") == b"x"
    assert len(bob._daemon._calls._handler_tasks) <= 1  # hivemind alone would keep them all


async def test_a_killed_daemon_fails_its_own_calls_and_its_callers(start: Start) -> None:
    alice, bob = await asyncio.gather(start("alice"), start("bob"))
    both = asyncio.Event()

    async def hang(peer: PeerId, request: bytes) -> bytes:
        if request == b"second":
            both.set()
        return await never(peer, request)

    await alice.serve(hang)
    await bob.serve(hang)
    await alice.connect(*bob.addresses(), timeout_s=5)
    async with asyncio.TaskGroup() as group:
        theirs = group.create_task(failure(alice.call(bob.peer_id, b"first", timeout_s=60)))
        own = group.create_task(failure(bob.call(alice.peer_id, b"second", timeout_s=60)))
        await both.wait()
        os.kill(bob.daemon_pid, signal.SIGKILL)
        await asyncio.wait_for(bob.wait_failed(), 5)
    assert (theirs.result().reason, own.result().reason) == (Reason.LOST, Reason.CLOSED)
    assert (await failure(bob.call(alice.peer_id, b"", timeout_s=60))).reason is Reason.CLOSED
    assert (await failure(alice.call(bob.peer_id, b"", timeout_s=5))).reason is Reason.UNDIALABLE


async def test_after_a_restart_at_another_port_the_remembered_address_leads_back(start: Start) -> None:
    alice, bob = await asyncio.gather(start("alice"), start("bob"))
    await bob.serve(echo)
    await alice.connect(*bob.addresses(), timeout_s=5)
    assert await alice.call(bob.peer_id, b"1", timeout_s=5) == b"1"
    os.kill(bob.daemon_pid, signal.SIGKILL)
    await bob.wait_failed()
    await bob.close()
    reborn = await start("bob")
    await reborn.serve(echo)
    assert reborn.peer_id == bob.peer_id
    assert reborn.addresses() != bob.addresses()
    await failure(alice.call(bob.peer_id, b"2", timeout_s=5))
    alice.remember(bob.peer_id, ["nonsense", *alice.addresses(), *reborn.addresses()])
    assert await alice.call(bob.peer_id, b"3", timeout_s=5) == b"3"


async def test_what_peers_claim_about_addresses_is_bounded(start: Start) -> None:
    alice = await start("alice")
    someone = Identity.from_seed(bytes(32)).peer_id
    alice.remember(someone, ["", "/", *alice.addresses()])
    assert someone not in alice._remembered
    alice.remember(alice.peer_id, alice.addresses() * 100)
    assert len(alice._remembered[alice.peer_id]) == ADDRESSES_MAX


async def test_wrong_addresses_and_dead_ones_are_told_apart(start: Start) -> None:
    alice, bob = await asyncio.gather(start("alice"), start("bob"))
    [address] = bob.addresses()
    await bob.close()
    error = await failure(alice.connect(address, timeout_s=5))
    assert (error.reason, error.address) == (Reason.UNDIALABLE, address)
    with pytest.raises(ConfigError, match="write it like"):
        await alice.connect("/ip4/127.0.0.1/tcp/1", timeout_s=5)


async def test_someone_else_at_the_address_is_not_the_peer(start: Start) -> None:
    alice, bob, carol = await asyncio.gather(*(start(name) for name in ("alice", "bob", "carol")))
    bobs, carols = bob.addresses()[0].split("/p2p/"), carol.addresses()[0].split("/p2p/")
    assert (await failure(alice.connect(f"{bobs[0]}/p2p/{carols[1]}", timeout_s=5))).reason is Reason.UNDIALABLE


async def test_an_rsa_peer_is_refused(start: Start) -> None:
    alice = await start("alice")
    await alice.serve(echo)
    handler = alice._daemon._calls.unary_handlers[EXCHANGE]

    class RsaId:
        def to_bytes(self) -> bytes:
            return bytes.fromhex("1220") + bytes(32)

    with pytest.raises(Exception, match="unknown"):
        await handler(b"", RsaId())
    assert alice.traffic.answers == {"unknown": 1}


@pytest.mark.parametrize("address", ["127.0.0.1:4001", "/dns4/localhost/tcp/1", "/ip4/127.0.0.1", ""])
async def test_listening_needs_a_proper_address(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"):
        await LibP2PTransport.start(tmp_path / "key", P2pdOptions(listen=[address]))


async def test_announcing_needs_a_port(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot announce"):
        await LibP2PTransport.start(tmp_path / "key", P2pdOptions(announce=["/ip4/203.0.113.7/tcp/0"]))


async def test_a_port_in_use_is_one_sentence(start: Start) -> None:
    alice = await start("alice")
    bare, _, _ = alice.addresses()[0].partition("/p2p/")
    with pytest.raises(ResourceError, match=r"port \d+ is in use"):
        await start("bob", listen=[bare])  # another daemon would share it in silence
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        with pytest.raises(ResourceError, match="is in use"):
            await start("bob", listen=[f"/ip4/127.0.0.1/tcp/{other.getsockname()[1]}"])


async def test_a_daemon_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"not a key")
    with pytest.raises(ResourceError, match="did not start"):
        await P2pd.start(tmp_path / "key", P2pdOptions(socket_dir=tmp_path))
    assert os.listdir(tmp_path) == ["key"]


async def test_a_socket_path_too_long_or_missing_is_one_sentence(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    with pytest.raises(ResourceError, match="cannot make a directory"):
        await P2pd.start(tmp_path / "key", P2pdOptions(socket_dir=deep))
    deep.mkdir()
    with pytest.raises(ResourceError, match="too long for a socket"):
        await P2pd.start(tmp_path / "key", P2pdOptions(socket_dir=deep))
    assert os.listdir(deep) == []


async def test_announced_addresses_replace_the_found_ones(start: Start) -> None:
    alice = await start("alice", announce=["/ip4/203.0.113.7/tcp/31337"])
    assert [address.partition("/p2p/")[0] for address in alice.addresses()] == ["/ip4/203.0.113.7/tcp/31337"]


async def test_sockets_are_private(start: Start, tmp_path: Path) -> None:
    alice = await start("alice")
    assert stat.S_IMODE(alice._daemon._directory.stat().st_mode) == 0o700
    assert load(tmp_path / "alice").peer_id == alice.peer_id


def test_the_daemon_does_not_outlive_a_killed_node(tmp_path: Path) -> None:
    program = f"""
import asyncio, pathlib
from braniac.node.p2pd import P2pdOptions
from braniac.node.transport_libp2p import LibP2PTransport

async def main():
    path = pathlib.Path({str(tmp_path)!r})
    transport = await LibP2PTransport.start(path / "key", P2pdOptions(socket_dir=path))
    print("daemon:", transport.daemon_pid, flush=True)
    await transport.wait_failed()

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        try:
            said = next(line for line in child.stdout if line.startswith("daemon:"))
            daemon = psutil.Process(int(said.split()[1]))
        finally:
            child.kill()
    daemon.wait(timeout=10)


def test_hivemind_does_not_print() -> None:
    assert logging.getLogger("hivemind").handlers == []
    assert logging.getLevelName(logging.WARNING) == "WARNING"


async def directories(start: Start, tmp_path: Path, names: str) -> list[tuple[LibP2PTransport, Directory]]:
    """Nodes in a row, each of which knows only the first."""
    nodes = []
    for name in names:
        transport = await start(name)
        directory = await Directory.create(transport, RUN, load(tmp_path / name), SystemClock())
        nodes.append((transport, directory))
        if len(nodes) > 1:
            first, _ = nodes[0]
            await transport.connect(*first.addresses(), timeout_s=5)
            assert await directory.bootstrap([first.peer_id]) == 1
    return nodes


async def test_three_nodes_find_each_other(start: Start, tmp_path: Path) -> None:
    (_, directory_a), (b, directory_b), (c, directory_c) = await directories(start, tmp_path, "abc")
    record_b = Record(tuple(b.addresses()), tier=2, version=1)
    record_c = Record(tuple(c.addresses()), tier=3, version=1)
    assert await directory_b.announce(record_b, ttl_s=60)
    assert await directory_c.announce(record_c, ttl_s=60)
    assert await directory_a.find() == {b.peer_id: record_b, c.peer_id: record_c}
    assert await directory_b.find() == {c.peer_id: record_c}
    newer = Record(tuple(b.addresses()), tier=0, version=1)
    assert await directory_b.announce(newer, ttl_s=60)
    assert (await directory_c.find())[b.peer_id] == newer
    assert await directory_a.bootstrap([b.peer_id, Identity.from_seed(bytes(32)).peer_id]) == 1


async def test_a_forged_record_is_rejected_and_the_true_one_stays(start: Start, tmp_path: Path) -> None:
    (_, directory_a), (b, directory_b), (_, directory_c) = await directories(start, tmp_path, "abc")
    record = Record(tuple(b.addresses()), tier=2, version=1)
    assert await directory_b.announce(record, ttl_s=60)
    forger = directory_c._node
    for subkey, value in [(bytes(b.peer_id), record.encode()), (None, b"wipe"), (b"junk", b"junk")]:
        stored = await forger.store(directory_c._key, value, SystemClock().wall() + 90, subkey=subkey)
        assert not stored
    assert await directory_a.find() == {b.peer_id: record}


async def test_over_a_dead_transport_the_directory_does_not_hang(start: Start, tmp_path: Path) -> None:
    (a, directory_a), (_, directory_b) = await directories(start, tmp_path, "ab")
    await directory_b.announce(Record((), tier=0, version=1), ttl_s=60)
    os.kill(a.daemon_pid, signal.SIGKILL)
    await a.wait_failed()
    assert await asyncio.wait_for(directory_a.bootstrap([a.peer_id]), 5) == 0
    await asyncio.wait_for(directory_a.find(), 5)


# --- seen from outside -----------------------------------------------------------------------------------------------


async def test_a_peer_that_can_be_dialled_is_told_so(start: Start) -> None:
    """The question travels over the connection that the asker opened; the answer comes from looking past it."""
    alice, bob = await asyncio.gather(start("alice"), start("bob"))
    await bob.connect(*alice.addresses(), timeout_s=5)
    assert await alice.seen_from(bob.peer_id) == ["127.0.0.1"]
    assert await alice.seen_from(Identity.from_seed(bytes(32)).peer_id) == []
    [address] = bob.addresses()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        deaf = address.replace(f"/tcp/{port_of(address)}/", f"/tcp/{silent.getsockname()[1]}/")
        reply = await DialBacks(alice.seen_from, alice.probe, SystemClock()).answer(bob.peer_id, [address, deaf])
    assert (list(reply.answered), list(reply.silent)) == ([address], [deaf])


def port_of(address: str) -> int:
    return split_host_port(parse_address(address)[1])[1]
