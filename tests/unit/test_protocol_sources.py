"""Whom peers ask for an update: their parents in a tree; and what it takes to make them ask somebody else."""

from __future__ import annotations

import pytest

from braniac.protocol import events
from braniac.protocol.tree import ancestors
from tests.unit.swarm_checks import assert_flowing, converge, seats_of
from tests.unit.swarm_harness import Peer, Swarm


def asked(peer: Peer, digest: bytes) -> list[events.BlobWanted]:
    return [event for event in peer.log if isinstance(event, events.BlobWanted) and event.digest == digest]


def way_of(swarm: Swarm, slot: int, peer: Peer) -> list[Peer]:
    """Whom it expects to have the slot's update before it, the nearest first."""
    live = [other.id for other in swarm.live]
    return [swarm.by_id[p] for p in ancestors(swarm.manifest.run_id, slot, seats_of(swarm, slot), live, peer.id)]


def update_of(swarm: Swarm, slot: int) -> bytes:
    settled = [event for peer in swarm.peers if (event := peer.settled.get(slot)) and event.certificate]
    assert settled, f"slot {slot} has no certificate"
    assert settled[0].certificate is not None
    return settled[0].certificate.verdict.update_digest


def next_slot_with(swarm: Swarm, depth: int) -> tuple[int, Peer]:
    """A slot to come, and a peer that stands so deep in its tree, its parent being no seat if that is possible."""
    for slot in range(swarm.slot + 1, swarm.slot + 50):
        for peer in swarm.live:
            way = way_of(swarm, slot, peer)
            if len(way) == depth and way[0].id not in seats_of(swarm, slot):
                return slot, peer
    raise AssertionError("no such slot")


@pytest.mark.parametrize("size", [4, 16])
def test_nobody_sends_much_to_many(size: int) -> None:
    """An update to two others at most, and a contribution to the three seats."""
    swarm = Swarm.running([0] * size)
    first = swarm.slot + 1
    swarm.run(6)
    last = swarm.slot - 3
    assert_flowing(swarm, first, last)
    for slot in range(first, last + 1):
        digest = update_of(swarm, slot)
        sent = {peer.number: peer.served[digest] for peer in swarm.peers}
        assert max(sent.values()) <= 2
        assert size - 3 <= sum(sent.values()) <= size - 1, "everybody but the seats has got it from another one"
        for peer in swarm.peers:
            assert sum(other.served[peer.offered[slot]] for other in swarm.peers) <= 3
            assert peer.served[peer.offered[slot]] <= 3


@pytest.mark.parametrize("depth", [2, 3])
def test_a_parent_that_cannot_be_reached_is_passed_over_at_once(depth: int) -> None:
    swarm = Swarm.running([0] * 9)
    slot, child = next_slot_with(swarm, depth)
    parent = way_of(swarm, slot, child)[0]
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.01)
    swarm.cut([parent.number], [child.number])
    swarm.run(3)
    digest = update_of(swarm, slot)
    assert parent.served[digest] <= 1
    assert digest in child.blobs
    assert all(wanted.patient for wanted in asked(child, digest)), "it has not turned to anybody else"


@pytest.mark.parametrize("depth", [2, 3])
def test_a_parent_that_never_has_it_costs_a_short_delay(depth: int) -> None:
    """It is asked for as many quarters of a slot as there are peers above, and once more. Then anybody is."""
    swarm = Swarm.running([0] * 9)
    slot, child = next_slot_with(swarm, depth)
    parent = way_of(swarm, slot, child)[0]
    pull = child._pull
    asked_in_vain: list[float] = []

    def pull_from_a_liar(digest: bytes, holders: object, *, patient: bool = False) -> bytes | None:
        assert isinstance(holders, tuple)
        if holders[0] == parent.id and child.engine.slot in (slot, slot + 1, slot + 2):
            asked_in_vain.append(swarm.now)
            return None if patient else pull(digest, holders[1:])
        return pull(digest, holders, patient=patient)

    child._pull = pull_from_a_liar  # type: ignore[method-assign, assignment]
    swarm.run_until(swarm.manifest.slot_start(slot + 3))
    digest = update_of(swarm, slot)
    assert digest in child.blobs
    found = asked(child, digest)
    assert [wanted.patient for wanted in found[: depth + 2]] == [True] * (depth + 1) + [False]
    assert set(found[depth + 1].holders) >= {other.id for other in way_of(swarm, slot, child)}
    assert asked_in_vain[depth + 1] - asked_in_vain[0] < (depth + 2) / 4 * swarm.manifest.slot_s


