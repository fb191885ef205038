"""Transport over libp2p: encrypted, authenticated by the peer ids, through the daemon in p2pd.py.

Only unary calls are used. A request is addressed by peer id alone; where to dial that peer is known to the daemon from
`connect`, and to us from `remember`, which we fall back on when the daemon finds no way.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from multiaddr import Multiaddr

from braniac.node import identity_file
from braniac.node.errors import ConfigError
from braniac.node.p2pd import P2pd, P2PDaemonError, P2pdOptions, P2PHandlerError
from braniac.node.transport import (
    EXCHANGE,
    REFUSALS,
    Bounds,
    Doorman,
    Handler,
    Reason,
    Refused,
    Traffic,
    Unreachable,
    parse_address,
    split_host_port,
)
from braniac.protocol.errors import IdentityError
from braniac.protocol.identity import Identity, PeerId, parse_peer_id, peer_id_text
from braniac.protocol.limits import ADDRESSES_MAX, MESSAGE_BYTES_MAX, ROSTER_PEERS_MAX

PROBE_S = 5.0
_GREETING = b"\x13/multistream/1.0.0\n"
_ASK_S = 5.0  # for what our daemon knows itself
_UNDIALABLE = ("failed to dial", "failed to find any peer", "not found", "no addresses")  # of p2pd's error texts
_REFUSAL_WORDS = {repr(Refused(word)): word for word in REFUSALS}  # hivemind sends the repr of what a handler raises


class LibP2PTransport:
    """See Transport; made by `start`."""

    def __init__(self, identity: Identity, daemon: P2pd, bounds: Bounds) -> None:
        self.peer_id = identity.peer_id
        self.traffic = Traffic()
        self._daemon = daemon
        self._doorman = Doorman(self.traffic, bounds)
        self._addresses: list[str] = []
        self._remembered: OrderedDict[PeerId, list[Multiaddr]] = OrderedDict()  # the longest untouched first
        self._deadlines: set[asyncio.Timeout] = set()  # of calls in flight
        self._failed = asyncio.Event()
        self._watch = asyncio.create_task(self._fail_with_daemon())

    @classmethod
    async def start(
        cls, identity_path: Path, options: P2pdOptions | None = None, bounds: Bounds | None = None
    ) -> LibP2PTransport:
        """Start a daemon under the key at `identity_path`, which is made if missing; connects to nobody.

        Raises ConfigError, IdentityFileError, ResourceError.
        """
        identity = identity_file.load_or_create(identity_path)
        daemon = await P2pd.start(identity_path, options or P2pdOptions())
        self = cls(identity, daemon, bounds or Bounds())
        try:
            await self._refresh_addresses()
        except BaseException:
            await self.close()
            raise
        return self

    @property
    def daemon_pid(self) -> int:
        """The process id of the libp2p daemon, for whoever watches the memory of both."""
        return self._daemon.process.pid

    async def call(self, peer: PeerId, request: bytes, *, timeout_s: float, protocol: str = EXCHANGE) -> bytes:
        """See Transport."""
        try:
            if len(request) > MESSAGE_BYTES_MAX:
                raise Unreachable(Reason.OVERSIZE, f"a request of {len(request)} bytes", peer=peer)
            async with self._attempt(timeout_s, peer=peer):
                self.traffic.sent_bytes += len(request)
                reply = await self._exchange(peer, protocol, request)
            self.traffic.received_bytes += len(reply)
            if len(reply) > MESSAGE_BYTES_MAX:
                raise Unreachable(Reason.OVERSIZE, f"a reply of {len(reply)} bytes", peer=peer)
        except Unreachable as error:
            self.traffic.calls[error.reason.value] += 1
            raise
        self.traffic.calls["ok"] += 1
        return reply

    async def connect(self, address: str, *, timeout_s: float) -> PeerId:
        """See Transport."""
        peer, bare = parse_address(address)
        async with self._attempt(timeout_s, address=address):
            await self._daemon.connect(peer, [Multiaddr(bare)])
            await self._refresh_addresses()  # peers tell us how they see us
        return peer

    def remember(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """See Transport."""
        usable = []
        for address in addresses[:ADDRESSES_MAX]:
            with contextlib.suppress(ConfigError):  # from a peer's word: nothing to do but not to use it
                owner, bare = parse_address(address)
                usable += [Multiaddr(bare)] if owner == peer else []
        if usable:
            self._remembered[peer] = usable
            self._remembered.move_to_end(peer)
        if len(self._remembered) > ROSTER_PEERS_MAX:
            self._remembered.popitem(last=False)

    async def seen_from(self, peer: PeerId) -> list[str]:
        """See Transport."""
        async with self._attempt(_ASK_S, peer=peer):
            connected = await self._daemon.connected_from(peer)
        hosts = []
        for address in connected:
            with contextlib.suppress(ValueError):  # over a relay
                hosts.append(split_host_port(address)[0])
        return hosts

    async def probe(self, host: str, port: int) -> bool:
        """See Transport."""
        return await greets(host, port)

    def addresses(self) -> list[str]:
        """See Transport."""
        return list(self._addresses)

    async def serve(self, handler: Handler, *, protocol: str = EXCHANGE) -> None:
        """See Transport."""

        async def answer(remote: bytes, request: bytes) -> bytes:
            try:
                peer = parse_peer_id(remote)
            except IdentityError:  # an RSA key: libp2p allows it, our signatures do not
                self.traffic.answers["unknown"] += 1
                raise Refused("unknown") from None
            return await self._doorman.answer(handler, peer, request)

        await self._daemon.serve(protocol, answer)

    async def wait_failed(self) -> None:
        """See Transport."""
        await self._failed.wait()

    async def close(self) -> None:
        """See Transport."""
        self._fail()
        self._watch.cancel()
        await asyncio.gather(self._watch, return_exceptions=True)
        await self._daemon.stop()

    async def _fail_with_daemon(self) -> None:
        await self._daemon.wait_dead()
        self._fail()

    def _fail(self) -> None:
        self._failed.set()
        for deadline in self._deadlines:
            if not deadline.expired():
                deadline.reschedule(0.0)  # a call through a dead daemon would never hear of it

    @contextlib.asynccontextmanager
    async def _attempt(
        self, timeout_s: float, *, peer: PeerId | None = None, address: str | None = None
    ) -> AsyncIterator[None]:
        """Bound what is done inside by a deadline and by our daemon's life, and turn its errors into Unreachable."""

        def unreachable(reason: Reason, detail: str) -> Unreachable:
            return Unreachable(reason, detail, peer=peer, address=address)

        if self._failed.is_set():
            raise unreachable(Reason.CLOSED, "our transport is closed")
        deadline = asyncio.timeout(timeout_s)
        try:
            async with deadline:
                self._deadlines.add(deadline)
                yield
        except TimeoutError:
            if self._failed.is_set():
                raise unreachable(Reason.CLOSED, "our transport closed") from None
            raise unreachable(Reason.TIMEOUT, f"no answer in {timeout_s:g} s") from None
        except P2PHandlerError as error:
            # The text is the peer's: only what we know of may reach a log or a metric.
            word = _REFUSAL_WORDS.get(str(error), "in words we do not know")
            raise unreachable(Reason.REFUSED, word) from None
        except P2PDaemonError as error:
            raise unreachable(_reason(error), " ".join(str(error).split())[:200]) from None
        except (OSError, EOFError):  # of the control socket
            raise unreachable(Reason.CLOSED, "our libp2p daemon died") from None
        finally:
            self._deadlines.discard(deadline)

    async def _exchange(self, peer: PeerId, protocol: str, request: bytes) -> bytes:
        try:
            return await self._daemon.call(peer, protocol, request)
        except P2PDaemonError as error:
            # Only a peer that cannot have seen the request may be sent it again.
            if _reason(error) is not Reason.UNDIALABLE or peer not in self._remembered:
                raise
        await self._daemon.connect(peer, self._remembered[peer])
        return await self._daemon.call(peer, protocol, request)

    async def _refresh_addresses(self) -> None:
        _, found = await self._daemon.identify()
        self._addresses = [f"{address}/p2p/{peer_id_text(self.peer_id)}" for address in found]


async def greets(host: str, port: int) -> bool:
    """Whether something at a TCP port sends what every libp2p listener sends first."""
    try:
        async with asyncio.timeout(PROBE_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(_GREETING)
                return await reader.readexactly(len(_GREETING)) == _GREETING
            finally:
                writer.close()
    except (OSError, EOFError, TimeoutError):
        return False


def _reason(error: Exception) -> Reason:
    text = str(error)
    if "protocols not supported" in text:
        return Reason.REFUSED
    return Reason.UNDIALABLE if any(words in text for words in _UNDIALABLE) else Reason.LOST
