"""The protocol as a whole: swarms of real engines in virtual time, with everything going wrong that may go wrong."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable

import pytest

from braniac.protocol import codec, committee, events, ledger, limits, messages, statements, wire
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.merge import Contribution, merge
from tests.unit.swarm_harness import Peer, Swarm, identity

WINDOW = 3  # fragments in the harness's default run


def converge(swarm: Swarm, slots: float) -> None:
    """Let time pass until just before the end of a slot, and check everything."""
    swarm.run(slots)
    swarm.run_until(swarm.manifest.slot_start(swarm.slot + 1) - 0.001)
    swarm.check()


def owner_of(swarm: Swarm, slot: int) -> Peer:
    """Who will own a slot if all live peers are ready."""
    ready = [peer.id for peer in swarm.live]
    return swarm.by_id[committee.committee(swarm.manifest.run_id, slot, ready)[0]]


def assert_flowing(swarm: Swarm, first: int, last: int) -> None:
    missing = [slot for slot, digest in swarm.certified(first, last).items() if digest is None]
    assert not missing, f"slots without a certificate: {missing}"


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
    assert not swarm.refusals
    swarm.run(8)
    assert all(peer.engine.ready for peer in swarm.peers)
    assert_flowing(swarm, 4, 6)


# --- peers that die --------------------------------------------------------------------------------------------------


def reached(phase: str, owner: Peer, slot: int) -> bool:
    """Whether the owner stands in that phase of its slot."""
    seen = [type(event) for event in owner.log if getattr(event, "slot", None) == slot]
    current = owner.engine._rounds._rounds.get(slot)
    match phase:
        case "before it begins":
            return True
        case "due":
            return events.FragmentDue in seen
        case "collecting":
            return current is not None and bool(current.commitments)
        case "merging":
            return events.MergeDue in seen
        case "proposed":
            return current is not None and current.verdict is not None
    return slot in owner.settled


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


def acknowledged_and_listed(swarm: Swarm) -> None:
    """Every applied certificate that lists a peer has taken exactly that peer's listed payload from it."""
    checked = 0
    for peer in swarm.live:
        for entry in peer.engine.history._confirmed.values():
            share = entry.certificate.verdict.share_of(peer.id)
            listed = share.commitment.payload_digest if share else None
            assert entry.acknowledged == listed
            assert listed in (None, peer.offered.get(entry.certificate.verdict.slot))
            checked += listed is not None
    assert checked > 0


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
    """The owner certified and died with its disk: the certificate stands, cannot be applied, and is forgotten."""
    swarm = Swarm.running([0] * 3)
    slot = swarm.slot + 1
    owner = owner_of(swarm, slot)
    swarm.run_until(swarm.manifest.slot_start(slot) - 0.005)
    while not reached("settled", owner, slot):
        swarm.run(0.001)
    owner.kill()
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


# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_loss_and_duplication(seed: int) -> None:
    swarm = Swarm.running([0] * 4, seed=seed)
    swarm.loss, swarm.duplication = 0.2, 0.3
    swarm.refusals.clear()
    first = swarm.slot + 1
    swarm.run(4 * WINDOW)
    flowing = [digest is not None for digest in swarm.certified(first, swarm.slot - 2).values()]
    assert sum(flowing) > len(flowing) // 2
    swarm.loss = swarm.duplication = 0.0
    converge(swarm, 2)
    acknowledged_and_listed(swarm)
    refused = Counter(error.refusal for _, error in swarm.refusals)
    assert refused[Refusal.REPLAYED] > 20
    assert set(refused) <= {Refusal.REPLAYED, Refusal.NOT_COMMITTEE, Refusal.CONFLICT}


def test_a_network_that_is_slower_than_a_slot() -> None:
    """Whatever arrives late is refused or ignored; nothing breaks, and it flows again when it is fast again."""
    swarm = Swarm.running([0] * 3)
    swarm.latency_s = (0.5, 2.5)
    swarm.run(2 * WINDOW)
    swarm.latency_s = (0.01, 0.04)
    swarm.run(3)
    first = swarm.slot
    converge(swarm, WINDOW + 1)
    assert_flowing(swarm, first, swarm.slot - 1)
    acknowledged_and_listed(swarm)


