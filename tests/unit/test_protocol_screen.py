"""Screens of the merge: whoever contradicts most others is left out, whoever repeats others shares their voice."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braniac.protocol import codec, limits, screen
from braniac.protocol.bitpack import Int64Array
from braniac.protocol.errors import Refusal
from braniac.protocol.manifest import Manifest, MergeRules
from braniac.protocol.merge import Contribution, Merged, merge
from braniac.protocol.tiles import Sparse, TileLayout
from tests.unit.swarm_harness import identity, make_manifest

SIZE = 4096
PEERS = sorted(identity(n).peer_id for n in range(12))
MARGIN = MergeRules().margin_percent


def run(**rules: int) -> Manifest:
    return make_manifest(rings=(0,), layout=TileLayout(((SIZE, 1),)), merge=MergeRules(**rules))


def noise(name: str) -> Int64Array:
    """[SIZE] integers of 15 bits and a sign that no version of numpy can change."""
    return np.frombuffer(hashlib.shake_256(name.encode()).digest(2 * SIZE), "<i2").astype(np.int64)


def work(n: int, alike: int = 1) -> Int64Array:
    """What honest peer n has learned: partly what everybody has, `alike` times as large as its own."""
    return alike * noise("common") + noise(f"own {n}")


def offer(manifest: Manifest, n: int, vector: Int64Array, tokens: int = 1000) -> Contribution:
    payload, _ = codec.encode_topk(manifest.fragments[0].layout, manifest.up, vector)
    return Contribution(PEERS[n], tokens, payload)


def merged(manifest: Manifest, offers: list[Contribution]) -> Merged:
    result = merge(manifest, 0, offers)
    assert result is not None
    return result


def sparse(vector: Int64Array) -> Sparse:
    at = np.flatnonzero(vector)
    return Sparse(at, vector[at].astype(np.int32))


# --- direction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("honest", "flipped"), [(2, 1), (3, 1), (5, 3), (6, 2), (7, 4)])
def test_a_minority_that_sends_the_opposite_is_left_out(honest: int, flipped: int) -> None:
    manifest = run()
    offers = [offer(manifest, n, work(n)) for n in range(honest)]
    hostile = [offer(manifest, honest + n, -1000 * work(honest + n)) for n in range(flipped)]
    result = merged(manifest, hostile + offers)
    assert result.refused == tuple((c.peer, Refusal.OPPOSED) for c in hostile)
    assert result.admitted == merged(manifest, offers).admitted
    assert result.update == merged(manifest, offers).update


def test_without_a_margin_nobody_is_left_out() -> None:
    manifest = run(margin_percent=0)
    offers = [offer(manifest, n, work(n)) for n in range(4)] + [offer(manifest, 4, -work(4))]
    assert merged(manifest, offers).refused == ()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["alike", "a little alike", "unrelated", "opposed to each other"])
def test_peers_of_one_kind_are_all_admitted(count: int, kind: str) -> None:
    """What honest peers agree on is merged first, so what is left of their work may well contradict the others'."""
    manifest = run()
    total = sum((noise(f"own {n}") for n in range(count)), np.zeros(SIZE, np.int64))
    vectors = {
        "alike": [work(n, 3) for n in range(count)],
        "a little alike": [work(n) for n in range(count)],
        "unrelated": [work(n, 0) for n in range(count)],
        "opposed to each other": [count * noise(f"own {n}") - total for n in range(count)],
    }[kind]
    if count == 1 and kind == "opposed to each other":
        vectors = [noise("own 0")]
    result = merged(manifest, [offer(manifest, n, vector) for n, vector in enumerate(vectors)])
    assert result.refused == ()
    assert len(result.admitted) == count


def test_of_two_nobody_can_tell_who_is_right() -> None:
    manifest = run()
    result = merged(manifest, [offer(manifest, 0, work(0)), offer(manifest, 1, -work(0))])
    assert len(result.admitted) == 2


def test_few_coordinates_in_common_prove_nothing() -> None:
    """One contribution that contradicts all others in 3 coordinates: chance does that."""
    manifest = run()
    vectors = np.zeros((4, SIZE), np.int64)
    for n in range(4):
        vectors[n, :3] = 1000 if n else -1000
        vectors[n, 100 * (n + 1) : 100 * (n + 2)] = 1000
    assert merged(manifest, [offer(manifest, n, v) for n, v in enumerate(vectors)]).refused == ()


def test_empty_contributions_are_admitted_and_count_for_nothing() -> None:
    manifest = run()
    offers = [offer(manifest, n, work(n, 4)) for n in range(4)]
    empty = [offer(manifest, 4 + n, np.zeros(SIZE, np.int64)) for n in range(3)]
    result = merged(manifest, offers + empty)
    assert len(result.admitted) == 7
    assert result.refused == ()


