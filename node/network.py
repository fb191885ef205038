"""This node's way to its peers, kept alive: the libp2p transport, the run's directory, the people to knock at.

Nothing here gives up: a dead libp2p daemon is replaced, an address that does not answer is tried for ever, less and
less often and never in step with others. Meanwhile the node trains alone and says "degraded: 0 peers".
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path

import structlog

from braniac.node import address_file
from braniac.node.clock import Clock
from braniac.node.config import NetworkSection
from braniac.node.dial_back import is_relayed
from braniac.node.directory import Directory, Record
from braniac.node.errors import ConfigError, IdentityFileError
from braniac.node.p2pd import P2pdOptions
from braniac.node.transport import Handler, Transport, Unreachable, parse_address
from braniac.node.transport_libp2p import LibP2PTransport
from braniac.protocol import limits
from braniac.protocol.identity import Identity, PeerId, short_name

log = structlog.get_logger(__name__)

_LOOPBACK = ("/ip4/127.", "/ip6/::1/")
_RETRY_S_MIN = 0.5
_RETRY_S_MAX = 60.0
_SOCKET_DIR_BYTES_MAX = 80  # of the 107 that a socket's path may have
_LOOK_S = 10.0  # between two looks into the directory; longer in a large swarm
_RECORD_TTL_LOOKS = 12  # a record outlives so many

TransportFactory = Callable[[Path, P2pdOptions], Awaitable[Transport]]
"""Starts a transport under the identity at a path. Raises NodeError."""


class Network:
    """Transport and directory, each replaced when it dies. `start` first, then the `keep_...` tasks."""

    def __init__(
        self,
        settings: NetworkSection,
        identity_path: Path,
        identity: Identity,
        clock: Clock,
        *,
        start_transport: TransportFactory = LibP2PTransport.start,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Raises ConfigError for a malformed address."""
        self.bootstrap: list[str] = []
        """Addresses to join through, as far as they are known."""
        self.sleep = sleep
        """Pauses between two attempts, in seconds."""
        self.on_version: Callable[[int], None] = lambda version: None
        """Told which version of the protocol somebody in the directory says it speaks."""
        self.failures: dict[str, str] = {}
        """Addresses that do not answer, and why."""
        self._settings = settings
        self._identity_path = identity_path
        self._identity = identity
        self._clock = clock
        self._start_transport = start_transport
        self._handler: Handler | None = None
        self._transport: Transport | None = None
        self._directory: Directory | None = None
        self._run_id: bytes | None = None
        self._known: dict[PeerId, tuple[str, ...]] = {}
        self._awake = asyncio.Event()
        self._awake.set()
        self._add_bootstrap(text for text in settings.peers if not address_file.is_reference(text))

    @property
    def transport(self) -> Transport:
        """The living transport."""
        assert self._transport is not None, "start() comes first"
        return self._transport

    def public_addresses(self) -> tuple[str, ...]:
        """Where others may find this node: without its loopback addresses, unless it has no others.

        On another machine a loopback address leads to that machine itself.
        """
        every = tuple(self.transport.addresses())
        return tuple(address for address in every if not address.startswith(_LOOPBACK)) or every

    async def start(self, handler: Handler) -> None:
        """Bind and answer requests. Raises ConfigError, ResourceError."""
        self._handler = handler
        listen, announce = self._settings.listen, self._settings.announce
        options = P2pdOptions(
            listen=listen,
            announce=announce,
            behind_nat=self._settings.nat,
            relays=self._relays(),
            relay_service=self._settings.relay_service,
            socket_dir=self._socket_dir(),
        )
        transport = await self._start_transport(self._identity_path, options)
        try:
            await transport.serve(handler)
        except BaseException:
            await transport.close()
            raise
        for peer, addresses in self._known.items():
            transport.remember(peer, addresses)
        self._transport = transport
        if self._settings.address_file is not None:
            address_file.write(self._settings.address_file, transport.addresses())
        self.read_address_files()

    def read_address_files(self) -> None:
        """Take up what the @FILEs among the peers hold by now. Raises ConfigError for a malformed address."""
        for reference in filter(address_file.is_reference, self._settings.peers):
            try:
                self._add_bootstrap(address_file.read(reference))
                self.failures.pop(reference, None)
            except OSError as error:
                self.failures[reference] = f"no addresses yet: {error.strerror}"

    def _add_bootstrap(self, addresses: Iterable[str]) -> None:
        for address in addresses:
            parse_address(address)
            if address not in self.bootstrap:
                self.bootstrap.append(address)

    def _relays(self) -> tuple[str, ...]:
        """Peers that may relay for this node: those it joins through, as far as they are known."""
        return tuple(address for address in self.bootstrap if not is_relayed(address)) if self._settings.nat else ()

    def _socket_dir(self) -> Path | None:
        """A place for the daemon's socket that is swept at every start: a killed node leaves its own behind."""
        place = self._identity_path.parent / "p2pd"
        if len(os.fsencode(place)) > _SOCKET_DIR_BYTES_MAX:
            return None  # the system's place has a shorter name
        if self._transport is None:  # else it may still be in use
            shutil.rmtree(place, ignore_errors=True)
        place.mkdir(mode=0o700, exist_ok=True)
        return place

    def rest(self) -> None:
        """Look for nobody until `wake`; who calls is still answered."""
        self._awake.clear()

    def wake(self) -> None:
        """Look for peers again."""
        self._awake.set()

    async def close(self) -> None:
        """Stop answering."""
        if self._transport is not None:
            await self._transport.close()

    async def keep_alive(self) -> None:
        """Replace the transport whenever it dies."""
        while True:
            await self.transport.wait_failed()
            log.warning("the libp2p daemon died, starting another")
            for delay_s in _delays():
                try:
                    await self._renew()
                    break
                except Exception as error:  # a dying daemon fails in many ways, and every one of them may pass
                    log.warning("the libp2p daemon does not start", reason=str(error) or repr(error))
                    await self.sleep(delay_s)

    async def _renew(self) -> None:
        """A new transport with a new directory, in place of what is left of the old ones."""
        assert self._handler is not None
        await self.close()
        await self.start(self._handler)
        if self._run_id is not None:
            await self.open_directory(self._run_id)

    async def open_directory(self, run_id: bytes) -> None:
        """Take part in the run's DHT."""
        self._run_id = run_id
        self._directory = await Directory.create(self.transport, run_id, self._identity, self._clock)

    def remember(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Where a peer said it can be dialled; what is not an address of that peer is dropped."""
        good = tuple(address for address in addresses if _belongs_to(peer, address))
        room = peer in self._known or len(self._known) < limits.ROSTER_PEERS_MAX
        if peer != self._identity.peer_id and good and room:
            self._known[peer] = good
            self.transport.remember(peer, good)

    def known_peers(self) -> dict[PeerId, tuple[str, ...]]:
        """Everybody with an address, for the next start."""
        return dict(self._known)

    async def keep_knocking(self, addresses: Iterable[str], on_peer: Callable[[PeerId], None]) -> None:
        """Connect to every address, for ever; `on_peer` hears of each that answered."""
        async with asyncio.TaskGroup() as group:
            for address in dict.fromkeys(addresses):
                group.create_task(self._knock(address, on_peer))

    async def _knock(self, address: str, on_peer: Callable[[PeerId], None]) -> None:
        delays = _delays()
        while True:
            await self._awake.wait()
            try:
                peer = await self.connect(address)
            except Unreachable:
                await self.sleep(next(delays))
                continue
            on_peer(peer)
            await self._meet_in_directory(peer)
            delays = _delays()
            await self.sleep(_RETRY_S_MAX * random.uniform(0.5, 1.0))

    async def _meet_in_directory(self, peer: PeerId) -> None:
        if self._directory is None:
            return
        try:
            await self._directory.bootstrap([peer])
        except Exception as error:  # the directory is a hint: nothing in it may stop a node
            log.warning("the directory failed, going on without", reason=repr(error))

    async def connect(self, address: str) -> PeerId:
        """Dial one address. Raises Unreachable, and notes why in `failures`."""
        try:
            peer = await self.transport.connect(address, timeout_s=self._settings.call_timeout_s)
        except Unreachable as error:
            # Root cause first: libp2p wraps it in one line per address it tried.
            reason = error.detail.strip().rpartition(": ")[2][:120] or error.reason.value
            if address not in self.failures:
                say = log.warning if address in self.bootstrap else log.info
                say("a peer's address does not answer, trying on", address=address, reason=reason)
            self.failures[address] = reason
            raise
        self.failures.pop(address, None)
        self.remember(peer, [address])
        return peer

    async def keep_listed(self, tier: int, on_peer: Callable[[PeerId], None]) -> None:
        """Announce this node in the run's directory and look for others, for ever.

        Raises IdentityFileError if another node does so with the same key.
        """
        while True:
            await self._awake.wait()
            pause_s = _LOOK_S
            try:
                pause_s = await self._look_around(tier, on_peer)
            except IdentityFileError:
                raise
            except Exception as error:  # hivemind raises what it likes; the next look may go well
                log.warning("the directory failed, trying on", reason=repr(error))
            await self.sleep(pause_s * random.uniform(0.7, 1.3))

    def identity_shared(self) -> IdentityFileError:
        """What ends a node that has met its double."""
        return IdentityFileError(
            f"another node takes part with this node's identity {self._identity_path}: "
            "stop the copy, or give it a --state-dir of its own"
        )

    async def _look_around(self, tier: int, on_peer: Callable[[PeerId], None]) -> float:
        """Seconds until the next look: everybody reads all records, so the more there are, the longer."""
        directory = self._directory
        assert directory is not None, "open_directory() comes first"
        # Look first, then announce: of two nodes with one key, the one that peers do not listen to any more sees it.
        listed = await directory.find()
        for peer, found in listed.items():
            if peer not in self._known:
                log.debug("found a peer in the directory", peer=short_name(peer))
            self.on_version(found.version)
            self.remember(peer, found.addresses)
            on_peer(peer)
        if directory.doubled:
            raise self.identity_shared()
        record = Record(self.public_addresses(), tier, limits.PROTOCOL_VERSION)
        pause_s = _LOOK_S * max(1.0, len(listed) / limits.GREETED_PEERS_MAX)
        await directory.announce(record, _RECORD_TTL_LOOKS * pause_s)
        return pause_s


def _belongs_to(peer: PeerId, address: str) -> bool:
    """Whether this is a well-formed address of `peer`; both are another peer's words."""
    try:
        return parse_address(address)[0] == peer
    except ConfigError:
        return False


def _delays() -> Iterator[float]:
    """Growing, jittered pauses, without end."""
    delay_s = _RETRY_S_MIN
    while True:
        yield delay_s * random.uniform(0.5, 1.0)
        delay_s = min(_RETRY_S_MAX, 2 * delay_s)