@pytest.mark.parametrize(("slots", "sizes"), [(3, (2, 3)), (12, (1, 2)), (66, (1, 1))])
def test_a_partition_heals(slots: int, sizes: tuple[int, int]) -> None:
    """The smaller half goes on by itself, and takes the larger half's anchors in the end."""
    size = sum(sizes)
    swarm = Swarm.running([0] * size)
    swarm.cut(range(sizes[0]), range(sizes[0], size))
    swarm.run(slots)
    swarm.cuts.clear()
    if slots > 64:
        swarm.run(64)  # who was silent for so long is tried only once in a while
    first = swarm.slot + 4
    converge(swarm, 4 * WINDOW + 4)
    assert_flowing(swarm, first, swarm.slot - 1)
    certificate = swarm.peers[0].settled[swarm.slot - 1].certificate
    assert certificate is not None
    assert len(certificate.verdict.shares) == size


def test_peers_that_missed_each_other_are_introduced() -> None:
    """Else their committees would differ for good, long after the network is well again."""
    swarm = Swarm([0] * 4)
    swarm.cut((1,), (3,))
    swarm.peers[0].found()
    for peer in swarm.peers[1:]:
        peer.join()
    swarm.run(20)
    one, other = swarm.peers[1], swarm.peers[3]
    assert one.engine.roster.get(other.id) is None
    swarm.cuts.clear()
    swarm.run(5)
    assert one.engine.roster.get(other.id) is not None
    assert other.engine.roster.get(one.id) is not None
    first = swarm.slot
    converge(swarm, WINDOW)
    assert_flowing(swarm, first, swarm.slot - 1)


def test_a_peer_that_hears_but_is_not_heard() -> None:
    swarm = Swarm.running([0] * 4)
    swarm.cuts = {(3, other) for other in range(3)}
    swarm.run(limits.ROSTER_LIVE_SLOTS + 3)
    first = swarm.slot
    swarm.run(WINDOW)
    swarm.check_counters()
    found = [slot for slot, digest in swarm.certified(first, swarm.slot - 1).items() if digest]
    assert found == list(range(first, swarm.slot))
    swarm.cuts.clear()
    converge(swarm, 3 * WINDOW + 3)


# --- coming and going ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [0, 1])
def test_a_late_joiner_downloads_and_agrees(tier: int) -> None:
    swarm = Swarm.running([0, 0, 1], rings=(0, 1, 0), slots=5)
    joiner = swarm.add(tier)
    joiner.join()
    converge(swarm, 4)
    assert joiner.engine.ready
    assert set(joiner.anchors) == set(swarm.manifest.held(tier))
    assert {e.state.fragment for e in joiner.log if isinstance(e, events.FragmentLost)} == set(joiner.anchors)
    converge(swarm, limits.ELIGIBLE_SLOTS + WINDOW)
    mine = [joiner.settled[slot] for slot in range(swarm.slot - WINDOW, swarm.slot)]
    assert any(event.merged for event in mine)
    assert all(event.merged == event.offered for event in mine)


def test_a_joiner_with_a_slow_line() -> None:
    """Certificates go on while it downloads: it fetches what it missed and applies it to what it got."""
    swarm = Swarm.running([0] * 3, slots=3)
    swarm.download_s = 2.5
    joiner = swarm.add()
    joiner.join()
    swarm.run(8)
    assert joiner.engine.ready
    converge(swarm, 2 * WINDOW)


def test_a_joiner_whose_download_fails_asks_again() -> None:
    swarm = Swarm.running([0] * 3)
    joiner = swarm.add()
    hidden = {id(peer): peer.blobs for peer in swarm.peers[:3]}
    for peer in swarm.peers[:3]:
        peer.blobs = {}
    joiner.join()
    swarm.run(2.5)
    assert not joiner.engine.ready
    for peer in swarm.peers[:3]:
        peer.blobs = hidden[id(peer)] | peer.blobs
    converge(swarm, 4)
    assert joiner.engine.ready


