"""From addresses to networks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from braniac.node.transport import Reason, Unreachable
from braniac.node.whereabouts import Whereabouts, network_of
from braniac.protocol import messages
from braniac.protocol.identity import PeerId
from tests.unit.swarm_harness import Swarm


@pytest.mark.parametrize(
    ("hosts", "network"),
    [
        (["203.0.114.77"], "203.0.114.0/24"),
        (["203.0.114.200"], "203.0.114.0/24"),
        (["2a00:1450:4001:82a::200e"], "2a00:1450:4001::/48"),
        (["::ffff:203.0.114.77"], "203.0.114.0/24"),
        (["192.168.1.4", "203.0.114.77"], "203.0.114.0/24"),
        (["127.0.0.1"], ""),
        (["192.168.1.4"], ""),
        (["10.0.0.1"], ""),
        (["fe80::1"], ""),
        (["::1"], ""),
        (["example.org"], ""),
        ([], ""),
    ],
)
def test_networks(hosts: list[str], network: str) -> None:
    assert network_of(hosts) == network


async def test_everybody_is_looked_at_once_a_window_and_whoever_is_away_stays_where_it_was() -> None:
    swarm = Swarm.running([0] * 6)
    engine = swarm.peers[0].engine
    asked: list[PeerId] = []
    connected = True

    async def seen_from(peer: PeerId) -> Sequence[str]:
        asked.append(peer)
        if not connected:
            raise Unreachable(Reason.CLOSED, "gone")
        return ["203.0.114.77"]

    whereabouts = Whereabouts(engine, seen_from)
    for slot in range(swarm.manifest.window):
        await whereabouts.look(slot)
    assert sorted(asked) == sorted(peer.id for peer in swarm.peers[1:])
    assert {member.network for member in engine.roster} == {"203.0.114.0/24"}
    connected = False
    await whereabouts.locate(swarm.peers[1].id)
    member = engine.roster.get(swarm.peers[1].id)
    assert member is not None
    assert member.network == "203.0.114.0/24"
    engine.roster.hear(member.peer, messages.Heartbeat(engine.slot, 0, 0), engine.slot, member.sequence + 1)
    assert engine.roster.get(member.peer).network == "203.0.114.0/24"  # type: ignore[union-attr]
