"""Trying, for a peer that asks, whether it can be reached: a plain connection to where it says it listens.

A call would go through the connection that carried the question, so this looks past it: TCP, and the greeting that
every libp2p listener sends first. That shows that a libp2p node listens there and nothing is in between; not which one.

Nobody can aim it at somebody else. As in libp2p's AutoNAT, only an address is tried from which the asker is connected
right now, and which it signed in its last heartbeat; at most three, no port below 1024, and each peer twice a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from braniac.node.clock import Clock
from braniac.node.errors import ConfigError
from braniac.node.transport import parse_address, split_host_port
from braniac.protocol import limits
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.identity import PeerId

TRIED_MAX = 3  # addresses for one question
PORT_MIN = 1024
PAUSE_S = 30.0  # between two questions of one peer
ANSWERING_MAX = 8  # questions at a time

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class DialBacks:
    """Answers "can you reach me?"."""

    def __init__(
        self,
        seen_from: Callable[[PeerId], Awaitable[Sequence[str]]],
        probe: Callable[[str, int], Coroutine[Any, Any, bool]],
        clock: Clock,
    ) -> None:
        """See Transport for `seen_from` and `probe`."""
        self._seen_from = seen_from
        self._clock = clock
        self._probe = probe
        self._answering = 0
        self._asked_s: OrderedDict[PeerId, float] = OrderedDict()  # the longest ago first

    async def answer(self, peer: PeerId, announced: Sequence[str]) -> pb.DialBack:
        """Try the addresses that `peer` announces. Raises WireError if it asks too often."""
        self._admit(peer)
        self._answering += 1
        try:
            seen = {ip for ip in map(_ip, await self._seen_from(peer)) if ip is not None}
            targets = [(text, *place) for text in announced if (place := _direct(peer, text, seen)) is not None]
            async with asyncio.TaskGroup() as group:
                tries = [(t, group.create_task(self._probe(host, port))) for t, host, port in targets[:TRIED_MAX]]
        finally:
            self._answering -= 1
        return pb.DialBack(
            answered=[text for text, probe in tries if probe.result()],
            silent=[text for text, probe in tries if not probe.result()],
        )

    def _admit(self, peer: PeerId) -> None:
        now = self._clock.monotonic()
        if self._answering >= ANSWERING_MAX or now < self._asked_s.get(peer, float("-inf")) + PAUSE_S:
            raise WireError(Refusal.OVERLOADED, "asked too often to dial back")
        self._asked_s[peer] = now
        self._asked_s.move_to_end(peer)
        if len(self._asked_s) > limits.ROSTER_PEERS_MAX:
            self._asked_s.popitem(last=False)


def _direct(peer: PeerId, text: str, seen: set[Address]) -> tuple[str, int] | None:
    """Host and port of an address that may be tried for a peer that is connected from `seen`."""
    with contextlib.suppress(ConfigError, ValueError):
        owner, bare = parse_address(text)
        if owner == peer and "/tcp/" in bare and not is_relayed(text):
            host, port = split_host_port(bare)
            if port >= PORT_MIN and _ip(host) in seen:
                return host, port
    return None


def is_relayed(address: str) -> bool:
    """Whether an address leads through another peer."""
    return "/p2p-circuit" in address


def is_global(address: str) -> bool:
    """Whether an address means the same everywhere on the Internet, as far as it tells; a name may."""
    try:
        ip = _ip(split_host_port(parse_address(address)[1])[0])
    except (ConfigError, ValueError):
        return False
    return ip is None or ip.is_global


def _ip(host: str) -> Address | None:
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found
