"""Who is there: liveness, order of heartbeats, replays, bans, and the committees that follow from it."""

from __future__ import annotations

import hashlib

import pytest

from braniac.protocol import committee, limits, messages, statements
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.identity import PeerId
from braniac.protocol.messages import Equivocation, Heartbeat
from braniac.protocol.roster import Member, ReplayWindow, Roster
from tests.unit.swarm_harness import identity

RUN = hashlib.sha256(b"run").digest()
ALICE, BOB = identity(1).peer_id, identity(2).peer_id
LIVE, READY = limits.ROSTER_LIVE_SLOTS, limits.ELIGIBLE_SLOTS


def proof(peer: int) -> Equivocation:
    def announce(weight: int) -> messages.Commitment:
        return statements.make_commitment(identity(peer), RUN, 3, 0, bytes(32), 9, weight)

    return Equivocation(announce(1), announce(2))


def test_replays_are_seen_in_any_order() -> None:
    window = ReplayWindow()
    assert [window.admit(n) for n in (5, 3, 5, 4, 3, 6, 6, 0)] == [True, True, False, True, False, True, False, True]


def test_replays_beyond_the_window_are_refused() -> None:
    window, top = ReplayWindow(), 10 * limits.REPLAY_WINDOW
    assert window.admit(top)
    assert window.admit(top - limits.REPLAY_WINDOW + 1)
    assert not window.admit(top - limits.REPLAY_WINDOW)
    assert not window.admit(0)
    assert window.admit((7 << 32) + 1)  # a restart: the incarnation has grown
    assert not window.admit(top + 1)
    assert window.seen.bit_length() <= limits.REPLAY_WINDOW


def test_a_huge_jump_back_is_only_a_refusal() -> None:
    window = ReplayWindow()
    assert window.admit((1 << 64) - 1)
    assert not window.admit(0)
    assert window.seen == 1


def test_a_replayed_message_is_refused() -> None:
    roster = Roster()
    roster.check_fresh(ALICE, 9)
    roster.check_fresh(BOB, 9)
    with pytest.raises(WireError) as caught:
        roster.check_fresh(ALICE, 9)
    assert caught.value.refusal is Refusal.REPLAYED


def test_replay_windows_of_strangers_are_bounded() -> None:
    roster = Roster()
    roster.hear(ALICE, Heartbeat(1, 0, -1), 1, 1)
    roster.check_fresh(ALICE, 1)
    for n in range(4 * limits.ROSTER_PEERS_MAX + 1):
        roster.check_fresh(PeerId(n.to_bytes(38)), 1)
    assert len(roster._replay) <= 4 * limits.ROSTER_PEERS_MAX
    with pytest.raises(WireError):
        roster.check_fresh(ALICE, 1)


def test_a_peer_lives_for_some_slots_after_its_heartbeat() -> None:
    roster = Roster()
    _, new = roster.hear(ALICE, Heartbeat(10, 0, 0), 10, 1)
    assert new
    assert roster.live(10 + LIVE)
    assert not roster.lapsed(10 + LIVE)
    assert not roster.live(11 + LIVE)
    assert [m.peer for m in roster.lapsed(11 + LIVE)] == [ALICE]
    _, returned = roster.hear(ALICE, Heartbeat(30, 0, 0), 30, 2)
    assert returned
    _, returned = roster.hear(ALICE, Heartbeat(31, 0, 0), 31, 3)
    assert not returned


def test_a_restarted_peer_is_news_although_it_was_not_missed() -> None:
    roster = Roster()
    roster.hear(ALICE, Heartbeat(10, 0, 0), 10, (1 << 32) + 5)
    _, returned = roster.hear(ALICE, Heartbeat(10, 0, -1), 10, (2 << 32) + 1)
    assert returned, "it has forgotten us and waits for an answer"


def test_a_heartbeat_from_the_future_does_not_live_longer() -> None:
    roster = Roster()
    member, _ = roster.hear(ALICE, Heartbeat(10**9, 0, 0), 10, 1)
    assert member.heard_slot == 10
    assert not roster.live(11 + LIVE)


def test_an_older_heartbeat_that_arrives_later_changes_nothing() -> None:
    roster = Roster()
    roster.hear(ALICE, Heartbeat(10, 0, ready_slot=10, tokens_per_s=5.0), 10, sequence=8)
    member, returned = roster.hear(ALICE, Heartbeat(10, 2, ready_slot=-1), 10, sequence=7)
    assert not returned
    assert (member.ready_slot, member.tier, member.tokens_per_s) == (10, 0, 5.0)


