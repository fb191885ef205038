"""Swarms too large for everybody to greet everybody: neighbours, presences that are passed on, contributors by lot."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braniac.protocol import admission, committee, limits, messages, statements, wire
from braniac.protocol.history import History
from braniac.protocol.identity import PeerId
from braniac.protocol.messages import Equivocation, Heartbeat, Presence
from braniac.protocol.roster import Member, Roster
from tests.unit.swarm_checks import WINDOW, assert_flowing, converge, refusal_of
from tests.unit.swarm_harness import Peer, Swarm, identity

RUN = hashlib.sha256(b"run").digest()
ALICE = identity(1).peer_id
LIVE = limits.ROSTER_LIVE_SLOTS
PEERS = 10


def presence(number: int = 1, sequence: int = 1, *, run_id: bytes = RUN, **changes: Any) -> Presence:
    values = {"slot": 10, "tier": 0, "ready_slot": 0, "unreachable_slot": 0, "every": 8, "gone": False, "addresses": ()}
    return statements.make_presence(identity(number), run_id, sequence, **values | changes)


# --- what a presence says ---------------------------------------------------------------------------------------------


def test_a_presence_makes_a_member_and_says_how_long_it_lives() -> None:
    roster = Roster()
    member, returned = roster.hear_of(presence(tier=2, ready_slot=3, unreachable_slot=4, addresses=("/dns/a",)), 11)
    assert member is not None
    assert returned
    said = (member.tier, member.ready_slot, member.unreachable_slot, member.addresses, member.heard_slot)
    assert said == (2, 3, 4, ("/dns/a",), 10)
    assert member.live(10 + 8 + LIVE - 1)
    assert not member.live(10 + 8 + LIVE)
    assert not member.speaking(11), "it lists nothing"


def test_who_stands_follows_from_what_all_were_told() -> None:
    """A neighbour hears heartbeats too, and must not think of other committees than whoever is far away."""
    near, far = Roster(), Roster()
    for roster in (near, far):
        roster.hear_of(presence(), 10)
    for slot in range(11, 18):
        near.hear(ALICE, Heartbeat(slot, 0, 0, every=8), slot, slot)
    stood = [bool(far.standing(slot)) for slot in range(10, 20)]
    assert [bool(near.standing(slot)) for slot in range(10, 20)] == stood
    assert stood == [True] * (LIVE + 1) + [False] * (9 - LIVE)


def test_a_presence_is_believed_once_a_slot_and_in_order() -> None:
    roster = Roster()
    assert roster.hear_of(presence(sequence=5), 10)[0]
    for stale in (
        presence(sequence=5),
        presence(sequence=6),  # in the same slot
        presence(sequence=4, slot=11),
        presence(sequence=6, slot=9),
    ):
        assert roster.hear_of(stale, 11) == (None, False)
    assert roster.hear_of(presence(sequence=6, slot=11), 11)[0]


def test_a_presence_of_long_ago_brings_nobody_back() -> None:
    roster = Roster()
    assert roster.hear_of(presence(), 10 + 8 + LIVE) == (None, False)
    assert len(roster) == 0


def test_a_presence_of_the_future_does_not_live_longer() -> None:
    roster = Roster()
    member, _ = roster.hear_of(presence(slot=11), 10)
    assert member is not None
    assert member.heard_slot == 10


def test_goodbye_is_heard_in_the_same_slot_and_holds_until_it_speaks_again() -> None:
    roster = Roster()
    roster.hear_of(presence(sequence=1), 10)
    roster.hear_of(presence(sequence=2, gone=True), 10)
    assert not roster.live(10)
    assert roster.hear_of(presence(sequence=3), 10) == (None, False)
    _, returned = roster.hear_of(presence(sequence=4, slot=12), 12)
    assert returned
    assert roster.live(12)


def test_an_older_heartbeat_does_not_undo_a_presence_nor_the_other_way_round() -> None:
    roster = Roster()
    roster.hear_of(presence(sequence=5, ready_slot=7), 10)
    member, _ = roster.hear(ALICE, Heartbeat(10, 0, -1), 10, sequence=4)
    assert member.ready_slot == 7
    roster.hear(ALICE, Heartbeat(12, 0, 9, every=8), 12, sequence=9)
    later, _ = roster.hear_of(presence(sequence=8, slot=12, ready_slot=7), 12)
    assert later is not None
    assert later.ready_slot == 9
    assert later.presence == presence(sequence=8, slot=12, ready_slot=7), "it still has to be passed on"


def test_a_restarted_peer_has_to_be_greeted_again() -> None:
    roster = Roster()
    _, new = roster.hear(ALICE, Heartbeat(10, 0, 0), 10, 1 << 32)
    assert new
    roster.hear_of(presence(sequence=(2 << 32) + 1, slot=11), 11)
    _, returned = roster.hear(ALICE, Heartbeat(11, 0, 0), 11, (2 << 32) + 2)
    assert returned


def test_inventing_peers_displaces_nobody_who_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROSTER_PEERS_MAX", 3)
    roster = Roster()
    for number in range(3):
        roster.hear_of(presence(number), 10)
    assert roster.hear_of(presence(4), 11) == (None, False)
    assert roster.hear_of(presence(4, slot=30), 30)[0], "by now the others are silent"
    assert len(roster) == 3


def test_a_banned_peer_is_not_heard_of() -> None:
    roster = Roster()
    first, second = (statements.make_commitment(identity(1), RUN, 3, 0, bytes(32), 9, weight) for weight in (1, 2))
    roster.ban(Equivocation(first, second))
    assert roster.hear_of(presence(), 10) == (None, False)


def test_who_was_away_tries_those_heard_last() -> None:
    roster = Roster()
    for number in range(1, 9):
        roster.hear_of(presence(number, slot=10 + number), 20)
    roster.hear_of(presence(8, sequence=2, slot=19, gone=True), 20)
    assert {m.peer for m in roster.last_heard(3)} == {identity(number).peer_id for number in (5, 6, 7)}
    assert len(roster.last_heard(100)) == 7


# --- lots -------------------------------------------------------------------------------------------------------------


@given(st.binary(min_size=32, max_size=32), st.integers(1, 64), st.integers(0, 64))
def test_whoever_has_a_place_for_sure_is_drawn(lot: bytes, places: int, peers: int) -> None:
    assert committee.drawn(lot, places, min(peers, places))


def test_about_as_many_are_drawn_as_there_are_places() -> None:
    for slot in range(20):
        lots = [committee.share_lot(RUN, slot, identity(n).peer_id) for n in range(500)]
        assert 35 <= sum(committee.drawn(lot, 64, 500) for lot in lots) <= 95  # 64 +- 4 standard deviations


def test_the_best_lots_are_drawn() -> None:
    """So that the committee is among those that make themselves heard for it."""
    for slot in range(20):
        peers = [identity(n).peer_id for n in range(200)]
        drawn = {p for p in peers if committee.drawn(committee.score(RUN, slot, p), limits.CANDIDATES, 200)}
        assert drawn == set(committee.ranking(RUN, slot, peers)[: len(drawn)])


def member(number: int, known_slot: int = 0, network: str = "") -> Member:
    return Member(identity(number).peer_id, 0, 0, 100, known_slot=known_slot, network=network)


def test_invented_peers_do_not_make_lots_rare() -> None:
    veterans = [member(n) for n in range(20)]
    newcomers = [member(100 + n, known_slot=90) for n in range(500)]
    assert admission.claimants(veterans, 50) == 20
    assert admission.claimants(newcomers, 50) == 500, "a young swarm"
    assert admission.claimants(veterans + newcomers, 50) == 40
    assert admission.claimants(veterans[:2] + newcomers, 50) == 2 + limits.NEWCOMER_PLACES
    crowd = [member(100 + n, network="203.0.114.0/24") for n in range(500)]
    assert admission.claimants(veterans + crowd, 50) == 20 + limits.NETWORK_PLACES


# --- a swarm ----------------------------------------------------------------------------------------------------------


class Crowd(Swarm):
    """Counts what is sent."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.kinds: Counter[tuple[int, str]] = Counter()
        super().__init__(*arguments, **options)

    def send(self, source: Peer, peer: PeerId, data: bytes) -> None:
        kind = type(wire.open_envelope(data, self.manifest.run_id).message).__name__
        self.kinds[source.number, kind] += 1
        super().send(source, peer, data)


