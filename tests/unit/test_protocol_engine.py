"""The protocol as a whole: swarms of real engines in virtual time, undisturbed, and with peers that die."""

from __future__ import annotations

import pytest

from braniac.protocol import codec, committee, events, ledger, limits, messages, statements
from braniac.protocol.engine import Engine
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.history import History
from braniac.protocol.messages import FragmentState
from braniac.protocol.spans import Spans
from tests.unit.swarm_checks import (
    WINDOW,
    acknowledged_and_listed,
    assert_flowing,
    converge,
    forge,
    owner_of,
    reached,
    refusal_of,
    seats_of,
    stop_certificates,
)
from tests.unit.swarm_harness import Peer, Swarm, identity

# --- nothing goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_slot_gets_its_certificate(size: int) -> None:
    swarm = Swarm.running([0] * size)
    swarm.refusals.clear()
    first = swarm.slot + 1
    converge(swarm, 2 * WINDOW)
    assert not swarm.refusals
    assert_flowing(swarm, first, swarm.slot - 1)
    for peer in swarm.peers:
        for slot in range(first, swarm.slot):
            event = peer.settled[slot]
            assert event.offered
            assert event.merged
            assert event.certificate is not None
            assert len(event.certificate.verdict.shares) == size
        assert peer.engine.history.acknowledged() > 0


def test_a_swarm_of_one_trains_as_if_it_were_alone() -> None:
    """Its weights change by its own steps and by nothing else; the anchor follows."""
    swarm = Swarm.running([0])
    peer = swarm.peers[0]
    steps = {f: books.steps.copy() for f, books in peer.books.items()}
    weights = {f: w.copy() for f, w in peer.weights.items()}
    converge(swarm, 9)
    for f in peer.held:
        moved = peer.weights[f] - weights[f]
        assert moved.tolist() == (peer.books[f].steps - steps[f]).tolist()
        assert any(peer.anchors[f] != swarm.initial(f))


def test_the_same_seed_gives_the_same_run() -> None:
    def run() -> list[bytes]:
        swarm = Swarm.running([0] * 3, seed=5)
        swarm.loss, swarm.duplication = 0.2, 0.2
        swarm.run(6)
        return [peer.states[f].digest for peer in swarm.peers for f in peer.held]

    assert run() == run()


def test_mixed_tiers() -> None:
    """Ring fragments go only to their holders, and small peers still sit in their committees."""
    swarm = Swarm.running([0, 1, 2, 3, 3], rings=(0, 3, 1, 2))
    first = swarm.slot
    converge(swarm, 8)
    assert_flowing(swarm, first, swarm.slot - 1)
    owners_outside = 0
    for slot in range(first, swarm.slot):
        ring = swarm.manifest.fragments[swarm.manifest.fragment_of(slot)].ring
        holders = {peer.id for peer in swarm.peers if peer.tier <= 3 - ring}
        certificate = next(peer.settled[slot].certificate for peer in swarm.peers if peer.settled[slot].certificate)
        assert {share.commitment.peer for share in certificate.verdict.shares} == holders
        owners_outside += certificate.verdict.owner not in holders
    assert owners_outside > 0
    for peer in swarm.peers:
        assert set(peer.anchors) == set(swarm.manifest.held(peer.tier))


def test_before_the_epoch_nothing_is_due_and_then_it_begins() -> None:
    swarm = Swarm([0, 0])
    swarm.now = swarm.manifest.slot_start(-6) + 0.5
    swarm.peers[0].found()
    swarm.peers[1].join()
    swarm.run_until(swarm.manifest.slot_start(0) - 0.001)
    assert not any(peer.offered for peer in swarm.peers)
    assert not any(peer.settled for peer in swarm.peers)
    assert not swarm.refusals
    swarm.run(8)
    assert all(peer.engine.ready for peer in swarm.peers)
    assert_flowing(swarm, 4, 6)


