"""Directory records: what is signed, what is refused, how much is kept; and a small DHT in memory."""

import asyncio
import dataclasses
import json
import math
import random
from dataclasses import dataclass
from typing import Any

import pytest

from braniac.node.clock import FakeClock, SystemClock
from braniac.node.directory import RECORD_BYTES_MAX, RECORDS_MAX, TTL_S_MAX, Directory, Record, RecordValidator
from braniac.node.transport_memory import MemoryNetwork, MemoryTransport
from braniac.protocol.identity import Identity, PeerId, peer_id_text
from braniac.protocol.limits import ADDRESSES_MAX

KEY = bytes(20)
RUN = bytes(range(32))


@dataclass(frozen=True)
class DhtRecord:
    """hivemind's DHTRecord."""

    key: Any
    subkey: Any
    value: Any
    expiration_time: Any


def identity(number: int) -> Identity:
    return Identity.from_seed(number.to_bytes(32))


def address(peer: PeerId, port: int = 4001) -> str:
    return f"/ip4/203.0.113.7/tcp/{port}/p2p/{peer_id_text(peer)}"


def packed(data: bytes) -> bytes:
    header = b"\xc4" + len(data).to_bytes(1) if len(data) < 256 else b"\xc5" + len(data).to_bytes(2)
    return header + data


def signed(
    owner: Identity, clock: FakeClock, data: bytes | None = None, ttl_s: float = 60.0, key: bytes = KEY
) -> DhtRecord:
    """A record as `owner`'s node would store it."""
    data = Record((address(owner.peer_id),), tier=2, version=1).encode() if data is None else data
    record = DhtRecord(key, packed(owner.peer_id), packed(data), clock.wall() + ttl_s)
    return dataclasses.replace(record, value=RecordValidator(owner, KEY, clock).sign_value(record))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def validator(clock: FakeClock) -> RecordValidator:
    return RecordValidator(identity(1), KEY, clock)


def test_a_signed_record_is_valid_and_stripped(clock: FakeClock, validator: RecordValidator) -> None:
    record = signed(identity(2), clock)
    assert validator.validate(record)
    assert validator.validate(record)
    data = validator.strip_value(record)[2:]
    assert Record.decode(identity(2).peer_id, data) == Record((address(identity(2).peer_id),), 2, 1)


def test_any_change_is_refused(clock: FakeClock, validator: RecordValidator) -> None:
    record = signed(identity(2), clock)
    other = packed(identity(3).peer_id)
    for changes in (
        {"key": bytes([1]) * 20},
        {"subkey": other},
        {"expiration_time": record.expiration_time + 1},
        {"value": record.value[:-1] + bytes([record.value[-1] ^ 1])},
        {"value": signed(identity(2), clock, b"[[],3,1]").value[:10] + record.value[10:]},
    ):
        assert not validator.validate(dataclasses.replace(record, **changes))
    assert validator.validate(record)


def test_ours_cannot_be_signed_for_another(clock: FakeClock, validator: RecordValidator) -> None:
    record = DhtRecord(KEY, packed(identity(2).peer_id), packed(b"[[],0,1]"), clock.wall() + 60)
    assert validator.sign_value(record) == record.value


def test_a_record_of_another_run_is_refused(clock: FakeClock, validator: RecordValidator) -> None:
    assert not validator.validate(signed(identity(2), clock, key=bytes([1]) * 20))


def test_lifetimes_are_bounded_but_skewed_clocks_are_served(clock: FakeClock, validator: RecordValidator) -> None:
    assert validator.validate(signed(identity(2), clock, ttl_s=3600 + 60))  # their clock, or ours, is an hour off
    assert not validator.validate(signed(identity(3), clock, ttl_s=TTL_S_MAX + 1))
    assert validator.validate(signed(identity(4), clock, ttl_s=-1.0))  # or hivemind would drop all that came with it
    for ttl_s in (math.nan, math.inf, -math.inf, -1e12):
        assert not validator.validate(signed(identity(5), clock, ttl_s=ttl_s))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"[[],0]",
        b"[[],0,1,2]",
        b"[{},0,1]",
        b'["abc",0,1]',
        b"[[],-1,1]",
        b"[[],16,1]",
        b"[[],true,1]",
        b"[[],0,1.5]",
        b"[[],0,65537]",
        b'[["/ip4/1.2.3.4/tcp/1"],0,1]',
        b"[[1],0,1]",
        b"[" * 1000,
        b"\xff\xfe",
        json.dumps([[address(identity(3).peer_id)], 0, 1]).encode(),  # where somebody else is
        json.dumps([[address(identity(2).peer_id)] * (ADDRESSES_MAX + 1), 0, 1]).encode(),
        b"[[],0,1]" + b" " * RECORD_BYTES_MAX,
    ],
)
def test_malformed_content_is_refused_even_when_signed(
    clock: FakeClock, validator: RecordValidator, data: bytes
) -> None:
    assert not validator.validate(signed(identity(2), clock, data))


