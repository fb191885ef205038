"""The tree that updates take: a tree for everybody alike, binary, hardly changed by who is missing from a roster."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from braniac.protocol.committee import ranking
from braniac.protocol.identity import PeerId
from braniac.protocol.tree import ancestors

RUN = bytes(range(32))
SLOTS = st.integers(0, 1 << 40)
SIZES = st.integers(1, 40)


def peer(number: int) -> PeerId:
    return hashlib.sha256(b"tree %d" % number).digest()


def swarm(size: int) -> list[PeerId]:
    return [peer(number) for number in range(size)]


def ways(slot: int, peers: Sequence[PeerId], committee: Sequence[PeerId] | None = None) -> dict[PeerId, list[PeerId]]:
    """Each peer's way up."""
    seats = ranking(RUN, slot, peers)[:3] if committee is None else committee
    return {me: ancestors(RUN, slot, seats, peers, me) for me in peers}


def parents(of: dict[PeerId, list[PeerId]]) -> dict[PeerId, PeerId | None]:
    return {me: way[0] if way else None for me, way in of.items()}


@given(SLOTS, SIZES)
def test_everybody_is_reached_from_the_owner_and_nobody_is_asked_by_more_than_two(slot: int, size: int) -> None:
    found = ways(slot, swarm(size))
    owner = ranking(RUN, slot, found)[0]
    assert found[owner] == []
    for me, way in found.items():
        assert me == owner or way[-1] == owner
        assert me not in way
        for nearer, farther in itertools.pairwise(way):
            assert found[nearer][0] == farther, "all agree on who is above whom"
    assert max(Counter(parents(found).values()).values()) <= 2


@given(SLOTS, SIZES)
def test_the_order_in_which_peers_are_known_does_not_matter(slot: int, size: int) -> None:
    peers = swarm(size)
    assert ways(slot, peers) == ways(slot, peers[::-1])


@given(SLOTS, st.integers(4, 40), st.data())
def test_whatever_seats_signed_are_the_top(slot: int, size: int, data: st.DataObject) -> None:
    """Also if their view of the roster was another one, and one of them is not known here."""
    peers = swarm(size)
    seats = data.draw(st.permutations([*peers[:3], peer(999)]))[:3]
    found = ways(slot, peers, seats)
    for me, way in found.items():
        if me not in seats:
            assert way[-1] == seats[0]
            inner = [above for above in way if above not in seats]
            assert way[: len(inner)] == inner, "seats are above all others"


@given(SLOTS, st.integers(4, 40), st.data())
def test_who_is_missing_changes_only_the_ways_that_led_through_it(slot: int, size: int, data: st.DataObject) -> None:
    peers = swarm(size)
    seats = ranking(RUN, slot, peers)[:3]
    gone = data.draw(st.sampled_from([p for p in peers if p not in seats]))
    before = ways(slot, peers, seats)
    after = ways(slot, [p for p in peers if p != gone], seats)
    for me, way in after.items():
        if gone not in before[me]:
            assert way == before[me]
        else:
            assert set(before[me]) - {gone} <= set(way), "whoever was above is still above"


@given(SLOTS, SIZES)
def test_who_takes_no_part_is_a_leaf(slot: int, size: int) -> None:
    peers, newcomer = swarm(size), peer(999)
    seats = ranking(RUN, slot, peers)[:3]
    way = ancestors(RUN, slot, seats, peers, newcomer)
    assert way[-1] == seats[0]
    below = {p for p in peers if way[0] in ancestors(RUN, slot, seats, peers, p)[:1]}
    assert len(below) < 2, "it takes the place of a child that is not there"


def test_on_average_few_change_their_parent_and_the_tree_is_not_deep() -> None:
    peers = swarm(64)
    changes, depths = [], []
    for slot in range(40):
        seats = ranking(RUN, slot, peers)[:3]
        gone = next(p for p in peers[slot:] if p not in seats)
        before = ways(slot, peers, seats)
        depths += [len(way) for way in before.values()]
        now = parents(ways(slot, [p for p in peers if p != gone], seats))
        was = parents(before)
        changes.append(sum(was[me] != parent for me, parent in now.items()))
    assert sum(changes) / len(changes) < 2.5
    assert sum(depths) / len(depths) < 2 * math.log(len(peers))


def test_nobody_is_above_the_others_for_long() -> None:
    """Neither its number nor its neighbours give a peer the same place in many slots."""
    peers = swarm(16)
    above: Counter[PeerId] = Counter()
    pairs: Counter[tuple[PeerId, PeerId]] = Counter()
    slots = 200
    for slot in range(slots):
        for me, way in ways(slot, peers).items():
            above.update(way)
            pairs.update((me, parent) for parent in way[:1])
    mean = above.total() / len(peers)
    assert all(0.7 * mean < above[p] < 1.3 * mean for p in peers)
    assert max(pairs.values()) < slots / 5