# --- peers that die --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["before it begins", "due", "collecting", "merging", "proposed"])
def test_an_owner_that_dies_costs_its_slot_and_nothing_else(phase: str) -> None:
    swarm = Swarm.running([0] * 4)
    slot = swarm.slot + 1
    owner = owner_of(swarm, slot)
    swarm.run_until(swarm.manifest.slot_start(slot) - 0.005)
    while not reached(phase, owner, slot):
        swarm.run(0.001)
        assert swarm.slot <= slot, "that phase was never reached"
    owner.kill()
    f = swarm.manifest.fragment_of(slot)
    before = {peer.number: peer.anchors[f].copy() for peer in swarm.live}
    swarm.run_until(swarm.manifest.slot_start(slot + 1) - 0.001)
    for peer in swarm.live:
        assert (peer.anchors[f] == before[peer.number]).all(), "a slot without a certificate changed an anchor"
    converge(swarm, limits.ROSTER_LIVE_SLOTS + WINDOW + 4)
    certified = swarm.certified(slot, swarm.slot - 1)
    assert certified[slot] is None
    for peer in swarm.live:
        assert peer.settled[slot] == events.SlotSettled(slot, f, None, offered=True, merged=False)
    # While it still counts as alive it costs the slots it owns; of the others two of three seats remain.
    everybody = [peer.id for peer in swarm.peers]
    for later, digest in certified.items():
        if committee.committee(swarm.manifest.run_id, later, everybody)[0] != owner.id:
            assert digest is not None, f"slot {later} is missing, and it had a living owner"
    assert_flowing(swarm, slot + limits.ROSTER_LIVE_SLOTS + 2, swarm.slot - 1)


def test_work_that_was_not_merged_is_offered_again() -> None:
    swarm = Swarm.running([0] * 3)
    slot = swarm.slot + 1
    owner = owner_of(swarm, slot)
    swarm.run_until(swarm.manifest.slot_start(slot) - 0.005)
    owner.kill()
    for peer in swarm.live:
        peer.trains = False
    f = swarm.manifest.fragment_of(slot)
    owed = {peer.number: peer.books[f].owed() for peer in swarm.live}
    swarm.run(1)
    for peer in swarm.live:
        assert (peer.books[f].owed() == owed[peer.number]).all()
        assert (swarm.sent[peer.offered[slot]].values != 0).any()
    converge(swarm, 3 * WINDOW)
    for peer in swarm.live:
        again = [peer.settled[s].merged for s in range(slot + WINDOW, swarm.slot - 2, WINDOW)]
        assert any(again)
        assert abs(peer.books[f].owed()).sum() < abs(owed[peer.number]).sum()


@pytest.mark.parametrize("number", range(3))
def test_kill_and_restart(number: int) -> None:
    """Any peer, the founder too: its ledger holds, and it agrees again within three slots."""
    swarm = Swarm.running([0] * 3, seed=number)
    peer = swarm.peers[number]
    swarm.run(1 + 0.13 * number)
    peer.kill()
    swarm.run(2)
    peer.restart()
    assert peer.engine.ready
    converge(swarm, 3)
    back = swarm.slot
    converge(swarm, 2 * WINDOW)
    assert_flowing(swarm, back, swarm.slot - 1)
    assert peer.settled[swarm.slot - 1].merged


def test_kill_at_every_moment_of_a_slot() -> None:
    """A contribution that was offered before the kill is acknowledged after it, and none is counted twice."""
    swarm = Swarm.running([0] * 3)
    peer = swarm.peers[1]
    for moment in range(8):
        swarm.run_until(swarm.manifest.slot_start(swarm.slot + 1) + 0.01 + 0.02 * moment)
        peer.kill()
        swarm.run(0.3)
        peer.restart()
        swarm.run(1)
    converge(swarm, 3)
    acknowledged_and_listed(swarm)


def test_everybody_is_killed_and_comes_back() -> None:
    swarm = Swarm.running([0] * 3)
    swarm.run(2.4)
    for peer in swarm.peers:
        peer.kill()
    swarm.run(5)
    for peer in swarm.peers:
        peer.restart()
        swarm.run(0.2)
    converge(swarm, 5)
    first = swarm.slot
    converge(swarm, 2 * WINDOW)
    assert_flowing(swarm, first, swarm.slot - 1)
    acknowledged_and_listed(swarm)


def test_a_goodbye_frees_the_seats_at_once() -> None:
    swarm = Swarm.running([0] * 4)
    leaver = swarm.peers[2]
    swarm.run(0.5)
    leaver.engine.retire()
    leaver.pump()
    swarm.run(1)
    leaver.engine.goodbye()
    leaver.pump()
    leaver.kill()
    swarm.run(1)
    first = swarm.slot
    converge(swarm, WINDOW)
    assert_flowing(swarm, first, swarm.slot - 1)
    for peer in swarm.live:
        assert events.PeerLeft(leaver.id, said_goodbye=True) in peer.log
        assert events.PeerLeft(leaver.id, said_goodbye=False) not in peer.log


