"""The other seats of a committee merge again what its owner proposes, and sign only what comes out the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

import pytest

from braniac.protocol import events, limits, messages, statements
from braniac.protocol.errors import Refusal
from braniac.protocol.identity import PeerId
from braniac.protocol.manifest import Manifest
from braniac.protocol.merge import Contribution, Merged, merge
from tests.unit import swarm_harness
from tests.unit.swarm_checks import (
    WINDOW,
    assert_flowing,
    converge,
    forge,
    one_more,
    owner_of,
    refusal_of,
    seats_of,
    stop_certificates,
)
from tests.unit.swarm_harness import Peer, Swarm


def another_clip(manifest: Manifest, fragment: int, merged: Merged) -> Merged:
    """The update is right, and one contributor is told that more was taken from it than was."""
    (peer, clip), *rest = merged.admitted
    return dataclasses.replace(merged, admitted=((peer, clip - 1), *rest))


def one_less(manifest: Manifest, fragment: int, merged: Merged) -> Merged:
    """A contribution is in the update and not on the list."""
    return dataclasses.replace(merged, admitted=merged.admitted[1:])


def one_refused(manifest: Manifest, fragment: int, merged: Merged) -> Merged:
    """A contribution is in the update, and is said to be none."""
    (peer, _), *rest = merged.admitted
    return dataclasses.replace(merged, admitted=tuple(rest), refused=((peer, Refusal.WRONG_SHAPE),))


Lie = Callable[[Manifest, int, Merged], Merged]
LIES: list[Lie] = [one_more, another_clip, one_less, one_refused]


def lie(peer: Peer, how: Lie) -> None:
    """From now on, whatever this owner merges is wrong; what it checks for others is right."""
    honest = peer._merge_now

    def wrong(due: events.MergeDue) -> None:
        merged = honest(due)
        assert merged is not None
        false = how(peer.swarm.manifest, due.fragment, merged)
        peer._put(false.update)
        peer.engine.merged(due.slot, false)

    peer._merge = wrong  # type: ignore[method-assign]


def certified(swarm: Swarm, slot: int) -> bool:
    return swarm.certified(slot, slot)[slot] is not None


@pytest.mark.parametrize("how", LIES)
def test_a_wrong_merge_is_not_signed(how: Lie) -> None:
    swarm = Swarm.running([0] * 4)
    liar = swarm.peers[3]
    lie(liar, how)
    first = swarm.slot + 1
    converge(swarm, 4 * WINDOW)
    owned = [slot for slot in range(first, swarm.slot - 2) if owner_of(swarm, slot) is liar]
    assert owned
    for slot in range(first, swarm.slot - 2):
        assert certified(swarm, slot) == (slot not in owned)
    for slot in owned:
        for seat in (swarm.by_id[peer] for peer in seats_of(swarm, slot)[1:]):
            assert seat.log.count(events.WrongMerge(liar.id, slot)) == 1
    assert sum(peer.engine.refused[Refusal.WRONG_MERGE] for peer in swarm.peers) >= len(owned)
    assert not any(peer.engine.roster.banned for peer in swarm.peers)


def test_a_swarm_of_two_signs_no_wrong_merge_either() -> None:
    swarm = Swarm.running([0] * 2)
    lie(swarm.peers[1], one_more)
    first = swarm.slot + 1
    converge(swarm, 3 * WINDOW)
    for slot in range(first, swarm.slot - 2):
        assert certified(swarm, slot) == (owner_of(swarm, slot) is swarm.peers[0])


def test_a_contributor_cannot_keep_its_payload_from_the_seats() -> None:
    """It gives it to the owner only; the seats have it from there."""
    swarm = Swarm.running([0] * 5)
    miser = swarm.peers[4]
    first = swarm.slot + 1
    for slot in range(first, first + 2 * WINDOW):
        owner = owner_of(swarm, slot)
        swarm.run_until(swarm.manifest.slot_start(slot) + 0.5)  # it has offered, and the owner has it
        swarm.cuts = {(miser.number, n) for n in range(4) if n != owner.number} if owner is not miser else set()
        swarm.run_until(swarm.manifest.slot_start(slot + 1) - 0.01)
        swarm.cuts = set()
    converge(swarm, 1)
    assert_flowing(swarm, first, swarm.slot - 3)
    for slot in range(first, first + 2 * WINDOW):
        certificate = swarm.peers[0].settled[slot].certificate
        assert certificate is not None
        assert certificate.verdict.share_of(miser.id) is not None


def test_an_owner_that_shows_nobody_the_payloads_gets_no_signature() -> None:
    """Its slot stays without a certificate, and the next owner's has one."""
    swarm = Swarm.running([0] * 4)
    slot = swarm.slot + 1
    while owner_of(swarm, slot) is owner_of(swarm, slot + 1):
        slot += 1
    swarm.run_until(swarm.manifest.slot_start(slot) - 0.01)
    seats = [swarm.by_id[peer] for peer in seats_of(swarm, slot)[1:]]
    for seat in seats:
        deny_payloads(seat, slot)
    converge(swarm, 3)
    assert not certified(swarm, slot)
    assert certified(swarm, slot + 1)
    assert not any(isinstance(event, events.WrongMerge) for seat in seats for event in seat.log)


def deny_payloads(seat: Peer, slot: int) -> None:
    """Nobody gives this peer what was offered for the slot."""
    pull = seat._pull

    def denied(digest: bytes, holders: Iterable[PeerId], *, patient: bool = False) -> bytes | None:
        if digest in {peer.offered.get(slot) for peer in seat.swarm.peers}:
            return None
        return pull(digest, holders, patient=patient)

    seat._pull = denied  # type: ignore[method-assign]


