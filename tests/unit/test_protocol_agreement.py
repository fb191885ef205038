"""Whose anchor is right: when to trust one's own, when to download, and whom to believe."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pytest

from braniac.protocol.agreement import Agreement
from braniac.protocol.events import FragmentLost
from braniac.protocol.history import History
from braniac.protocol.messages import Certificate, FragmentState
from braniac.protocol.roster import Member
from tests.unit.swarm_harness import identity, make_manifest
from tests.unit.test_protocol_history import apply, certificate

MANIFEST = make_manifest(rings=(0, 0, 0))
WINDOW = MANIFEST.window


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


LOW, HIGH = sorted([digest("one"), digest("two")])


def state(slot: int, anchor: bytes = LOW, fragment: int = 0) -> FragmentState:
    return FragmentState(fragment, slot, anchor)


def member(number: int, *states: FragmentState, ready_slot: int = 0, lists: Iterable[Certificate] = ()) -> Member:
    recent = frozenset(each.name for each in lists)
    anchors = {s.fragment: s for s in states}
    return Member(identity(number).peer_id, 0, ready_slot, 100, recent=recent, anchors=anchors)


class Case:
    """One peer's judgement, slot by slot."""

    def __init__(self, *mine: FragmentState) -> None:
        self.history = History(MANIFEST)
        self.history.begin([0])
        self.agreement = Agreement(MANIFEST, identity(0).peer_id, (0,), 0)
        for each in mine:
            self.agreement.set_mine(each)

    def review(self, now_slot: int, members: Iterable[Member]) -> list[FragmentLost]:
        return list(self.agreement.review(list(members), now_slot, self.history))


def test_two_must_agree_on_what_a_joiner_downloads() -> None:
    case = Case()
    assert case.review(10, [member(1, state(9))]) == [], "the first to answer is not believed alone"
    assert case.review(10, [member(1, state(9)), member(2, state(9, HIGH))]) == []
    [lost] = case.review(10, [member(1, state(9)), member(2, state(9, HIGH)), member(3, state(9, HIGH))])
    assert lost.state == state(9, HIGH)
    assert lost.holders == (identity(2).peer_id, identity(3).peer_id)


def test_a_joiner_believes_a_single_peer_if_nobody_else_turns_up() -> None:
    case = Case()
    assert case.review(10, [member(1, state(9))]) == []
    [lost] = case.review(11, [member(1, state(9))])
    assert lost.state == state(9)


def test_peers_that_are_joining_themselves_have_no_say() -> None:
    case = Case()
    joining = [member(n, state(9), ready_slot=-1) for n in (1, 2, 3)]
    assert case.review(10, joining) == []
    assert case.review(11, joining) == []


def test_a_download_is_asked_for_once_a_window_or_when_it_failed() -> None:
    case = Case()
    others = [member(1, state(9)), member(2, state(9))]
    assert len(case.review(10, others)) == 1
    assert case.review(11, others) == []
    case.agreement.ask_again(0)
    assert len(case.review(11, others)) == 1
    assert case.review(10 + WINDOW, others) == []
    assert len(case.review(11 + WINDOW, others)) == 1
    case.agreement.set_mine(state(9))
    assert case.review(12 + 2 * WINDOW, others) == []


def test_claims_about_slots_to_come_are_ignored() -> None:
    """A restored fragment takes no certificates up to its slot: a far one would freeze it for good."""
    case = Case()
    liars = [member(1, state(1 << 40)), member(2, state(1 << 40)), member(3, state(9)), member(4, state(9))]
    [lost] = case.review(10, liars)
    assert lost.state == state(9)


def test_one_mismatch_may_be_a_message_on_its_way() -> None:
    case = Case(state(9, HIGH))
    others = [member(1, state(9)), member(2, state(9))]
    for now in (10, 11, 12):
        assert case.review(now, others) == []
    assert case.agreement.disagreements == 1


def test_two_mismatches_at_different_slots_and_the_minority_downloads() -> None:
    case = Case(state(9, HIGH))
    assert case.review(10, [member(1, state(9)), member(2, state(9))]) == []
    case.agreement.set_mine(state(12, HIGH))
    [lost] = case.review(13, [member(1, state(12)), member(2, state(12))])
    assert lost.state == state(12)
    assert case.agreement.disagreements == 2
    assert case.agreement.mine == {}


def test_the_first_to_report_a_slot_are_not_the_majority() -> None:
    """Two camps met: the smaller one's word of the new slot came first, and nobody may give up the larger one's."""
    case = Case(state(9, HIGH))
    minority = [member(1, state(9)), member(2, state(9))]
    case.review(10, [*minority, member(3, state(9, HIGH)), member(4, state(9, HIGH))])
    case.agreement.set_mine(state(12, HIGH))
    minority = [member(1, state(12)), member(2, state(12))]
    assert case.review(12, [*minority, member(3, state(9, HIGH)), member(4, state(9, HIGH))]) == []
    assert case.review(12, [*minority, member(3, state(12, HIGH)), member(4, state(9, HIGH))]) == []
    assert case.review(13, [*minority, member(3, state(12, HIGH)), member(4, state(12, HIGH))]) == []
    [lost] = case.review(13, [*minority, member(3, state(12)), member(4, state(12, HIGH))])
    assert lost.state == state(12)


