"""Long lists in heartbeats: a part at a time, and whole again with whoever hears them."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braniac.node.founding import RECIPES
from braniac.protocol import limits, listing
from braniac.protocol.messages import CertificateName, FragmentState, Heartbeat
from braniac.protocol.roster import Roster
from tests.unit.swarm_checks import WINDOW, assert_flowing, converge
from tests.unit.swarm_harness import Swarm, identity, make_manifest

ALICE = identity(1).peer_id
FRESH = limits.HEARTBEAT_FRESH_SLOTS


def name(slot: int, text: str = "") -> CertificateName:
    return CertificateName(slot, hashlib.sha256(text.encode()).digest())


def state(fragment: int, slot: int, text: str = "") -> FragmentState:
    return FragmentState(fragment, slot, hashlib.sha256(text.encode()).digest())


def say(slot: int, names: set[CertificateName], states: dict[int, FragmentState], parts: int) -> Heartbeat:
    return Heartbeat(
        slot, 0, 0,
        recent=listing.named(names, slot, parts),
        anchors=listing.stated(states.values(), slot, parts),
        parts=parts,
    )  # fmt: skip


SLOT = st.integers(0, 120)
NAMES = st.sets(st.builds(name, SLOT, st.sampled_from(["a", "b"])))
STATES = st.dictionaries(st.integers(0, 40), st.tuples(SLOT, st.sampled_from(["a", "b"])))


@given(NAMES, STATES, NAMES, STATES, st.integers(1, 12), st.integers(100, 130))
def test_after_all_parts_everything_was_said(
    old: set[CertificateName],
    old_states: dict[int, tuple[int, str]],
    new: set[CertificateName],
    new_states: dict[int, tuple[int, str]],
    parts: int,
    slot: int,
) -> None:
    """Whatever the hearer believed before."""
    roster = Roster()
    before = {f: state(f, *rest) for f, rest in old_states.items()}
    after = {f: state(f, *rest) for f, rest in new_states.items()}
    roster.hear(ALICE, say(slot - 1, old, before, 1), slot, 0)
    for turn in range(parts):
        member, _ = roster.hear(ALICE, say(slot + turn, new, after, parts), slot + turn, 1 + turn)
    assert (member.recent, member.anchors) == (frozenset(new), after)


@given(NAMES, STATES, st.integers(2, 12), st.integers(100, 130))
def test_what_is_fresh_is_in_every_heartbeat(
    names: set[CertificateName], states: dict[int, tuple[int, str]], parts: int, slot: int
) -> None:
    given_states = {f: state(f, *rest) for f, rest in states.items()}
    heartbeat = say(slot, names, given_states, parts)
    assert {n for n in names if n.slot > slot - FRESH} <= set(heartbeat.recent)
    assert {s for s in given_states.values() if s.slot > slot - FRESH} <= set(heartbeat.anchors)


def test_when_the_lists_of_a_peer_are_complete() -> None:
    roster = Roster()
    member, _ = roster.hear(ALICE, say(50, set(), {}, 6), 50, 1)
    assert member.lists_from == 55
    member, _ = roster.hear(ALICE, say(51, set(), {}, 6), 51, 2)
    assert member.lists_from == 55
    member, _ = roster.hear(ALICE, say(52, set(), {}, 1), 52, 3)
    assert member.lists_from <= 52
    member, _ = roster.hear(ALICE, say(53, set(), {}, 6), 53, 4)
    assert member.lists_from <= 52
    member, _ = roster.hear(ALICE, say(54, set(), {}, 6), 54, 1 << 32)
    assert member.lists_from == 59, "it was restarted"


@pytest.mark.usefixtures("in_parts")
def test_a_joiner_of_two_does_not_wait_for_all_parts() -> None:
    """Its greeting is answered with whole lists."""
    pair = Swarm([0, 0])
    pair.peers[0].found()
    pair.run(2 * WINDOW)
    pair.peers[1].join()
    pair.run(2)
    assert pair.peers[1].engine.ready


def test_a_restarted_peer_has_forgotten_what_it_said() -> None:
    roster = Roster()
    roster.hear(ALICE, say(50, {name(3), name(4)}, {3: state(3, 3)}, 1), 50, 1 << 32)
    member, _ = roster.hear(ALICE, say(51, {name(3)}, {}, 4), 51, 2 << 32)
    assert (member.recent, member.anchors) == (frozenset({name(3)}), {})


def test_what_is_put_together_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names others with every heartbeat is believed the latest only."""
    monkeypatch.setattr(limits, "RECENT_CERTIFICATES_MAX", 10)
    roster = Roster()
    for slot in range(100, 140):
        said = tuple(name(slot - 20 + n, str(slot)) for n in range(10))
        member, _ = roster.hear(ALICE, Heartbeat(slot, 0, 0, recent=said, parts=1024), slot, slot)
        assert len(member.recent) <= 10
    assert min(n.slot for n in member.recent) > 100


def test_lists_of_short_runs_are_whole_and_of_long_ones_short() -> None:
    assert listing.parts_of(make_manifest()) == 1
    for recipe in RECIPES.values():
        run = make_manifest(rings=[0] * recipe.fragments)
        assert 5 * recipe.fragments / listing.parts_of(run) <= limits.HEARTBEAT_ENTRIES
        assert listing.parts_of(run) <= limits.HEARTBEAT_PARTS_MAX


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of the harness's run come in four parts."""
    monkeypatch.setattr(limits, "HEARTBEAT_ENTRIES", 4)
    monkeypatch.setattr(limits, "HEARTBEAT_FRESH_SLOTS", 2)
    assert listing.parts_of(make_manifest()) == 4


@pytest.fixture
def swarm(in_parts: None) -> Swarm:
    return Swarm.running([0] * 4)


def test_a_swarm_whose_heartbeats_are_parts_agrees(swarm: Swarm) -> None:
    first = swarm.slot
    swarm.loss = 0.2
    swarm.run(4 * WINDOW)
    swarm.loss = 0.0
    converge(swarm, 4 * WINDOW)
    assert_flowing(swarm, swarm.slot - 2 * WINDOW, swarm.slot - 1)
    assert swarm.slot > first


def test_a_newcomer_and_one_that_was_away_hear_everything(swarm: Swarm) -> None:
    swarm.peers[1].pause()
    swarm.run(3 * WINDOW)
    swarm.peers[1].resume()
    newcomer = swarm.add()
    newcomer.join()
    converge(swarm, 4 * WINDOW)
    assert all(peer.engine.ready for peer in swarm.peers)
    assert len(newcomer.engine.anchors()) == WINDOW