@pytest.mark.parametrize(("windows", "size"), [(1, 3), (10, 3), (100, 2)])
def test_asleep_for(windows: int, size: int) -> None:
    swarm = Swarm.running([0] * size)
    sleeper = swarm.peers[-1]
    swarm.run(0.4)
    sleeper.pause()
    fell_asleep = swarm.slot
    swarm.run(windows * WINDOW)
    assert any(swarm.certified(fell_asleep + 1, swarm.slot - 1).values())
    sleeper.resume()
    woke = swarm.slot
    converge(swarm, 2 * WINDOW)
    assert_flowing(swarm, woke + 3, swarm.slot - 1)
    since = [event.certificate for event in sleeper.settled.values() if event.slot >= woke]
    alone = [certificate for certificate in since if certificate and certificate.verdict.committee == (sleeper.id,)]
    assert not alone, "it certified slots all by itself before it had heard of anybody"
    lost = [e for e in sleeper.log if isinstance(e, events.FragmentLost)][WINDOW:]
    assert len(lost) == (0 if windows == 1 else WINDOW)
    last = sleeper.settled[swarm.slot - 1]
    assert last.merged
    acknowledged_and_listed(swarm)


def test_everybody_sleeps() -> None:
    swarm = Swarm.running([0] * 3)
    for peer in swarm.peers:
        peer.pause()
    swarm.run(200)
    for peer in swarm.peers:
        peer.resume()
    swarm.run(5)
    first = swarm.slot
    converge(swarm, WINDOW)
    assert_flowing(swarm, first, swarm.slot - 1)


def test_introductions_end() -> None:
    """Somebody who never answers is greeted for a while; the greetings stop."""
    swarm = Swarm.running([0])
    peer = swarm.peers[0]
    peer.engine.introduce(identity(77).peer_id)
    sent = []
    swarm.send = lambda source, target, data: sent.append(swarm.slot)  # type: ignore[method-assign]
    swarm.run(40)
    assert len(sent) > 16
    assert max(sent) < swarm.slot - 16
    peer.engine.introduce(peer.id)
    peer.pump()
    assert max(sent) < swarm.slot - 16


FAULTS: dict[str, Callable[[Swarm, Peer], object]] = {
    "kill": lambda swarm, peer: peer.kill() if peer.alive and len(swarm.live) > 1 else None,
    "restart": lambda swarm, peer: None if peer.alive else peer.restart(),
    "pause": lambda swarm, peer: peer.pause() if peer.awake and len(swarm.live) > 1 else None,
    "resume": lambda swarm, peer: peer.resume() if peer.alive and not peer.awake else None,
    "lose": lambda swarm, peer: setattr(swarm, "loss", swarm.rng.choice([0.1, 0.3, 0.6])),
    "duplicate": lambda swarm, peer: setattr(swarm, "duplication", 0.3),
    "cut": lambda swarm, peer: swarm.cuts.add((peer.number, swarm.rng.choice(swarm.peers).number)),
    "heal": lambda swarm, peer: swarm.cuts.clear(),
    "slow down": lambda swarm, peer: setattr(swarm, "latency_s", (0.3, 1.5)),
    "speed up": lambda swarm, peer: setattr(swarm, "latency_s", (0.01, 0.04)),
    "join": lambda swarm, peer: swarm.add(peer.tier).join() if len(swarm.peers) < 5 else None,
}


@pytest.mark.parametrize("seed", [4, 17, 23])
def test_everything_at_once(seed: int) -> None:
    """A schedule of faults from a seed; when they stop, all agree, all books are right and certificates flow (I6)."""
    swarm = Swarm.running([0, 0, 1], rings=(0, 1, 0), seed=seed)
    for _ in range(10):
        FAULTS[swarm.rng.choice(sorted(FAULTS))](swarm, swarm.rng.choice(swarm.peers))
        swarm.run(swarm.rng.choice([0.15, 0.7, 1.3, 4]))
    swarm.cuts.clear()
    swarm.loss, swarm.duplication, swarm.latency_s = 0.0, 0.0, (0.01, 0.04)
    for peer in swarm.peers:
        FAULTS["resume" if peer.alive else "restart"](swarm, peer)
    swarm.run(4 * WINDOW)
    first = swarm.slot
    swarm.run_until(swarm.manifest.slot_start(first + WINDOW) - 0.001)
    assert all(peer.engine.ready for peer in swarm.peers)
    swarm.check_agreement()
    swarm.check_counters()
    acknowledged_and_listed(swarm)
    assert_flowing(swarm, first, swarm.slot - 1)


# --- two certificates for one slot -----------------------------------------------------------------------------------