def test_an_anchor_with_a_gap_below_it_takes_nothing_until_the_others_were_heard() -> None:
    case = Case(state(9))
    horizon = case.history.horizon
    assert not case.agreement.outdated(0, 10), "it was here all the time"
    case.agreement.listen_anew(9 + horizon - 1)
    assert not case.agreement.outdated(0, 9 + horizon), "all that it missed is still kept"
    case.agreement.listen_anew(9 + horizon)
    assert case.agreement.outdated(0, 9 + horizon)
    assert not case.agreement.outdated(0, 9 + horizon + 4), "nobody had anything newer"
    case.agreement.set_mine(state(9 + horizon - 1))
    assert not case.agreement.outdated(0, 9 + horizon)


def test_agreement_in_between_clears_the_suspicion() -> None:
    case = Case(state(9, HIGH))
    case.review(10, [member(1, state(9)), member(2, state(9))])
    case.agreement.set_mine(state(9))
    case.review(11, [member(1, state(9)), member(2, state(9))])
    case.agreement.set_mine(state(12, HIGH))
    assert case.review(13, [member(1, state(12)), member(2, state(12))]) == []


def test_the_majority_stays_as_it_is() -> None:
    case = Case(state(9, HIGH))
    others = [member(1, state(9)), member(2, state(9, HIGH)), member(3, state(9, HIGH))]
    for slot in (9, 12, 15):
        case.agreement.set_mine(state(slot, HIGH))
        others = [member(1, state(slot)), member(2, state(slot, HIGH)), member(3, state(slot, HIGH))]
        assert case.review(slot + 1, others) == []


def test_of_equal_camps_the_lower_hash_is_right() -> None:
    for mine, theirs, loses in ((HIGH, LOW, True), (LOW, HIGH, False)):
        case = Case(state(9, mine))
        case.review(10, [member(1, state(9, theirs))])
        case.agreement.set_mine(state(12, mine))
        assert bool(case.review(13, [member(1, state(12, theirs))])) is loses


def test_peers_at_other_slots_are_not_compared() -> None:
    case = Case(state(9, HIGH))
    for now in (10, 13, 16, 19):
        assert case.review(now, [member(1, state(6)), member(2, state(12))]) == []
    assert case.agreement.disagreements == 0


def certificates(*slots: int) -> list[Certificate]:
    return [certificate(slot) for slot in slots]


def apply_all(case: Case, *slots: int) -> None:
    for given in certificates(*slots):
        apply(case.history, given, given.verdict.slot)
    case.agreement.set_mine(state(slots[-1], HIGH))


def suspicions(case: Case, lists: dict[int, list[Certificate]]) -> list[list[FragmentLost]]:
    """What two others that show other bytes at the given slots, and list so many certificates, make this peer do."""
    found = []
    for slot, listed in lists.items():
        apply_all(case, slot)
        found.append(case.review(slot + 1, [member(n, state(slot), lists=listed) for n in (1, 2)]))
    return found


def test_the_same_certificates_and_other_bytes_are_a_divergence() -> None:
    case = Case()
    first, second = suspicions(case, {3: certificates(3), 6: certificates(3, 6)})
    assert first == []
    assert [lost.state for lost in second] == [state(6)]


def test_a_certificate_that_this_peer_lacks_explains_other_bytes() -> None:
    case = Case()
    assert suspicions(case, {3: certificates(0, 3), 6: certificates(0, 3, 6)}) == [[], []]
    assert case.agreement.disagreements == 0


def test_a_certificate_that_the_others_lack_explains_their_other_bytes() -> None:
    case = Case()
    apply_all(case, 0)
    assert suspicions(case, {3: certificates(3), 6: certificates(3, 6)}) == [[], []]
    assert case.agreement.disagreements == 0


def test_lists_are_gone_through_only_after_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are long, and this is asked of every fragment after every heartbeat."""
    case = Case()
    apply_all(case, 3)
    monkeypatch.setattr(History, "recent", lambda self, now_slot: pytest.fail("the list was asked for"))
    monkeypatch.setattr(History, "applying", lambda self, fragment: pytest.fail("the history was gone through"))
    assert case.review(4, [member(1, state(3, HIGH)), member(2, state(0))]) == []


def test_certificates_of_other_fragments_explain_nothing() -> None:
    case = Case()
    _, second = suspicions(case, {3: certificates(2, 3), 6: certificates(2, 3, 4, 6)})
    assert second


def test_an_update_that_waits_to_be_applied_explains_other_bytes() -> None:
    case = Case()
    case.history.accept(certificate(0), 0)
    assert suspicions(case, {3: certificates(0, 3), 6: certificates(0, 3, 6)}) == [[], []]
    assert case.agreement.disagreements == 0


def test_what_did_not_come_round_in_three_windows_is_downloaded() -> None:
    case = Case()
    found = suspicions(case, {slot: certificates(*range(0, slot + 1, WINDOW)) for slot in (3, 6, 9, 12)})
    assert [bool(lost) for lost in found] == [False, False, False, True]
    assert case.agreement.disagreements == 2


def test_an_anchor_too_old_for_certificates_is_downloaded() -> None:
    case = Case(state(9))
    now = 9 + case.history.horizon
    newer = [member(1, state(now - 1, HIGH)), member(2, state(now - 1, HIGH)), member(3, state(9))]
    assert case.review(now - 1, newer) == []
    [lost] = case.review(now, newer)
    assert lost.state == state(now - 1, HIGH)


def test_an_anchor_is_not_given_up_for_nothing() -> None:
    """If nobody is further, an old anchor is simply the newest; one voice among many is not enough."""
    case = Case(state(9))
    now = 10 + case.history.horizon
    assert case.review(now, [member(1, state(9)), member(2, state(6))]) == []
    assert case.review(now + 1, [member(1, state(now, HIGH)), member(2, state(now))]) == []
