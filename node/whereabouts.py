"""From which networks peers are connected, as our own transport sees it: each network has few places in a slot.

A network is a /24 of IPv4 or a /48 of IPv6: about what one customer of a provider can have. Private addresses and this
machine's own are no network, so a swarm at home or in a laboratory is not limited. Nor is who comes through a relay,
because what would be seen is where the relay is.
"""

from __future__ import annotations

import contextlib
import ipaddress
from collections.abc import Awaitable, Callable, Iterable, Sequence

from braniac.node.transport import Unreachable
from braniac.protocol.engine import Engine
from braniac.protocol.identity import PeerId

_PREFIX_BITS = {4: 24, 6: 48}


class Whereabouts:
    """Tells an engine where its peers are."""

    def __init__(self, engine: Engine, seen_from: Callable[[PeerId], Awaitable[Sequence[str]]]) -> None:
        """See Transport for `seen_from`."""
        self._engine = engine
        self._seen_from = seen_from

    async def look(self, slot: int) -> None:
        """Look where those peers are whose turn it is; once a window it is everybody's."""
        window = self._engine.manifest.window
        for number, member in enumerate(self._engine.live_peers()):
            if number % window == slot % window:
                await self.locate(member.peer)

    async def locate(self, peer: PeerId) -> None:
        """Look where one peer is; if it is not connected now, what was seen before stays."""
        with contextlib.suppress(Unreachable):
            if hosts := await self._seen_from(peer):
                self._engine.roster.locate(peer, network_of(hosts))


def network_of(hosts: Iterable[str]) -> str:
    """The network of the first public IP address; empty if there is none."""
    for host in sorted(hosts):
        with contextlib.suppress(ValueError):
            ip = ipaddress.ip_address(host)
            mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
            address = mapped or ip
            if address.is_global:
                return str(ipaddress.ip_network((address, _PREFIX_BITS[address.version]), strict=False))
    return ""