@pytest.fixture(autouse=True)
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ten peers are many."""
    for name, value in {
        "GREETED_PEERS_MAX": 5,
        "NEIGHBOURS": 5,
        "GOSSIP_PEERS": 4,
        "CERTIFICATE_PEERS": 3,
        "CANDIDATES": 8,
        "PRESENCE_SLOTS": 8,
        "CONTRIBUTORS_PER_SLOT": 4,
    }.items():
        monkeypatch.setattr(limits, name, value)


@pytest.fixture
def swarm() -> Crowd:
    crowd = Crowd([0] * PEERS)
    crowd.peers[0].found()
    for peer in crowd.peers[1:]:
        peer.join()
    crowd.run(9)
    assert all(peer.engine.ready for peer in crowd.peers)
    return crowd


def knows(peer: Peer) -> set[PeerId]:
    return {member.peer for member in peer.engine.live_peers()}


def test_a_large_swarm_agrees_though_nobody_greets_everybody(swarm: Crowd) -> None:
    swarm.kinds.clear()
    first = swarm.slot
    converge(swarm, 20, late=2)
    assert_flowing(swarm, first + 1, swarm.slot - 2)
    for peer in swarm.peers:
        assert knows(peer) == {other.id for other in swarm.peers if other is not peer}
        assert swarm.kinds[peer.number, "Heartbeat"] <= 21 * limits.NEIGHBOURS + 2 * PEERS  # and greetings
        assert swarm.kinds[peer.number, "Introduction"] <= 2 * PEERS


def test_few_contribute_to_a_slot_and_in_time_all_do(swarm: Crowd) -> None:
    first = swarm.slot
    converge(swarm, 16, late=2)
    settled = [event for slot, event in swarm.peers[0].settled.items() if slot >= first]
    shares = [event.certificate.verdict.shares for event in settled if event.certificate]
    assert len(shares) >= 14
    assert sum(map(len, shares)) / len(shares) < PEERS - 3
    assert {share.commitment.peer for each in shares for share in each} == {peer.id for peer in swarm.peers}


def merge_times(swarm: Crowd, slots: int) -> list[float]:
    """When the first peer has the update of each of the next slots, in slots; of those that have one."""
    first, times = swarm.slot + 1, {}
    while swarm.slot < first + slots:
        swarm.run_until(swarm.now + 0.02)
        for peer in swarm.live:
            for slot in range(first, first + slots):
                if slot in peer.settled and peer.settled[slot].merged:
                    times.setdefault(slot, swarm.now - swarm.manifest.slot_start(slot))
    return [seconds / swarm.manifest.slot_s for seconds in times.values()]


def test_nobody_waits_long_for_the_dead_of_whom_nothing_was_heard(swarm: Crowd) -> None:
    """They are expected until their presence lapses. Whoever has announced its work is waited for."""
    assert max(merge_times(swarm, 4)) < limits.ANNOUNCE_FRACTION
    for peer in swarm.peers[-2:]:
        peer.kill()
    times = merge_times(swarm, 5)
    assert len(times) >= 3
    assert limits.ANNOUNCE_FRACTION < max(times) < limits.ANNOUNCE_FRACTION + 0.3, times


def test_it_survives_loss_deaths_and_newcomers(swarm: Crowd) -> None:
    swarm.loss = 0.1
    for _ in range(4):
        swarm.rng.choice([peer for peer in swarm.live if peer.number]).kill()
        swarm.add().join()
        swarm.run(4)
    swarm.loss = 0.0
    swarm.run(limits.PRESENCE_SLOTS + LIVE)
    first = swarm.slot
    converge(swarm, 4 * WINDOW, late=2)
    assert_flowing(swarm, first + 1, swarm.slot - 2)
    for peer in swarm.live:
        assert peer.engine.ready
        assert knows(peer) == {other.id for other in swarm.live if other is not peer}


def test_whoever_leaves_is_soon_forgotten_by_all(swarm: Crowd) -> None:
    swarm.peers[3].rest()
    swarm.run(5)
    assert not swarm.peers[3].awake
    assert not any(swarm.peers[3].id in knows(peer) for peer in swarm.live)


def test_a_swarm_may_grow_and_shrink_across_the_bound() -> None:
    swarm = Crowd.running([0] * 4)
    for _ in range(5):
        swarm.add().join()
        swarm.run(1)
    swarm.run(2 * limits.PRESENCE_SLOTS)
    assert all(peer.engine.roster.neighbours is not None for peer in swarm.live)
    first = swarm.slot
    swarm.run(6)
    assert_flowing(swarm, first + 1, swarm.slot - 2)
    for peer in swarm.peers[4:]:
        peer.rest()
        swarm.run(1)
    swarm.run(2 * limits.PRESENCE_SLOTS)
    assert all(peer.engine.roster.neighbours is None for peer in swarm.live)
    first = swarm.slot
    converge(swarm, 2 * WINDOW, late=2)
    assert_flowing(swarm, first + 1, swarm.slot - 2)


# --- gossip of liars --------------------------------------------------------------------------------------------------


def gossip(swarm: Swarm, numbers: range | list[int], slot: int | None = None) -> messages.Gossip:
    at = swarm.slot if slot is None else slot
    run_id = swarm.manifest.run_id
    return messages.Gossip(tuple(presence(number, run_id=run_id, slot=at) for number in numbers))


def test_a_stranger_may_speak_for_itself_only(swarm: Crowd) -> None:
    peer = swarm.peers[0]
    assert refusal_of(peer, 500, gossip(swarm, [501, 502])) is None
    assert len(knows(peer)) == PEERS - 1
    assert refusal_of(peer, 500, gossip(swarm, [500, 501])) is None
    assert knows(peer) - {other.id for other in swarm.peers} == {identity(500).peer_id}


def test_a_neighbour_may_bring_up_few_strangers_in_a_slot(swarm: Crowd) -> None:
    peer = swarm.peers[0]
    refusal_of(peer, 500, gossip(swarm, [500]))
    refusal_of(peer, 500, gossip(swarm, range(501, 501 + 2 * limits.GOSSIP_STRANGERS_MAX)))
    assert len(knows(peer)) == PEERS + limits.GOSSIP_STRANGERS_MAX
    swarm.run(1)
    refusal_of(peer, 500, gossip(swarm, range(1000, 1000 + 2 * limits.GOSSIP_STRANGERS_MAX)))
    assert len(knows(peer)) == PEERS + 2 * limits.GOSSIP_STRANGERS_MAX


def test_presences_of_the_future_or_of_oneself_are_passed_over(swarm: Crowd) -> None:
    peer = swarm.peers[0]
    before = knows(peer)
    refusal_of(peer, 1, gossip(swarm, [500, 501], slot=swarm.slot + 2))
    refusal_of(peer, 1, gossip(swarm, [0]))
    assert knows(peer) == before


def test_who_asks_for_the_roster_gets_it_once_in_a_while(swarm: Crowd) -> None:
    peer = swarm.peers[0]
    swarm.kinds.clear()
    answers = []
    for _ in range(3):
        assert refusal_of(peer, 1, messages.RosterRequest()) is None
        answers.append(swarm.kinds.pop((0, "Gossip"), 0))
    assert answers == [1, 0, 0]
    swarm.run(limits.ROSTER_ANSWER_SLOTS + 1)
    swarm.kinds.clear()
    refusal_of(peer, 1, messages.RosterRequest())
    assert swarm.kinds[0, "Gossip"] == 1


def test_a_newcomer_that_nobody_introduces_asks_for_the_roster(swarm: Crowd) -> None:
    newcomer = swarm.add()
    newcomer._start(History(swarm.manifest))
    for known in list(newcomer.engine._greetings._unanswered)[1:]:
        newcomer.engine._greetings.answered(known)  # so that it greets one of them only
    newcomer.pump()
    swarm.kinds.clear()
    swarm.run(4)
    assert swarm.kinds[newcomer.number, "RosterRequest"] >= 1
    assert knows(newcomer) == {other.id for other in swarm.peers if other is not newcomer}


def test_neighbours_are_of_many_networks_and_not_all_newcomers(swarm: Crowd) -> None:
    peer = swarm.peers[0]
    for number in range(500, 560):
        refusal_of(peer, number, gossip(swarm, [number]))
    for other in swarm.peers[1:]:
        peer.engine.roster.get(other.id).known_slot = -100  # type: ignore[union-attr]
    swarm.run(1)
    near = peer.engine.roster.neighbours
    assert near is not None
    honest = {other.id for other in swarm.peers}
    assert len(near) == limits.NEIGHBOURS
    assert sum(other in honest for other in near) >= limits.NEIGHBOURS - limits.NEIGHBOURS // 2
    for other in swarm.peers[1:]:
        peer.engine.roster.get(other.id).known_slot = swarm.slot  # type: ignore[union-attr]
    for number in range(500, 560):
        peer.engine.roster.locate(identity(number).peer_id, "203.0.114.0/24")
    swarm.run(1)
    assert sum(other not in honest for other in peer.engine.roster.neighbours or ()) <= limits.NETWORK_PLACES


def test_a_certificate_is_passed_on_once(swarm: Crowd) -> None:
    swarm.kinds.clear()
    swarm.run(8)
    sent = sum(count for (_, kind), count in swarm.kinds.items() if kind == "Certificate")
    assert sent <= 9 * (limits.NEIGHBOURS + PEERS * limits.CERTIFICATE_PEERS) + swarm.kinds[0, "CertificateRequest"]