def test_values_of_any_type_are_refused_without_an_exception(clock: FakeClock, validator: RecordValidator) -> None:
    good = signed(identity(2), clock)
    things: list[Any] = [None, 0, -1, 1e400, "text", b"", b"\xc4", b"\xc5\xff", [], {}, (1, 2), bytes(100), bytes(5000)]
    for thing in things:
        assert not validator.validate(dataclasses.replace(good, value=thing))
        assert not validator.validate(dataclasses.replace(good, expiration_time=thing))
        if isinstance(thing, bytes):
            assert not validator.validate(dataclasses.replace(good, subkey=thing))
            assert not validator.validate(dataclasses.replace(good, key=thing))


def test_random_damage_is_refused_without_an_exception(clock: FakeClock, validator: RecordValidator) -> None:
    rng = random.Random(3)
    good = signed(identity(2), clock)
    for _ in range(300):
        value = bytearray(good.value)
        for _ in range(rng.randrange(1, 4)):
            value[rng.randrange(len(value))] ^= rng.randrange(1, 256)
        assert not validator.validate(dataclasses.replace(good, value=bytes(value[: rng.randrange(len(value) + 1)])))


def test_a_byte_string_has_one_spelling(clock: FakeClock, validator: RecordValidator) -> None:
    owner = identity(2)
    data = b"[[],0,1]"
    long_form = DhtRecord(KEY, packed(owner.peer_id), b"\xc5\x00\x08" + data, clock.wall() + 60)
    value = RecordValidator(owner, KEY, clock).sign_value(long_form)
    assert not validator.validate(dataclasses.replace(long_form, value=value))


def test_at_most_so_many_peers_until_some_expire(clock: FakeClock, validator: RecordValidator) -> None:
    for number in range(RECORDS_MAX):
        assert validator.validate(signed(identity(number), clock, b"[[],0,1]"))
    late = signed(identity(RECORDS_MAX), clock, b"[[],0,1]", ttl_s=120)
    assert not validator.validate(late)
    assert validator.validate(signed(identity(5), clock, b"[[],1,1]", ttl_s=61))  # a known peer may renew
    clock.advance(60.5)
    assert validator.validate(late)


def test_addresses_that_do_not_fit_are_left_out() -> None:
    peer = identity(2).peer_id
    addresses = tuple(
        f"/dns4/{'a' * 60}.{'b' * 60}.example/tcp/{port}/p2p/{peer_id_text(peer)}" for port in range(1, 9)
    )
    data = Record(addresses, tier=0, version=1).encode()
    assert len(data) <= RECORD_BYTES_MAX
    kept = Record.decode(peer, data).addresses
    assert 3 <= len(kept) < 8
    assert kept == addresses[: len(kept)]


async def node(network: MemoryNetwork, number: int) -> tuple[MemoryTransport, Directory]:
    transport = network.join(identity(number).peer_id)
    return transport, await Directory.create(transport, RUN, identity(number), SystemClock())


async def test_a_directory_works_over_any_transport() -> None:
    network = MemoryNetwork()
    (a, directory_a), (b, directory_b), (c, directory_c) = [await node(network, number) for number in (1, 2, 3)]
    assert await directory_a.find() == {}
    record = Record((address(a.peer_id),), tier=1, version=1)
    assert await directory_a.announce(record, ttl_s=60)  # alone: kept here, and handed to whoever comes
    assert await directory_b.bootstrap([a.peer_id]) == 1
    assert await directory_c.bootstrap([a.peer_id, identity(9).peer_id]) == 1
    assert await directory_c.find() == {a.peer_id: record}
    network.suspend(a.peer_id)
    assert await directory_c.find() in ({}, {a.peer_id: record})  # a hint may be lost, a search may not hang
    for transport in (a, b, c):
        await transport.close()
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


async def test_two_runs_do_not_meet() -> None:
    network = MemoryNetwork()
    a, directory_a = await node(network, 1)
    stranger = network.join(identity(2).peer_id)
    directory_b = await Directory.create(stranger, bytes(32), identity(2), SystemClock())
    assert await directory_b.bootstrap([a.peer_id]) == 0
    assert await directory_a.announce(Record((), tier=1, version=1), ttl_s=60)
    assert await directory_b.find() == {}
