"""Peers that nobody can dial contribute, and leave the seats to those that can be dialled, as long as there are any."""

from __future__ import annotations

import pytest

from braniac.protocol import limits
from braniac.protocol.messages import Heartbeat
from braniac.protocol.roster import Roster
from tests.unit.swarm_checks import WINDOW, acknowledged_and_listed, assert_flowing, converge
from tests.unit.swarm_harness import Peer, Swarm, identity

ALICE = identity(1).peer_id


def hide(*peers: Peer) -> None:
    for peer in peers:
        peer.engine.set_reachable(False)
        peer.pump()


def show(*peers: Peer) -> None:
    for peer in peers:
        peer.engine.set_reachable(True)
        peer.pump()


def seats(swarm: Swarm, first: int) -> set[bytes]:
    """Who sat in the committees of the slots from `first` on that have ended."""
    found: set[bytes] = set()
    for slot in range(first, swarm.slot - 1):
        for peer in swarm.peers:
            if (event := peer.settled.get(slot)) and event.certificate:
                found.update(event.certificate.verdict.committee)
    return found


def contributors(swarm: Swarm, first: int) -> set[bytes]:
    """Whose work is in certificates of the slots from `first` on."""
    found: set[bytes] = set()
    for slot in range(first, swarm.slot - 1):
        if (event := swarm.peers[0].settled.get(slot)) and event.certificate:
            found.update(share.commitment.peer for share in event.certificate.verdict.shares)
    return found


@pytest.mark.parametrize("hidden", [1, 3])
def test_an_unreachable_peer_never_sits_and_its_work_is_merged(hidden: int) -> None:
    swarm = Swarm.running([0] * 4)
    away = swarm.peers[:hidden]  # the founder is one of them
    hide(*away)
    swarm.run(limits.ELIGIBLE_SLOTS + 1)
    first = swarm.slot
    converge(swarm, 2 * WINDOW + 2)
    assert_flowing(swarm, first, swarm.slot - 1)
    assert seats(swarm, first) == {peer.id for peer in swarm.peers[hidden:]}
    assert contributors(swarm, first) == {peer.id for peer in swarm.peers}
    acknowledged_and_listed(swarm)


def test_it_takes_effect_in_the_same_slot_for_everybody() -> None:
    """So that no slot is lost to committees that differ, either way."""
    swarm = Swarm.running([0] * 4)
    first = swarm.slot + 1
    swarm.run(0.6)
    hide(swarm.peers[1])
    swarm.run(4)
    show(swarm.peers[1])
    swarm.run(0.5)
    hide(swarm.peers[2])
    converge(swarm, 4)
    assert_flowing(swarm, first, swarm.slot - 1)
    assert not any(error.refusal.value == "not_committee" for _, error in swarm.refusals[-200:])


def test_a_peer_that_becomes_reachable_sits_again() -> None:
    swarm = Swarm.running([0] * 3)
    hide(swarm.peers[2])
    swarm.run(6)
    show(swarm.peers[2])
    swarm.run(limits.ELIGIBLE_SLOTS + 1)
    first = swarm.slot
    converge(swarm, 2 * WINDOW)
    assert swarm.peers[2].id in seats(swarm, first)


@pytest.mark.parametrize("size", [1, 3])
def test_a_swarm_of_unreachable_peers_goes_on(size: int) -> None:
    swarm = Swarm.running([0] * size)
    first = swarm.slot + 1
    hide(*swarm.peers)
    converge(swarm, 3 * WINDOW)
    assert_flowing(swarm, first, swarm.slot - 1)
    assert seats(swarm, first + limits.ELIGIBLE_SLOTS) == {peer.id for peer in swarm.peers}


def test_when_the_only_reachable_peer_leaves_the_others_decide() -> None:
    swarm = Swarm.running([0] * 3)
    hide(*swarm.peers[:2])
    swarm.run(4)
    first = swarm.slot
    swarm.run(4)
    assert seats(swarm, first) == {swarm.peers[2].id}
    swarm.peers[2].engine.goodbye()
    swarm.peers[2].pump()
    swarm.peers[2].kill()
    swarm.run(2)
    first = swarm.slot
    converge(swarm, 2 * WINDOW)
    assert_flowing(swarm, first, swarm.slot - 1)
    assert seats(swarm, first) == {peer.id for peer in swarm.peers[:2]}


def test_a_joiner_behind_a_router_contributes_under_loss() -> None:
    swarm = Swarm.running([0] * 3, seed=3)
    swarm.loss = 0.1
    late = swarm.add()
    late.join()
    swarm.run(4)
    hide(late)
    swarm.run(3 * WINDOW)
    swarm.loss = 0.0
    converge(swarm, 2)
    first = swarm.slot - 2 * WINDOW
    assert late.id not in seats(swarm, first)
    assert late.id in contributors(swarm, first)


def test_saying_the_same_again_changes_nothing() -> None:
    swarm = Swarm.running([0, 0])
    peer = swarm.peers[0]
    ready_slot = peer.engine._standing.ready_slot
    show(peer)
    assert peer.engine._standing.ready_slot == ready_slot
    hide(peer)
    since = peer.engine._standing.unreachable_slot
    swarm.run(3)
    hide(peer)
    assert peer.engine._standing.unreachable_slot == since


def test_a_heartbeat_says_since_when() -> None:
    roster = Roster()
    roster.hear(ALICE, Heartbeat(10, 0, 0, unreachable_slot=10), 10, 1)
    member = roster.get(ALICE)
    assert member is not None
    assert [member.dialable(slot) for slot in (10, 11, 12, 20)] == [True, True, False, False]
    assert member.eligible(12), "it is expected to contribute"
    roster.hear(ALICE, Heartbeat(12, 0, 12), 12, 2)
    member = roster.get(ALICE)
    assert member is not None
    assert member.dialable(12)
