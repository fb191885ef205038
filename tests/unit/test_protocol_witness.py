"""Seats that sign two verdicts on one slot: the proof goes round, they are banned, and nobody else is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from braniac.protocol import events, limits, messages, wire
from braniac.protocol.errors import Refusal
from braniac.protocol.messages import Certificate
from braniac.protocol.witness import Witness
from tests.unit.swarm_checks import (
    SEQUENCE,
    WINDOW,
    acknowledged_and_listed,
    assert_flowing,
    banned_by,
    converge,
    forge,
    refusal_of,
    seats_of,
    stop_certificates,
)
from tests.unit.swarm_harness import Peer, Swarm, identity


def hand(source: Peer, certificate: Certificate, to: list[Peer]) -> None:
    """Send a certificate to some and not to others."""
    for peer in to:
        data = wire.seal(source.identity, source.swarm.manifest.run_id, next(SEQUENCE), certificate)
        source.swarm.send(source, peer.id, data)


@pytest.mark.parametrize("first", ["the better", "the worse"])
def test_an_owner_that_has_two_updates_certified(first: str) -> None:
    """Each of its helpers has signed one of them; a half of the swarm gets each. One stands, and the owner is out."""
    swarm = Swarm.running([0] * 6)
    slot = swarm.slot + 1
    go_on = stop_certificates(swarm)
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.1)
    liar, one, two = (swarm.by_id[peer] for peer in seats_of(swarm, slot))
    seats = [liar, one, two]
    honest = [peer for peer in swarm.peers if peer is not liar]
    better = forge(swarm, slot, seats, [liar, one], swarm.peers)
    worse = forge(swarm, slot, seats, [liar, two], [liar, two])
    early, late = (better, worse) if first == "the better" else (worse, better)
    hand(liar, early, honest[:2])
    hand(liar, late, honest[2:])
    go_on()
    swarm.run(1.5)  # heartbeats say who has which
    for peer in honest:
        assert banned_by(peer) == {liar.id}
        assert events.Equivocated(liar.id, slot) in peer.log
    liar.kill()
    converge(swarm, 2 * WINDOW)
    for peer in honest:
        assert peer.applied(better.verdict.fragment)[slot] == better.verdict.digest
    assert_flowing(swarm, slot + 3, swarm.slot - 1)
    acknowledged_and_listed(swarm)


def test_a_seat_that_votes_and_signs_something_else() -> None:
    """The owner has its vote, and then sees its name under another certificate."""
    swarm = Swarm.running([0] * 5)
    slot = swarm.slot + 1
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.3)
    owner, liar, other = (swarm.by_id[peer] for peer in seats_of(swarm, slot))
    current = owner.engine._rounds._rounds[slot]
    assert set(current.votes) == {owner.id, liar.id, other.id}
    alone = forge(swarm, slot, [liar], [liar], [liar])
    assert refusal_of(owner, other.number, alone) is Refusal.NOT_COMMITTEE, "it convinces nobody, and it convicts"
    assert banned_by(owner) == {liar.id}
    swarm.run(0.2)
    assert all(banned_by(peer) == {liar.id} for peer in swarm.peers if peer is not liar)


def test_the_halves_of_a_swarm_convict_nobody() -> None:
    """Two certificates for one slot, of committees that did not see each other: that is nobody's lie."""
    swarm = Swarm.running([0] * 6, rings=[0] * 12)
    swarm.cut(range(3), range(3, 6))
    swarm.run(limits.ROSTER_LIVE_SLOTS + 6)
    swarm.cuts.clear()
    converge(swarm, 8)
    assert sum(peer.undone for peer in swarm.peers) > 0
    assert not any(banned_by(peer) for peer in swarm.peers)


def test_restarts_convict_nobody() -> None:
    """Seats that die at any moment and come back sign nothing for a slot that they may have signed before."""
    swarm = Swarm.running([0] * 4, seed=3)
    for number in range(24):
        peer = swarm.peers[number % 4]
        swarm.run(0.07 + 0.31 * (number % 3))
        peer.kill()
        swarm.run(0.05)
        peer.restart()
    converge(swarm, 3 * WINDOW)
    assert not any(banned_by(peer) for peer in swarm.peers)


def test_what_was_seen_is_forgotten_when_slots_are_final() -> None:
    swarm = Swarm.running([0] * 4, slots=4 * WINDOW)
    for peer in swarm.peers:
        slots = set(peer.engine._witness._signed)
        assert slots
        assert min(slots) > swarm.slot - WINDOW - 1


def test_a_slot_takes_little_room() -> None:
    """However many names certificates bring, and however old the slots they are about."""
    witness = Witness(10)
    for slot in (10, 11, 12):
        for n in range(40):
            witness.note(messages.SignedVerdict(identity(n).peer_id, slot, b"body", b"signature"))
    assert {slot: len(signed) for slot, signed in witness._signed.items()} == {
        11: limits.WITNESSED_SIGNERS_MAX,
        12: limits.WITNESSED_SIGNERS_MAX,
    }
    other = messages.SignedVerdict(identity(0).peer_id, 11, b"another body", b"signature")
    assert witness.contradiction(other) is not None
    assert witness.contradiction(replace(other, slot=13)) is None
    assert witness.contradiction(replace(other, body=b"body")) is None


def test_a_proof_convinces_whoever_gets_it_and_only_of_that_peer() -> None:
    swarm = Swarm.running([0] * 3)
    slot = swarm.slot
    liar, bringer, peer = swarm.peers
    swarm.run_until(swarm.manifest.slot_start(slot + 1) + 0.3)
    first, second = (forge(swarm, slot + 1, [liar], [liar], sharers) for sharers in ([liar], [bringer]))
    proof = messages.Equivocation(first.signed()[0], second.signed()[0])
    assert refusal_of(peer, bringer.number, proof) is None
    assert banned_by(peer) == {liar.id}