def forge(swarm: Swarm, slot: int, seats: list[Peer], signers: list[Peer], sharers: list[Peer]) -> messages.Certificate:
    """A certificate of a committee that saw another roster: real contributions, a real merge, real signatures."""
    manifest, f = swarm.manifest, swarm.manifest.fragment_of(slot)
    commitments, contributions = {}, []
    for peer in sharers:
        payload = peer.blobs[peer.offered[slot]]
        weight = swarm.tokens(peer.number)
        commitments[peer.id] = statements.make_commitment(
            peer.identity, manifest.run_id, slot, f, peer.offered[slot], len(payload), weight
        )
        contributions.append(Contribution(peer.id, weight, payload))
    merged = merge(manifest, f, contributions)
    assert merged is not None
    for peer in seats:
        peer.blobs[merged.digest] = merged.update
    verdict = statements.make_verdict(
        manifest.run_id,
        slot,
        f,
        tuple(peer.id for peer in seats),
        [messages.Share(commitments[peer], clip) for peer, clip in merged.admitted],
        merged.digest,
        len(merged.update),
    )
    signatures = tuple((peer.id, statements.sign_verdict(peer.identity, verdict.digest)) for peer in signers)
    return messages.Certificate(verdict, signatures)


def stop_certificates(swarm: Swarm) -> Callable[[], None]:
    """No owner proposes until the returned function is called."""
    for peer in swarm.peers:
        peer._merge = lambda due: None  # type: ignore[method-assign]

    def go_on() -> None:
        for peer in swarm.peers:
            del peer.__dict__["_merge"]

    return go_on


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
            peer.engine._check_certificate(certificate)
            peer.engine._take_certificate(certificate)
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
    victim.engine._take_certificate(worse)
    victim.pump()
    swarm.run(0.2)
    assert victim.applied(worse.verdict.fragment)[slot] == worse.verdict.digest
    victim.snapshot()
    victim.kill()
    for peer in one:
        peer.engine._take_certificate(better)
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
            peer.engine._check_certificate(lie)
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


def announce(liar: Peer, slot: int, payload: bytes, to: Peer) -> None:
    """Put a payload into the liar's store and promise it to one peer."""
    digest = liar._put(payload)
    f = liar.swarm.manifest.fragment_of(slot)
    commitment = statements.make_commitment(liar.identity, liar.swarm.manifest.run_id, slot, f, digest, len(payload), 7)
    data = wire.seal(liar.identity, liar.swarm.manifest.run_id, next(SEQUENCE), messages.Offer(commitment))
    liar.swarm.send(liar, to.id, data)


SEQUENCE = iter(range(1 << 40, 1 << 41))


def two_payloads(swarm: Swarm, slot: int) -> tuple[bytes, bytes]:
    f = swarm.manifest.fragment_of(slot)
    layout = swarm.manifest.fragments[f].layout
    payloads = [codec.encode_topk(layout, swarm.manifest.up, swarm.initial(f) * sign)[0] for sign in (1, -1)]
    return payloads[0], payloads[1]


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


def seats_of(swarm: Swarm, slot: int) -> tuple[bytes, ...]:
    return committee.committee(swarm.manifest.run_id, slot, [peer.id for peer in swarm.live])


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
    swarm = Swarm.running([0] * 5)
    liar = swarm.peers[4]
    slot = next(s for s in range(swarm.slot + 1, swarm.slot + 9) if liar.id not in seats_of(swarm, s))
    owner, *others = (swarm.by_id[peer] for peer in seats_of(swarm, slot))
    swarm.run_until(swarm.manifest.slot_start(slot) - 0.005)
    swarm.cuts = {(owner.number, seat.number) for seat in others}
    while not reached("proposed", owner, slot):
        swarm.run(0.001)
        assert swarm.slot <= slot
    announce(liar, slot, two_payloads(swarm, slot)[0], owner)
    swarm.run(0.05)
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


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal_of(peer: Peer, sender: int, message: messages.Message, sequence: int | None = None) -> Refusal | None:
    """What the peer says to a message; None if it takes it."""
    number = next(SEQUENCE) if sequence is None else sequence
    data = wire.seal(identity(sender), peer.swarm.manifest.run_id, number, message)
    try:
        peer.engine.receive(data, peer.swarm.now)
    except WireError as error:
        return error.refusal
    finally:
        peer.pump()
    return None


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
    victim.engine._lose(lost)
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