def test_an_update_that_nobody_has_any_more_changes_nothing() -> None:
    """All who merged lost their disks: the certificate stands, cannot be applied, and is forgotten."""
    swarm = Swarm.running([0] * 3)
    slot = swarm.slot + 1
    owner = owner_of(swarm, slot)
    swarm.run_until(swarm.manifest.slot_start(slot) - 0.005)
    while not reached("settled", owner, slot):
        swarm.run(0.001)
    certificate = owner.settled[slot].certificate
    assert certificate is not None
    owner.kill()
    for seat in swarm.live:
        seat.blobs.pop(certificate.verdict.update_digest, None)
    f = swarm.manifest.fragment_of(slot)
    before = [peer.states[f] for peer in swarm.live]
    swarm.run(0.5)
    orphans = [[c.verdict.slot for c in peer.engine.history.missing_updates()] for peer in swarm.live]
    assert orphans == [[slot], [slot]]
    assert [peer.states[f] for peer in swarm.live] == before
    swarm.run(limits.HISTORY_WINDOWS * WINDOW)
    first = swarm.slot
    converge(swarm, WINDOW)
    assert_flowing(swarm, first, swarm.slot - 1)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refusals_have_their_reasons_and_are_counted() -> None:
    swarm = Swarm.running([0] * 4)
    while swarm.peers[0].id not in seats_of(swarm, swarm.slot + 1):
        swarm.run(1)
    peer, run_id, slot = swarm.peers[0], swarm.manifest.run_id, swarm.slot
    seat = slot + 1
    f = swarm.manifest.fragment_of(seat)

    def offer(by: int, at: int = seat, fragment: int = f, size: int = 9) -> messages.Offer:
        return messages.Offer(statements.make_commitment(identity(by), run_id, at, fragment, bytes(32), size, 5))

    too_late = seat - limits.PROPOSAL_OPEN_SLOTS - 2
    stranger = messages.Goodbye(slot)
    assert refusal_of(peer, 1, offer(2)) is Refusal.BAD_SIGNATURE
    assert refusal_of(peer, 99, stranger) is Refusal.UNKNOWN_PEER
    assert refusal_of(peer, 1, offer(1, fragment=(f + 1) % WINDOW)) is Refusal.MALFORMED
    assert refusal_of(peer, 1, offer(1, size=1 << 20)) is Refusal.OVERSIZE
    assert refusal_of(peer, 1, offer(1, at=too_late, fragment=too_late % WINDOW)) is Refusal.STALE
    assert refusal_of(peer, 1, offer(1, at=slot + 2, fragment=(slot + 2) % WINDOW)) is Refusal.EARLY
    assert refusal_of(peer, 1, messages.Heartbeat(slot, 9, 0)) is Refusal.MALFORMED
    assert refusal_of(peer, 1, messages.Vote(too_late, bytes(32), bytes(64))) is Refusal.STALE
    assert refusal_of(peer, 0, stranger) is Refusal.REPLAYED
    heartbeat = messages.Heartbeat(slot, 0, 0)
    assert refusal_of(peer, 98, heartbeat, sequence=7) is None
    assert refusal_of(peer, 98, heartbeat, sequence=7) is Refusal.REPLAYED
    assert refusal_of(peer, 98, messages.CertificateRequest((messages.CertificateName(3, bytes(32)),))) is None
    for garbage in (b"", b"garbage", bytes(1 << 20 | 1)):
        with pytest.raises(WireError):
            peer.engine.receive(garbage, swarm.now)
    swarm.check_counters()
    assert peer.engine.refused[Refusal.MALFORMED] >= 4
    assert peer.engine.refused[Refusal.OVERSIZE] == 2