def test_when_no_inner_peer_gives_anything_everybody_has_the_update_all_the_same() -> None:
    """Each says that it has nothing yet. Then the seats, who signed it, are asked by all."""
    swarm = Swarm.running([0] * 9)
    slot = swarm.slot + 1
    inner = {way_of(swarm, slot, peer)[0].id for peer in swarm.peers if way_of(swarm, slot, peer)}
    inner -= set(seats_of(swarm, slot))
    assert inner
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.01)
    for peer in swarm.peers:
        _ask_in_vain(peer, inner)
    swarm.run(4)
    digest = update_of(swarm, slot)
    assert all(digest in peer.blobs for peer in swarm.peers)


def _ask_in_vain(peer: Peer, silent: set[bytes]) -> None:
    pull = peer._pull

    def without(digest: bytes, holders: object, *, patient: bool = False) -> bytes | None:
        assert isinstance(holders, tuple)
        if patient and holders[0] in silent:
            return None
        return pull(digest, tuple(h for h in holders if h not in silent), patient=patient)

    peer._pull = without  # type: ignore[method-assign, assignment]


def test_an_old_update_is_asked_from_whoever_lists_it() -> None:
    """A peer that slept has nobody to wait for."""
    swarm = Swarm.running([0] * 6)
    sleeper = swarm.peers[4]
    slot = swarm.slot + 4
    swarm.run(0.5)
    sleeper.pause()
    swarm.run(8)
    sleeper.resume()
    converge(swarm, 3)
    digest = update_of(swarm, slot)
    found = asked(sleeper, digest)
    assert found
    assert not any(wanted.patient for wanted in found)
    assert len(found[0].holders) >= 3
    assert digest in sleeper.blobs


def test_what_is_known_about_an_update_goes_with_it() -> None:
    swarm = Swarm.running([0] * 6)
    swarm.run(6)
    for peer in swarm.peers:
        assert len(peer.engine._certificates._sources._waits) <= 1


def test_only_who_holds_the_fragment_is_in_its_tree() -> None:
    """Seats have the update whatever they hold."""
    swarm = Swarm.running([0, 0, 1, 1, 1], rings=(0, 1, 1))
    first = swarm.slot + 1
    swarm.run(9)
    small = {peer.id for peer in swarm.peers if peer.tier == 1}
    seen = 0
    for slot in range(first, swarm.slot - 2):
        if swarm.manifest.fragment_of(slot) == 0:
            continue
        digest, seats = update_of(swarm, slot), seats_of(swarm, slot)
        for peer in swarm.peers[:2]:
            for wanted in asked(peer, digest):
                assert small & set(wanted.holders) <= set(seats)
                seen += 1
        assert not any(asked(peer, digest) for peer in swarm.peers[2:])
    assert seen


def test_a_contribution_that_is_kept_from_the_seats_comes_from_the_owner() -> None:
    swarm = Swarm.running([0] * 4)
    slot = swarm.slot + 1
    owner, *others = (swarm.by_id[peer] for peer in seats_of(swarm, slot))
    contributor = next(peer for peer in swarm.peers if peer.id not in seats_of(swarm, slot))
    swarm.cut([contributor.number], [seat.number for seat in others])
    swarm.run_until(swarm.manifest.slot_start(slot + 2))
    payload = contributor.offered[slot]
    assert contributor.served[payload] == 1
    assert owner.served[payload] == 2
    assert update_of(swarm, slot)
