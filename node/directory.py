"""The directory: a hivemind DHT in which the peers of a run leave hints about where they can be reached.

A hint is never an authority: whoever reads it still has to call the peer and check what that peer signs. So the
directory may lose, delay or withhold records; what it must not do is let one peer speak for another, or store whatever
it is sent. A record is signed by its peer, is at most 1 KiB, and expires; a peer has one record, and a run at most 512.
"""

from __future__ import annotations

import asyncio
import json
import math
import struct
import warnings
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import structlog

from braniac.node.clock import Clock
from braniac.node.errors import ConfigError
from braniac.node.p2pd import PeerID
from braniac.node.transport import Refused, Transport, parse_address
from braniac.protocol.errors import IdentityError
from braniac.protocol.identity import (
    PEER_ID_BYTES,
    SIGNATURE_BYTES,
    Identity,
    PeerId,
    parse_peer_id,
    short_name,
    verify,
)
from braniac.protocol.limits import ADDRESSES_MAX

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # see p2pd.py
    from hivemind.dht.node import DHTNode
    from hivemind.dht.routing import DHTID
    from hivemind.p2p import P2PContext
    from hivemind.utils import MSGPackSerializer

log = structlog.get_logger(__name__)

RECORD_BYTES_MAX = 1024
RECORDS_MAX = 512  # all of them fit in one message
TTL_S_MAX = 2 * 3600.0  # of the reader's wall clock, which may be an hour off
TIER_MAX = 15
VERSION_MAX = 1 << 16
RPC_S = 3.0  # deadline of one DHT message
_DOMAIN = b"directory"
_MSGPACK_BIN8 = b"\xc4"  # then one byte of length; longer byte strings have two
_SUBKEY_PREFIX = _MSGPACK_BIN8 + bytes([PEER_ID_BYTES])


@dataclass(frozen=True)
class Record:
    """What a peer says about itself."""

    addresses: tuple[str, ...]  # multiaddrs, each ending in /p2p/<its id>
    tier: int
    version: int  # of the protocol

    def encode(self) -> bytes:
        """At most RECORD_BYTES_MAX bytes; the last addresses are left out if they do not fit."""
        kept = list(self.addresses[:ADDRESSES_MAX])
        while len(data := json.dumps([kept, self.tier, self.version]).encode()) > RECORD_BYTES_MAX:
            kept.pop()
        return data

    @classmethod
    def decode(cls, peer: PeerId, data: bytes) -> Record:
        """Inverse of `encode`, for a record of `peer`. Raises ValueError."""
        if len(data) > RECORD_BYTES_MAX:
            raise ValueError("a record that is too long")
        try:
            addresses, tier, version = json.loads(data)
        except (TypeError, RecursionError) as error:
            raise ValueError("not a record") from error
        if not isinstance(addresses, list) or len(addresses) > ADDRESSES_MAX:
            raise ValueError("not a list of addresses")
        for number, maximum in ((tier, TIER_MAX), (version, VERSION_MAX)):
            if type(number) is not int or not 0 <= number <= maximum:
                raise ValueError("a tier or version out of bounds")
        for address in addresses:
            if not isinstance(address, str) or parse_address(address)[0] != peer:
                raise ValueError("an address that is not this peer's")
        return cls(tuple(addresses), tier, version)


class RecordValidator:
    """What hivemind's DHT asks about each record it is about to sign, store or return (its RecordValidatorBase)."""

    def __init__(self, identity: Identity, key: bytes, clock: Clock) -> None:
        self._identity = identity
        self._key = key
        self._clock = clock
        self._accepted: dict[PeerId, tuple[float, bytes]] = {}  # expiration and value of each peer's latest record

    def sign_value(self, record: Any) -> bytes:
        """The value with our signature behind it, if the record is under our id."""
        value: bytes = record.value
        if record.subkey != _SUBKEY_PREFIX + self._identity.peer_id:
            return value
        return value + self._identity.sign(_DOMAIN, _signed_part(record, value))

    def strip_value(self, record: Any) -> bytes:
        """The value without its signature."""
        value: bytes = record.value[:-SIGNATURE_BYTES]
        return value

    def validate(self, record: Any) -> bool:
        """Whether the record is this run's, well-formed, within bounds and signed by the peer it is about."""
        try:
            return self._validate(record)
        except (ValueError, ConfigError, IdentityError) as error:
            log.debug("refused a directory record", error=str(error)[:200])
            return False

    def _validate(self, record: Any) -> bool:
        now_s, expiration_s = self._clock.wall(), record.expiration_time
        # A dictionary of records comes out of msgpack, so a value or an expiration may be of any type.
        if not isinstance(record.value, bytes) or not isinstance(expiration_s, float):
            return False
        if record.key != self._key or not record.subkey.startswith(_SUBKEY_PREFIX):
            return False
        if not 0.0 < expiration_s < now_s + TTL_S_MAX:  # refuses NaN too
            return False
        peer = parse_peer_id(record.subkey[len(_SUBKEY_PREFIX) :])
        latest = self._accepted.get(peer)
        if latest == (expiration_s, record.value):
            return True  # every holder returns every record: checking each signature once is enough
        if latest is None and not self._has_room(now_s):
            return False
        value = self.strip_value(record)
        Record.decode(peer, _unpack_bytes(value))
        if not verify(peer, _DOMAIN, _signed_part(record, value), record.value[-SIGNATURE_BYTES:]):
            return False
        if latest is None or expiration_s > latest[0]:
            self._accepted[peer] = (expiration_s, record.value)
        return True

    def _has_room(self, now_s: float) -> bool:
        if len(self._accepted) >= RECORDS_MAX:
            self._accepted = {peer: kept for peer, kept in self._accepted.items() if kept[0] > now_s}
        return len(self._accepted) < RECORDS_MAX


