"""What the node asks of a network: one request, one reply, between two peers known by their keys.

A transport moves bytes of at most `MESSAGE_BYTES_MAX` each way and proves who the other side is; it knows nothing of
what the bytes mean. Everything bulky is cut into such messages above it, because streams over libp2p lose their tails.

* NodeError
  x Unreachable    a call or a dial that brought no reply, with a `Reason` that is also the metric's label
  x Refused        raised by the answering side; its one word is all that the peer learns
"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import multiaddr
import multiaddr.exceptions
import structlog

from braniac.node.errors import ConfigError, NodeError
from braniac.protocol.errors import IdentityError
from braniac.protocol.identity import PeerId, peer_id_from_text, short_name
from braniac.protocol.limits import ADDRESS_BYTES_MAX, MESSAGE_BYTES_MAX

EXCHANGE = "/braniac/exchange/1"
_EXAMPLE = "/ip4/203.0.113.7/tcp/31337/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp"
_HOSTS = ("ip4", "ip6", "dns", "dns4", "dns6")

log = structlog.get_logger(__name__)

Handler = Callable[[PeerId, bytes], Awaitable[bytes]]
"""Answers one request of one peer; may be cancelled when the peer gives up."""


class Reason(enum.StrEnum):
    """Why there was no reply: a closed list, so that it can label a metric."""

    TIMEOUT = "timeout"  # no reply before the deadline; whether the peer acted on the request is unknown
    UNDIALABLE = "undialable"  # no connection, so the peer never saw the request
    LOST = "lost"  # the connection broke; whether the peer acted on the request is unknown
    REFUSED = "refused"  # the peer answered that it does not serve this
    OVERSIZE = "oversize"  # a request or a reply over MESSAGE_BYTES_MAX
    CLOSED = "closed"  # our own transport is closed or dead


class Unreachable(NodeError):
    """A call or a dial without a reply. `peer` or `address` says whom, `reason` why, `detail` in words."""

    def __init__(self, reason: Reason, detail: str, *, peer: PeerId | None = None, address: str | None = None) -> None:
        whom = address or (f"peer {short_name(peer)}" if peer else "the peer")
        super().__init__(f"{whom} gave no reply ({reason.value}: {detail})")
        self.reason = reason
        self.detail = detail
        self.peer = peer
        self.address = address


class Refused(NodeError):
    """A call that was not served; its text is one of REFUSALS and all that the peer learns."""


REFUSALS = (
    "busy",  # too many calls at a time, from this peer or in all
    "oversize",  # the request is over MESSAGE_BYTES_MAX
    "slow",  # the answer took too long
    "failed",  # the answer could not be made
    "unknown",  # no such protocol, or a peer id that is not an Ed25519 key
)


@dataclass
class Traffic:
    """Counters of one transport: payload bytes, calls by outcome ('ok' or a `Reason`), answers by outcome
    ('ok' or a `Refused` word)."""

    sent_bytes: int = 0
    received_bytes: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)


class Transport(Protocol):
    """One peer's end of the network. Not reusable: after `wait_failed` or `close`, build another."""

    @property
    def peer_id(self) -> PeerId:
        """Who we are to the others: proven by the transport, not merely claimed."""

    @property
    def traffic(self) -> Traffic:
        """Counters since the transport was made."""

    async def call(self, peer: PeerId, request: bytes, *, timeout_s: float, protocol: str = EXCHANGE) -> bytes:
        """Send `request`, return the reply; both at most MESSAGE_BYTES_MAX. Raises Unreachable."""

    async def connect(self, address: str, *, timeout_s: float) -> PeerId:
        """Dial a multiaddr that ends in /p2p/<id>, so that its peer can be called. Raises Unreachable, ConfigError."""

    def remember(self, peer: PeerId, addresses: Sequence[str]) -> None:
        """Keep multiaddrs as hints for later dials of `peer`; malformed ones, or another peer's, are dropped."""

    async def seen_from(self, peer: PeerId) -> list[str]:
        """The IP addresses from which `peer` is connected now, not counting relays. Raises Unreachable."""

    async def probe(self, host: str, port: int) -> bool:
        """Whether some peer listens there, tried over a connection of its own; never raises."""

    def addresses(self) -> list[str]:
        """The multiaddrs under which others may reach us, each ending in /p2p/<our id>."""

    async def serve(self, handler: Handler, *, protocol: str = EXCHANGE) -> None:
        """Start answering requests under `protocol`; once per protocol."""

    async def wait_failed(self) -> None:
        """Return when the transport is dead or closed; its calls in flight fail at the same moment."""

    async def close(self) -> None:
        """Fail calls in flight, stop answering and free everything; needed before the loop ends, harmless twice."""