def test_goodbye_holds_against_older_heartbeats_only() -> None:
    roster = Roster()
    roster.hear(ALICE, Heartbeat(10, 0, 0), 10, sequence=1)
    assert roster.leave(ALICE, sequence=3)
    roster.hear(ALICE, Heartbeat(10, 0, 0), 10, sequence=2)
    assert not roster.live(10)
    _, returned = roster.hear(ALICE, Heartbeat(10, 0, 0), 10, sequence=1 << 32)
    assert returned
    assert roster.live(10)
    assert not roster.leave(ALICE, sequence=4), "a goodbye of an earlier life"
    assert roster.live(10)
    assert not roster.leave(BOB, sequence=1)


def test_a_peer_sits_in_committees_once_all_can_know_it() -> None:
    roster = Roster()
    roster.hear(ALICE, Heartbeat(10, 0, ready_slot=10), 10, 1)
    roster.hear(BOB, Heartbeat(10, 0, ready_slot=-1), 10, 1)
    assert roster.eligible(10 + READY - 1) == []
    assert [m.peer for m in roster.eligible(10 + READY)] == [ALICE]


def test_eligibility_follows_from_what_was_said_and_not_from_when_it_arrived() -> None:
    early, late = Roster(), Roster()
    early.hear(ALICE, Heartbeat(10, 0, ready_slot=3), 10, 1)
    late.hear(ALICE, Heartbeat(10, 0, ready_slot=3), 12, 1)
    assert [bool(early.eligible(s)) for s in range(20)] == [bool(late.eligible(s)) for s in range(20)]


def test_a_banned_peer_is_not_listened_to() -> None:
    roster = Roster()
    roster.hear(ALICE, Heartbeat(1, 0, 0), 1, 1)
    assert roster.ban(proof(1))
    assert not roster.ban(proof(1))
    assert roster.get(ALICE) is None
    assert roster.banned[ALICE] == proof(1)
    with pytest.raises(WireError) as caught:
        roster.check_fresh(ALICE, 99)
    assert caught.value.refusal is Refusal.EQUIVOCATION


def test_bans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROSTER_PEERS_MAX", 3)
    roster = Roster()
    for n in range(5):
        roster.ban(proof(n))
    assert list(roster.banned) == [identity(n).peer_id for n in (2, 3, 4)]


def test_proofs_take_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PROOFS_BYTES_MAX", 3 * proof(0).body_bytes)
    roster = Roster()
    for n in range(5):
        roster.ban(proof(n))
    assert list(roster.banned) == [identity(n).peer_id for n in (2, 3, 4)]


def test_a_full_roster_forgets_whoever_was_silent_for_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "ROSTER_PEERS_MAX", 3)
    roster = Roster()
    for n, slot in enumerate((5, 3, 4, 6)):
        roster.hear(identity(n).peer_id, Heartbeat(slot, 0, 0), slot, 1)
    assert {m.peer for m in roster} == {identity(n).peer_id for n in (0, 2, 3)}


def test_members_silent_for_very_long_are_forgotten() -> None:
    roster = Roster()
    roster.hear(ALICE, Heartbeat(1, 0, 0), 1, 1)
    roster.forget(1 + limits.ROSTER_FORGET_SLOTS)
    assert len(roster) == 1
    roster.forget(2 + limits.ROSTER_FORGET_SLOTS)
    assert len(roster) == 0


def test_what_certificates_took_is_counted_across_heartbeats() -> None:
    roster = Roster()
    member, _ = roster.hear(ALICE, Heartbeat(1, 0, 0), 1, 1)
    assert isinstance(member, Member)
    member.merged += 3
    member, _ = roster.hear(ALICE, Heartbeat(2, 0, 0), 2, 2)
    assert member.merged == 3


PEERS = [identity(n).peer_id for n in range(20)]


def test_everybody_finds_the_same_committee() -> None:
    for slot in range(50):
        seats = committee.committee(RUN, slot, PEERS)
        assert seats == committee.committee(RUN, slot, PEERS[::-1] + PEERS)
        assert len(set(seats)) == limits.COMMITTEE_SIZE
        assert list(seats) == committee.ranking(RUN, slot, PEERS)[: limits.COMMITTEE_SIZE]


def test_a_peer_that_leaves_changes_only_its_own_seats() -> None:
    for slot in range(100):
        before = committee.ranking(RUN, slot, PEERS)
        assert committee.ranking(RUN, slot, PEERS[1:]) == [peer for peer in before if peer != PEERS[0]]


def test_ownership_goes_around() -> None:
    owners = [committee.committee(RUN, slot, PEERS)[0] for slot in range(1000)]
    assert all(20 <= owners.count(peer) <= 90 for peer in PEERS)  # 50 expected
    assert committee.committee(RUN, 1, PEERS) != committee.committee(bytes(32), 1, PEERS)


def test_small_swarms_have_small_committees() -> None:
    assert committee.committee(RUN, 1, []) == ()
    assert committee.committee(RUN, 1, PEERS[:1]) == (PEERS[0],)
    assert len(committee.committee(RUN, 1, PEERS[:2])) == 2
    assert [committee.majority(n) for n in (1, 2, 3)] == [1, 2, 2]