def test_proposals_are_signed_only_if_they_may_be() -> None:
    swarm = Swarm.running([0] * 4)
    slot = swarm.slot + 1
    stop_certificates(swarm)
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.2)
    owner, seat, other = (swarm.by_id[peer] for peer in seats_of(swarm, slot))
    outside = next(peer for peer in swarm.peers if peer.id not in seats_of(swarm, slot))
    good = forge(swarm, slot, [owner, seat, other], [owner], [owner, seat]).verdict
    assert refusal_of(outside, owner.number, messages.Proposal(good)) is Refusal.NOT_COMMITTEE
    assert refusal_of(seat, other.number, messages.Proposal(good)) is Refusal.NOT_COMMITTEE
    shuffled = forge(swarm, slot, [owner, other, seat], [owner], [owner, seat]).verdict
    assert refusal_of(seat, owner.number, messages.Proposal(shuffled)) is Refusal.NOT_COMMITTEE
    stranger = Peer(swarm, 50, 0)
    stranger.offered, stranger.blobs = owner.offered, owner.blobs
    unknown = forge(swarm, slot, [owner, seat, other], [owner], [owner, stranger]).verdict
    assert refusal_of(seat, owner.number, messages.Proposal(unknown)) is Refusal.UNKNOWN_PEER
    assert refusal_of(seat, owner.number, messages.Proposal(good)) is None
    assert refusal_of(seat, owner.number, messages.Proposal(good)) is None, "a vote that was lost is cast again"
    second = forge(swarm, slot, [owner, seat, other], [owner], [owner, other]).verdict
    assert refusal_of(seat, owner.number, messages.Proposal(second)) is Refusal.CONFLICT


def test_a_restarted_seat_does_not_sign_for_slots_it_may_have_signed() -> None:
    swarm = Swarm.running([0] * 3)
    slot = swarm.slot + 1
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.2)
    owner, seat, other = (swarm.by_id[peer] for peer in seats_of(swarm, slot))
    verdict = forge(swarm, slot, [owner, seat, other], [owner], [owner]).verdict
    seat.kill()
    seat.restart()
    swarm.run(0.2)
    assert refusal_of(seat, owner.number, messages.Proposal(verdict)) is Refusal.NOT_READY


def test_nothing_is_signed_before_it_is_durable_that_it_may_have_been() -> None:
    """An earlier life may have signed up to slot 9, whatever the clock says; and the disk is slow now."""
    manifest = Swarm([0]).manifest

    def due(engine: Engine, last_slot: int) -> list[int]:
        for slot in range(engine.slot + 1, last_slot + 1):
            engine.handle_timer(manifest.slot_start(slot))
        found = []
        while event := engine.next_event():
            found += [event.slot] if isinstance(event, events.FragmentDue) else []
        return found

    history = History(manifest)
    history.begin(manifest.held(0))
    now = manifest.slot_start(4)
    engine = Engine(manifest, identity(0), 0, incarnation=2, now=now, history=history, signed=Spans(((5, 9),)))
    for fragment in manifest.held(0):
        engine.anchor_known(FragmentState(fragment, -1, bytes(32)))
    engine.set_ready()
    assert due(engine, 12) == []
    engine.may_sign(Spans(((5, 9), (12, 14))))
    assert due(engine, 16) == [13, 14]


def test_a_start_forgets_what_went_beyond_the_horizon_meanwhile() -> None:
    """Or it would hold that and all that it is told before its first slot begins."""
    swarm = Swarm.running([0, 0])
    swarm.run(2 * swarm.manifest.window)
    history = swarm.peers[0].engine.history
    held = [name.slot for name in history.recent(swarm.slot)]
    late_slot = held[-1] + history.horizon
    again = History.from_json(swarm.manifest, history.to_json())
    now = swarm.manifest.slot_start(late_slot) + 0.5
    Engine(swarm.manifest, identity(0), 0, incarnation=2, now=now, history=again)
    assert [slot for slot in held if again.entry(slot) is not None] == held[:-1]


def test_a_start_in_the_past_signs_nothing_that_an_earlier_one_may_have_signed() -> None:
    """The clock lost its time and nobody is there to ask: alone, it would decide every slot once more."""
    swarm = Swarm.running([0])
    alone = swarm.peers[0]
    alone.kill()
    last = swarm.slot + 6
    alone.signed = Spans(((swarm.slot, last),))
    alone.restart()
    swarm.run(12)
    assert not any(swarm.certified(last - 6 + 2, last).values())
    assert_flowing(swarm, last + 1, swarm.slot - 2)