class Directory:
    """One peer's part in the run's DHT; made by `create`. It ends with its transport."""

    def __init__(self, node: Any, key: str, identity: Identity, clock: Clock) -> None:
        self._node = node
        self._key = key
        self._identity = identity
        self._clock = clock
        self._expiration_s = 0.0
        self._newer: set[float] = set()  # expirations of records under our own key that outlive the one we announced

    @classmethod
    async def create(cls, transport: Transport, run_id: bytes, identity: Identity, clock: Clock) -> Directory:
        """Serve the DHT of the run `run_id` on `transport`; `identity` is the transport's."""
        key = f"peers/{run_id.hex()}"
        validator = RecordValidator(identity, DHTID.generate(key).to_bytes(), clock)
        node = await DHTNode.create(
            p2p=_Wire(transport, f"/braniac/directory/1/{run_id.hex()}/"),
            record_validator=validator,
            wait_timeout=RPC_S,
            num_workers=2,
            cache_locally=False,  # a cache would outlive its record
            cache_nearest=0,
            cache_on_store=False,
            ensure_bootstrap_success=False,
            strict=False,
        )
        return cls(node, key, identity, clock)

    async def bootstrap(self, peers: Iterable[PeerId]) -> int:
        """Meet `peers`, which the transport can reach; returns how many answered."""
        async with asyncio.TaskGroup() as group:
            pings = [group.create_task(self._ping(peer)) for peer in peers]
        met = sum(ping.result() for ping in pings)
        if met:
            await self._node.find_nearest_nodes([self._node.node_id])  # and whom they know
        return met

    async def announce(self, record: Record, ttl_s: float) -> bool:
        """Leave `record` with the nearest peers for `ttl_s` seconds; whether any took it. Renew at a third of that."""
        assert 0 < ttl_s < TTL_S_MAX, "nobody would take this record"
        # Holders take a record only over an older one, even if our wall clock was set back.
        self._expiration_s = max(self._clock.wall() + ttl_s, math.nextafter(self._expiration_s, math.inf))
        stored = await self._node.store(
            self._key, record.encode(), self._expiration_s, subkey=bytes(self._identity.peer_id)
        )
        return bool(stored)

    @property
    def doubled(self) -> bool:
        """Whether somebody else keeps announcing records under our key, so that two nodes share one identity.

        Nobody can forge such a record. One alone may be left over from an earlier life whose clock was ahead.
        """
        return len(self._newer) >= 2

    async def find(self, timeout_s: float = 10.0) -> dict[PeerId, Record]:
        """The records of the others, as far as peers that answer in time hold them."""
        try:
            async with asyncio.timeout(timeout_s):
                found = await self._node.get(self._key, latest=True)
        except TimeoutError:
            return {}
        if found is None:
            return {}
        # The validator has seen each of these, so nothing here is malformed.
        records = {PeerId(peer): Record.decode(PeerId(peer), item.value) for peer, item in found.value.items()}
        if records.pop(self._identity.peer_id, None) is not None and self._expiration_s:
            expiration_s = found.value[bytes(self._identity.peer_id)].expiration_time
            self._newer |= {expiration_s} if expiration_s > self._expiration_s else set()
        return records

    async def _ping(self, peer: PeerId) -> bool:
        try:
            return await self._node.protocol.call_ping(PeerID(peer)) is not None
        except (ValueError, AssertionError):  # hivemind's way to say that the reply is malformed
            log.debug("a malformed directory reply", peer=short_name(peer))
            return False


class _Wire:
    """Our transport in the guise of `hivemind.P2P`, as far as DHTNode needs one.

    So the DHT has our deadlines, bounds and counters, its errors stay here, and it ends when the transport is closed.
    """

    def __init__(self, transport: Transport, prefix: str) -> None:
        self.peer_id = PeerID(transport.peer_id)
        self._transport = transport
        self._prefix = prefix

    async def add_protobuf_handler(
        self, name: str, handler: Callable[[Any, Any], Awaitable[Any]], input_protobuf_type: Any, **_kinds: bool
    ) -> None:
        async def answer(peer: PeerId, request: bytes) -> bytes:
            context = P2PContext(handle_name=name, local_id=self.peer_id, remote_id=PeerID(peer))
            try:
                response = await handler(input_protobuf_type.FromString(request), context)
            except Exception as error:  # hivemind checks what peers send with whatever exception comes along
                log.debug("a malformed directory request", peer=short_name(peer), error=repr(error)[:200])
                raise Refused("failed") from None
            reply: bytes = response.SerializeToString()
            return reply

        await self._transport.serve(answer, protocol=self._prefix + name)

    async def call_protobuf_handler(self, peer: Any, name: str, request: Any, output_protobuf_type: Any) -> Any:
        reply = await self._transport.call(
            PeerId(peer.to_bytes()), request.SerializeToString(), timeout_s=RPC_S, protocol=self._prefix + name
        )
        return output_protobuf_type.FromString(reply)


def _signed_part(record: Any, value: bytes) -> bytes:
    """Everything that a replay or a change must not touch; the first three have fixed lengths."""
    key: bytes = record.key
    subkey: bytes = record.subkey
    return key + subkey + struct.pack(">d", record.expiration_time) + value


def _unpack_bytes(data: bytes) -> bytes:
    """The byte string in a msgpack value. Raises ValueError for any other value, and for other ways to write it."""
    content = data[2:] if data[:1] == _MSGPACK_BIN8 else data[3:]
    if data != MSGPackSerializer.dumps(content):
        raise ValueError("not a byte string")
    return content