@settings(max_examples=200, deadline=None)
@given(
    vectors=st.lists(
        st.lists(st.integers(-limits.LEVEL_MAX, limits.LEVEL_MAX), min_size=12, max_size=12), min_size=1, max_size=9
    ),
    margin=st.integers(0, 100),
)
def test_always_fewer_than_half_are_left_out(vectors: list[list[int]], margin: int) -> None:
    contributions = [sparse(np.asarray(vector, np.int64)) for vector in vectors]
    comparison = screen.compare(12, contributions)
    opposed = comparison.opposed(margin)
    assert 2 * len(opposed) < max(1, len(vectors))
    assert opposed == sorted(set(opposed))
    order = np.argsort([hashlib.sha256(bytes([n])).digest() for n in range(len(vectors))])
    again = screen.compare(12, [contributions[n] for n in order])
    assert (again.balance == comparison.balance[np.ix_(order, order)]).all()
    assert sorted(again.voices()) == sorted(comparison.voices())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=7, max_size=7), min_size=1, max_size=5), st.integers(1, 40))
def test_comparing_in_blocks_counts_signs(vectors: list[list[int]], block: int) -> None:
    """Against the plain definition, whatever the size of a block."""
    dense = np.asarray(vectors, np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screen, "_BLOCK_SIGNS", max(block, len(vectors)))
        found = screen.compare(7, [sparse(vector) for vector in dense])
    signs = np.sign(dense)
    assert found.balance.tolist() == (signs @ signs.T).tolist()
    assert found.both.tolist() == (abs(signs) @ abs(signs).T).tolist()


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copiers", [1, 3])
@pytest.mark.parametrize("changed", [0, 40])
def test_copies_speak_with_one_voice_and_do_not_displace_whom_they_copy(copiers: int, changed: int) -> None:
    """The victim is acknowledged, nobody else loses weight, and the update is about what it is without the copies."""
    manifest = run(coverage_halves=0)
    offers = [offer(manifest, n, work(n)) for n in range(5)]
    copies = []
    for n in range(copiers):
        altered = codec.decode(manifest.fragments[0].layout, manifest.up, offers[0].payload).dense(SIZE)
        altered[np.flatnonzero(altered)[n : n + changed]] *= -1
        copies.append(offer(manifest, 5 + n, altered))
    assert changed or {c.payload for c in copies} == {offers[0].payload}
    with_copies, without = merged(manifest, [*copies, *offers]), merged(manifest, offers)
    assert {c.peer for c in offers} <= {peer for peer, _ in with_copies.admitted}
    layout = manifest.fragments[0].layout
    found, honest = (codec.decode(layout, manifest.down, m.update).dense(SIZE) for m in (with_copies, without))
    distance = np.linalg.norm(found - honest) / np.linalg.norm(honest)
    assert distance < 0.2  # not 0: a copy counts in the median norm


def test_copies_do_not_outvote() -> None:
    """Three colluders who send one thing move the update as far as one of them alone would."""
    manifest = run(coverage_halves=0, margin_percent=0)
    layout = manifest.fragments[0].layout
    offers = [offer(manifest, n, work(n)) for n in range(5)]
    colluding = [offer(manifest, 5 + n, noise("collusion")) for n in range(3)]
    alone, together = (
        codec.decode(layout, manifest.down, merged(manifest, offers + some).update).dense(SIZE)
        for some in (colluding[:1], colluding)
    )
    assert np.linalg.norm(together - alone) < 0.2 * np.linalg.norm(alone)


def test_more_than_half_that_say_the_same_have_a_voice_each() -> None:
    """Else honest peers who agree would be outvoted by one who does not."""
    same, other = sparse(noise("same")), sparse(noise("other"))
    assert screen.compare(SIZE, [same, same, other]).voices() == [1, 1, 1]
    assert screen.compare(SIZE, [same, same, other, other]).voices() == [2, 2, 2, 2]
    assert screen.compare(SIZE, [same]).voices() == [1]


def test_honest_peers_have_a_voice_each() -> None:
    manifest = run()
    layout = manifest.fragments[0].layout
    decoded = [codec.decode(layout, manifest.up, offer(manifest, n, work(n, 2)).payload) for n in range(8)]
    assert screen.compare(SIZE, decoded).voices() == [1] * 8


# --- loudness --------------------------------------------------------------------------------------------------------


def test_one_of_two_is_at_most_twice_as_loud_as_the_other() -> None:
    manifest = run(coverage_halves=0)
    quiet, loud = offer(manifest, 0, work(0)), offer(manifest, 1, 200 * work(1))
    result = merged(manifest, [quiet, loud])
    factors = dict(result.admitted)
    assert factors[quiet.peer] == limits.CLIP_ONE
    assert factors[loud.peer] == pytest.approx(2 * limits.CLIP_ONE / 200, rel=0.1)


def test_who_claims_more_tokens_than_most_weighs_no_more() -> None:
    manifest = run()
    offers = [offer(manifest, n, work(n)) for n in range(4)]
    boasting = [*offers[:3], offer(manifest, 3, work(3), tokens=limits.WEIGHT_MAX)]
    assert merged(manifest, boasting).update == merged(manifest, offers).update