def test_a_life_an_hour_ahead_costs_no_hour_of_silence() -> None:
    """Only what was then signed for is left to others, once its time has come."""
    swarm = Swarm.running([0])
    alone = swarm.peers[0]
    alone.kill()
    ahead = range(swarm.slot + 20, swarm.slot + 24)
    alone.signed = Spans().adding(0, swarm.slot).adding(ahead[0], ahead[-1])
    alone.restart()
    swarm.run(40)
    assert_flowing(swarm, ahead[0] - 15, ahead[0] - 1)
    assert not any(swarm.certified(ahead[0], ahead[-1]).values())
    assert_flowing(swarm, ahead[-1] + 1, swarm.slot - 2)


# --- fragments that are lost -----------------------------------------------------------------------------------------


def test_a_diverged_anchor_is_replaced_by_the_majoritys() -> None:
    """Bits that flipped on one disk: found within two windows, downloaded, and all agree again."""
    swarm = Swarm.running([0] * 4)
    victim = swarm.peers[1]
    victim.anchors[1] = victim.anchors[1] + 1
    victim.weights[1] = victim.weights[1] + 1
    victim.engine.anchor_known(victim._note_state(1, victim.states[1].slot))
    converge(swarm, 3 * WINDOW)
    assert [e.state.fragment for e in victim.log[-400:] if isinstance(e, events.FragmentLost)][-1] == 1
    assert victim.engine._agreement.disagreements >= 1


def test_an_anchor_that_the_disk_has_lost_is_downloaded() -> None:
    swarm = Swarm.running([0] * 3)
    victim = swarm.peers[1]
    victim.engine.fragment_damaged(1)
    assert 1 not in victim.engine.anchors()
    assert victim.engine.ready
    converge(swarm, WINDOW)
    assert [e.state.fragment for e in victim.log if isinstance(e, events.FragmentLost)][-1] == 1
    assert 1 in victim.engine.anchors()


def test_an_update_in_the_queue_is_not_applied_to_the_downloaded_anchor() -> None:
    """The download holds it already: applied once more it would split the swarm again."""
    swarm = Swarm.running([0] * 4)
    victim = swarm.peers[1]
    slot = swarm.slot + 1
    f = swarm.manifest.fragment_of(slot)
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.3)
    queued = events.UpdateDue(swarm.peers[0].settled[slot].certificate, None)  # type: ignore[arg-type]
    lost = events.FragmentLost(swarm.peers[0].states[f], (swarm.peers[0].id,))
    victim.engine._events.append(queued)
    victim.engine._agreement.mine.pop(f)
    victim.engine._inbox.lose(lost)
    assert list(victim.engine._events) == [lost]
    victim.engine.anchor_moved(queued, victim.states[f])  # the daemon was about to finish another one
    assert f not in victim.engine.anchors()
    assert f not in victim.engine.history.last
    converge(swarm, WINDOW)


def test_a_fragment_that_was_lost_when_the_state_was_stored_is_downloaded_after_the_restart() -> None:
    swarm = Swarm.running([0] * 4)
    victim = swarm.peers[1]
    victim.engine.history.lose(2)
    victim.snapshot()
    victim.kill()
    victim.restart()
    for state in victim.states.values():  # a daemon that announces whatever it finds
        victim.engine.anchor_known(state)
    assert set(victim.engine.anchors()) == {0, 1}
    converge(swarm, 4)
    assert victim.engine.ready
    assert set(victim.engine.anchors()) == {0, 1, 2}


def test_offers_are_made_once_per_slot_even_if_the_clock_went_back() -> None:
    swarm = Swarm.running([0] * 2)
    peer = swarm.peers[1]
    swarm.run(2)
    peer.snapshot()
    offered = set(peer.offered)
    peer.kill()
    swarm.peers[0].pause()
    swarm.now -= 4
    peer.restart()
    swarm.run(4.5)  # the harness asserts that no slot is offered twice
    assert offered <= set(peer.offered)


def test_nothing_of_a_certificate_reaches_a_weight_unchecked() -> None:
    """An update that would push an anchor out of range raises where it is applied (I4), and only there."""
    swarm = Swarm.running([0])
    peer = swarm.peers[0]
    peer.anchors[0][:] = limits.ANCHOR_MAX
    size = swarm.manifest.fragments[0].layout.size
    payload, sent = codec.encode_topk(swarm.manifest.fragments[0].layout, swarm.manifest.down, swarm.initial(0) ** 2)
    assert len(payload) > 0
    assert len(sent) <= size
    with pytest.raises(WireError):
        ledger.move_anchor(peer.anchors[0], ledger.settle(sent, None))