def test_payloads_that_cannot_be_read_are_fetched_once_more() -> None:
    swarm = Swarm.running([0] * 2)
    failed: list[int] = []

    def fail_once(seat: Peer) -> None:
        check = seat._check

        def forgetful(due: events.CheckDue) -> None:
            if due.slot in failed:
                return check(due)
            failed.append(due.slot)
            for _, _, digest in due.contributions:
                if digest != seat.offered[due.slot]:
                    del seat.blobs[digest]
            seat.engine.check_failed(due.slot)

        seat._check = forgetful  # type: ignore[method-assign]

    for peer in swarm.peers:
        fail_once(peer)
    first = swarm.slot + 1
    converge(swarm, 2 * WINDOW)
    assert_flowing(swarm, first, swarm.slot - 3)
    assert len(failed) >= 2 * WINDOW - 1


def test_a_seat_that_has_merged_serves_the_update() -> None:
    """The owner may die as soon as its certificate is out."""
    swarm = Swarm.running([0] * 5)
    slot = swarm.slot + 1
    owner = owner_of(swarm, slot)
    others = [peer for peer in swarm.peers if peer is not owner]
    while not any(slot in peer.engine.history._entries for peer in others):
        swarm.run(0.001)
        assert swarm.slot <= slot + 1
    owner.kill()
    swarm.run(2)
    assert all(peer.settled[slot].certificate is not None for peer in others)


# --- what was refused ------------------------------------------------------------------------------------------------


def test_a_screen_that_compares_contributions_is_repeated_by_the_seats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whom it leaves out depends on who is there: without those that were refused it would refuse others."""

    def leave_out_the_last(manifest: Manifest, fragment: int, contributions: list[Contribution]) -> Merged | None:
        *kept, last = sorted(contributions, key=lambda c: c.peer)
        merged = merge(manifest, fragment, kept)
        return dataclasses.replace(merged, refused=((last.peer, Refusal.MALFORMED),)) if merged else None

    monkeypatch.setattr(swarm_harness, "merge", leave_out_the_last)
    swarm = Swarm.running([0] * 4)
    first = swarm.slot + 1
    converge(swarm, 2 * WINDOW)
    assert_flowing(swarm, first, swarm.slot - 3)
    last = max(peer.id for peer in swarm.peers)
    for slot in range(first, swarm.slot - 2):
        certificate = swarm.peers[0].settled[slot].certificate
        assert certificate is not None
        assert len(certificate.verdict.shares) == 3
        assert [commitment.peer for commitment in certificate.verdict.refused] == [last]
        assert not swarm.by_id[last].settled[slot].merged


def test_nobody_is_sent_for_more_than_a_contribution_may_be() -> None:
    """An owner and a contributor who agree could have the seats download what they like."""
    swarm = Swarm.running([0] * 4)
    slot = swarm.slot + 1
    stop_certificates(swarm)
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.001)  # before any offer has arrived
    seats = [swarm.by_id[peer] for peer in seats_of(swarm, slot)]
    accomplice = next(peer for peer in swarm.peers if peer not in seats)
    good = forge(swarm, slot, seats, [seats[0]], [seats[0]]).verdict
    run_id = swarm.manifest.run_id
    for size, refusal in ((limits.BLOB_BYTES_MAX, Refusal.OVERSIZE), (9, None)):
        made = statements.make_commitment(accomplice.identity, run_id, slot, good.fragment, bytes(32), size, 1)
        listed = statements.make_verdict(
            run_id, slot, good.fragment, good.committee, good.shares, good.update_digest, good.update_bytes, [made]
        )
        assert refusal_of(seats[1], seats[0].number, messages.Proposal(listed)) is refusal


# --- many contributors -----------------------------------------------------------------------------------------------


def checks(swarm: Swarm, first: int) -> list[tuple[Peer, events.CheckDue]]:
    return [(p, e) for p in swarm.peers for e in p.log if isinstance(e, events.CheckDue) and e.slot >= first]


def test_of_large_merges_a_share_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each seat draws its own lots, so that its payloads per slot are as many as in a small swarm, on average."""
    monkeypatch.setattr(limits, "CHECKED_CONTRIBUTIONS", 2)
    swarm = Swarm.running([0] * 5)
    first = swarm.slot + 1
    swarm.run(40)
    assert_flowing(swarm, first, swarm.slot - 3)
    found = checks(swarm, first)
    assert 16 < len(found) < 48  # of 80 proposals to seats, each with probability 2/5; deterministic, for the keys are
    looked = [{peer.number for peer, due in found if due.slot == slot} for slot in range(first, first + 38)]
    assert {len(seats) for seats in looked} == {0, 1, 2}, "seats do not draw the same lots"


def test_an_owner_that_was_caught_is_checked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CHECKED_CONTRIBUTIONS", 2)
    swarm = Swarm.running([0] * 4)
    liar = swarm.peers[3]
    lie(liar, one_more)
    swarm.run(40)
    caught = {e.slot: p for p in swarm.peers for e in p.log if isinstance(e, events.WrongMerge)}
    assert caught
    first = min(caught)
    witness = caught[first]
    for slot in range(first + 1, swarm.slot - 1):
        seats = seats_of(swarm, slot)
        if seats[0] == liar.id and witness.id in seats:
            assert events.WrongMerge(liar.id, slot) in witness.log