def parse_address(text: str) -> tuple[PeerId, str]:
    """Split a peer's multiaddr, direct or through a relay, into (peer id, what is before it). Raises ConfigError."""
    bare, _, peer_text = text.rpartition("/p2p/")
    try:
        if not bare:
            raise ValueError("it does not end in /p2p/<peer id>")
        if len(text.encode()) > ADDRESS_BYTES_MAX:
            raise ValueError(f"it is longer than {ADDRESS_BYTES_MAX} bytes")
        peer = peer_id_from_text(peer_text)
        direct, _, relay = bare.partition("/p2p/")
        if relay:
            relay_text, _, circuit = relay.partition("/")
            if peer_id_from_text(relay_text) == peer or circuit != "p2p-circuit":
                raise ValueError("a way through a relay is written /p2p/<the relay's id>/p2p-circuit/p2p/<peer id>")
        host, port = split_host_port(direct)
        if not host or not port:
            raise ValueError("nobody can be dialled at an empty host or at port 0")
    except (ValueError, IdentityError) as error:
        raise ConfigError(
            f"{text[:ADDRESS_BYTES_MAX]!r} is not a peer's address: {error}; write it like {_EXAMPLE}"
        ) from None
    return peer, bare


def split_host_port(text: str) -> tuple[str, int]:
    """(host, port) of a multiaddr without a peer id, such as /ip4/0.0.0.0/tcp/4001. Raises ValueError."""
    try:
        parts = list(multiaddr.Multiaddr(text).items())
    except multiaddr.exceptions.Error:
        raise ValueError("it is not a multiaddr") from None
    names = [protocol.name for protocol, _ in parts]
    if len(names) < 2 or names[0] not in _HOSTS or names[1] not in ("tcp", "udp") or "p2p" in names:
        raise ValueError("it must start with /ip4, /ip6 or /dns and a /tcp or /udp port, without a relay")
    return str(parts[0][1]), int(parts[1][1])


@dataclass(frozen=True)
class Bounds:
    """How much a transport does for others at a time."""

    calls_max: int = 256  # being answered
    calls_per_peer_max: int = 16  # being answered, of one peer
    answer_s: float = 30.0  # for one answer


class Doorman:
    """Runs handlers for remote peers within bounds."""

    def __init__(self, traffic: Traffic, bounds: Bounds) -> None:
        self._traffic = traffic
        self._bounds = bounds
        self._calls: Counter[PeerId] = Counter()  # being answered now

    async def answer(self, handler: Handler, peer: PeerId, request: bytes) -> bytes:
        """Reply of `handler`. Raises Refused, whatever went wrong."""
        self._traffic.received_bytes += len(request)
        try:
            reply = await self._bounded(handler, peer, request)
        except Refused as refused:
            self._traffic.answers[str(refused)] += 1
            raise
        self._traffic.answers["ok"] += 1
        self._traffic.sent_bytes += len(reply)
        return reply

    async def _bounded(self, handler: Handler, peer: PeerId, request: bytes) -> bytes:
        if len(request) > MESSAGE_BYTES_MAX:
            raise Refused("oversize")
        if self._calls.total() >= self._bounds.calls_max or self._calls[peer] >= self._bounds.calls_per_peer_max:
            raise Refused("busy")
        self._calls[peer] += 1
        try:
            async with asyncio.timeout(self._bounds.answer_s):
                reply = await handler(peer, request)
        except TimeoutError:
            raise Refused("slow") from None
        except Refused:
            raise
        except Exception:
            # Whatever a handler raises is our bug, and what it says is none of the peer's business.
            log.exception("could not answer", peer=short_name(peer))
            raise Refused("failed") from None
        finally:
            self._calls[peer] -= 1
            if not self._calls[peer]:
                del self._calls[peer]
        if len(reply) > MESSAGE_BYTES_MAX:
            log.error("a reply is over the limit", peer=short_name(peer), size_bytes=len(reply))
            raise Refused("failed")
        return reply
