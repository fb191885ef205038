"""Forged certificates, two certificates for one slot, equivocators, payloads that are none."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from braniac.protocol import events, limits, messages
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.merge import Contribution, merge
from tests.unit.swarm_checks import (
    WINDOW,
    acknowledged_and_listed,
    announce,
    assert_flowing,
    converge,
    forge,
    owner_of,
    reached,
    refusal_of,
    seats_of,
    stop_certificates,
    two_payloads,
)
from tests.unit.swarm_harness import Swarm

# --- two certificates for one slot -----------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", ["signatures", "weight", "hash"])
def test_two_certificates_for_one_slot(apart: str) -> None:
    """Two majorities with different rosters: everybody ends with the better one, whatever they saw first."""
    swarm = Swarm.running([0] * 6)
    slot = swarm.slot + 1
    go_on = stop_certificates(swarm)
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.1)
    one, two = swarm.peers[:3], swarm.peers[3:]
    signers = one if apart == "signatures" else one[:2]
    sharers = swarm.peers if apart == "weight" else one
    better = forge(swarm, slot, one, signers, sharers)
    worse = forge(swarm, slot, two, two[:2], two[:2] if apart != "hash" else one)
    if apart == "hash":
        worse, better = sorted((better, worse), key=messages.Certificate.rank)
    assert better.rank() > worse.rank()
    for group, certificate in ((one, better), (two, worse)):
        for peer in group:
            peer.engine._certificates.check(certificate, peer.engine.slot)
            peer.engine._certificates.take(certificate, peer.engine.slot)
            peer.pump()
    swarm.run(0.3)
    for peer in two:
        assert peer.applied(worse.verdict.fragment)[slot] == worse.verdict.digest
    swarm.run_until(swarm.manifest.slot_start(slot + 1) - 0.01)
    go_on()
    converge(swarm, 2)
    for peer in swarm.peers:
        assert peer.applied(better.verdict.fragment)[slot] == better.verdict.digest
        assert peer.undone == (peer in two)
    acknowledged_and_listed(swarm)


def test_replaced_across_a_kill() -> None:
    """The loser was applied and stored; after the restart it is undone exactly, with what it had taken."""
    swarm = Swarm.running([0] * 6)
    slot = swarm.slot + 1
    go_on = stop_certificates(swarm)
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.1)
    one, two = swarm.peers[:3], swarm.peers[3:]
    better, worse = forge(swarm, slot, one, one, swarm.peers), forge(swarm, slot, two, two[:2], two)
    victim = two[2]
    victim.engine._certificates.take(worse, victim.engine.slot)
    victim.pump()
    swarm.run(0.2)
    assert victim.applied(worse.verdict.fragment)[slot] == worse.verdict.digest
    victim.snapshot()
    victim.kill()
    for peer in one:
        peer.engine._certificates.take(better, peer.engine.slot)
        peer.pump()
    go_on()
    swarm.run(1)
    victim.restart()
    converge(swarm, 3)
    assert victim.undone == 1
    assert victim.applied(better.verdict.fragment)[slot] == better.verdict.digest
    acknowledged_and_listed(swarm)


def test_nobody_certifies_alone_what_others_should_have_seen() -> None:
    """One signature is a majority of one seat; with others around it is worth nothing."""
    swarm = Swarm.running([0] * 4)
    slot = swarm.slot + 1
    stop_certificates(swarm)
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.1)
    liar = swarm.peers[3]
    lie = forge(swarm, slot, [liar], [liar], [liar])
    for peer in swarm.peers[:3]:
        with pytest.raises(WireError) as caught:
            peer.engine._certificates.check(lie, peer.engine.slot)
        assert caught.value.refusal is Refusal.NOT_COMMITTEE


def test_dead_gone_and_joining_peers_do_not_crowd_out_the_signers() -> None:
    """Ranks are taken among those who could have had a seat: 42 others are known, and certificates go on."""
    swarm = Swarm.running([0] * 3)
    goodbye = messages.Goodbye(swarm.slot)
    for n in range(100, 142):
        heartbeat = messages.Heartbeat(swarm.slot, 0, -1 if n % 3 == 0 else 0)
        for peer in swarm.peers:
            assert refusal_of(peer, n, heartbeat) is None
            assert n % 3 != 1 or refusal_of(peer, n, goodbye) is None
    swarm.run(limits.ROSTER_LIVE_SLOTS + 1)
    first = swarm.slot
    assert all(len(peer.engine.roster) == 44 for peer in swarm.peers)
    converge(swarm, WINDOW)
    assert_flowing(swarm, first, swarm.slot - 1)


# --- peers that lie --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["to the owner", "to a seat", "one to the owner, one to the seats"])
def test_an_equivocator_is_banned_by_all_and_nothing_of_it_is_merged(how: str) -> None:
    swarm = Swarm.running([0] * 5)
    liar = swarm.peers[4]
    slot = next(s for s in range(swarm.slot + 1, swarm.slot + 9) if liar.id not in seats_of(swarm, s))
    owner, *others = (swarm.by_id[peer] for peer in seats_of(swarm, slot))
    liar.engine.offer = lambda *_, **__: None  # type: ignore[method-assign]
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.002)
    first, second = two_payloads(swarm, slot)
    match how:
        case "to the owner":
            announce(liar, slot, first, owner)
            announce(liar, slot, second, owner)
        case "to a seat":
            announce(liar, slot, first, others[0])
            announce(liar, slot, second, others[0])
        case _:
            announce(liar, slot, first, owner)
            for seat in others:
                announce(liar, slot, second, seat)
    honest = swarm.peers[:4]
    swarm.run(1.5)
    for peer in honest:
        assert liar.id in peer.engine.roster.banned
        assert events.Equivocated(liar.id, slot) in peer.log
        assert sum(isinstance(event, events.Equivocated) for event in peer.log) == 1
    liar.kill()
    converge(swarm, 2 * WINDOW)
    assert_flowing(swarm, slot + 2, swarm.slot - 1)
    for peer in honest:
        for later in range(slot, swarm.slot):
            certificate = peer.settled[later].certificate
            assert certificate is None or certificate.verdict.share_of(liar.id) is None
        assert peer.engine.refused[Refusal.EQUIVOCATION] > 0


def test_a_ban_reaches_whoever_joins_later() -> None:
    swarm = Swarm.running([0] * 4)
    liar = swarm.peers[3]
    slot = swarm.slot + 1
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.002)
    for payload in two_payloads(swarm, slot):
        for peer in swarm.peers[:3]:
            announce(liar, slot, payload, peer)
    swarm.run(1)
    joiner = swarm.add()
    joiner.join()
    swarm.run(1)
    assert liar.id in joiner.engine.roster.banned


@pytest.mark.parametrize("first", ["its own offer", "the proposal"])
def test_a_peer_whose_name_another_uses_is_told_and_does_not_crash(first: str) -> None:
    """A copy contributes in its name, and the proposal that holds it comes here: before or after its own offer."""
    swarm = Swarm.running([0] * 2)
    owner, twin = swarm.peers
    slot = next(s for s in range(swarm.slot + 1, swarm.slot + 9) if seats_of(swarm, s)[0] == owner.id)
    own_offer, twin.engine.offer = twin.engine.offer, lambda *_, **__: None  # type: ignore[method-assign]
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.002)
    own, copied = two_payloads(swarm, slot)
    announce(twin, slot, copied, owner)  # from now on the owner listens to the copy
    if first == "its own offer":
        own_offer(slot, hashlib.sha256(own).digest(), len(own), 10)
    swarm.run(0.9)
    if first == "the proposal":
        own_offer(slot, hashlib.sha256(own).digest(), len(own), 10)
        twin.pump()
    assert events.IdentityShared(slot) in twin.log
    assert not any(twin.id in peer.engine.roster.banned for peer in swarm.peers)


def test_an_equivocator_found_out_while_the_merge_runs() -> None:
    """The merge is repeated without it: its work is not in the update, not only not in the list."""
    swarm = Swarm.running([0] * 5)
    liar = swarm.peers[4]
    slot = next(s for s in range(swarm.slot + 1, swarm.slot + 9) if liar.id not in seats_of(swarm, s))
    owner = swarm.by_id[seats_of(swarm, slot)[0]]
    liar.engine.offer = lambda *_, **__: None  # type: ignore[method-assign]
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.002)
    first, second = two_payloads(swarm, slot)
    announce(liar, slot, first, owner)
    while not reached("merging", owner, slot):
        swarm.run(0.001)
        assert swarm.slot == slot
    announce(liar, slot, second, owner)
    swarm.latency_s = (0.001, 0.002)
    announce(liar, slot, second, owner)
    liar.kill()
    swarm.run(0.9)
    merges = [event for event in owner.log if isinstance(event, events.MergeDue) and event.slot == slot]
    assert [len(event.contributions) for event in merges] == [5, 4]
    certificate = owner.settled[slot].certificate
    assert certificate is not None
    assert len(certificate.verdict.shares) == 4
    f = swarm.manifest.fragment_of(slot)
    without = [Contribution(p, t, owner.blobs[d]) for p, t, d in merges[0].contributions if p != liar.id]
    honest = merge(swarm.manifest, f, without)
    assert honest is not None
    assert certificate.verdict.update_digest == honest.digest


def test_a_proposal_with_work_of_a_banned_peer_is_given_up() -> None:
    """The seats have not heard of the ban and would sign; the owner knows better."""
    swarm = Swarm.running([0] * 5)
    liar = swarm.peers[4]
    slot = next(s for s in range(swarm.slot + 1, swarm.slot + 9) if liar.id not in seats_of(swarm, s))
    owner, *others = (swarm.by_id[peer] for peer in seats_of(swarm, slot))
    swarm.run_until(swarm.manifest.slot_start(slot) - 0.005)
    swarm.cuts = {(peer.number, seat.number) for peer in swarm.peers for seat in others}
    while not reached("proposed", owner, slot):
        swarm.run(0.001)
        assert swarm.slot <= slot
    announce(liar, slot, two_payloads(swarm, slot)[0], owner)
    swarm.run(0.12)
    assert liar.id in owner.engine.roster.banned
    swarm.cuts.clear()
    swarm.run(2)
    assert all(peer.settled.get(slot, None) is None or peer.settled[slot].certificate is None for peer in swarm.peers)


def test_a_payload_that_is_garbage_is_refused_with_its_code() -> None:
    swarm = Swarm.running([0] * 4)
    vandal = swarm.peers[3]
    vandal._offer = lambda slot, f: vandal.engine.offer(slot, vandal._put(b"garbage"), 7, 5)  # type: ignore[method-assign]
    first = swarm.slot + 1
    converge(swarm, WINDOW + 2)
    assert_flowing(swarm, first, swarm.slot - 1)
    for peer in swarm.peers:
        for slot in range(first, swarm.slot):
            certificate = peer.settled[slot].certificate
            assert certificate is not None
            assert certificate.verdict.share_of(vandal.id) is None
    refused = sum((peer.engine.refused_payloads for peer in swarm.peers), Counter())
    assert set(refused) == {Refusal.WRONG_SHAPE}


def test_a_payload_that_cannot_be_had_closes_the_slot_without_it() -> None:
    """The owner waits half a slot for it, and asks for no timer that has already gone off."""
    swarm = Swarm.running([0] * 4)
    miser = swarm.peers[3]
    miser._offer = lambda slot, f: miser.engine.offer(slot, hashlib.sha256(b"%d" % slot).digest(), 9, 5)  # type: ignore
    first = swarm.slot + 1
    swarm.run(WINDOW + 2)
    for slot in range(first, swarm.slot - 1):
        if owner_of(swarm, slot) is not miser:
            certificate = swarm.peers[0].settled[slot].certificate
            assert certificate is not None
            assert certificate.verdict.share_of(miser.id) is None


def test_an_owner_with_commitments_and_no_payload_does_not_spin() -> None:
    swarm = Swarm.running([0] * 2)
    for peer in swarm.peers:
        peer._fetch = lambda wanted: None  # type: ignore[method-assign]
    swarm.run(4)  # the harness asserts after every timer that the next one lies ahead
    assert all(peer.settled[swarm.slot - 3].certificate is None for peer in swarm.peers)
