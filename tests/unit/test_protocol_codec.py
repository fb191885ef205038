"""The codec: what goes in comes out, and nothing else is a payload."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braniac.protocol import bitpack, codec, limits
from braniac.protocol.bitpack import Int64Array
from braniac.protocol.codec import CodecRules
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.tiles import Sparse, TileLayout, select_topk

TILES = st.lists(st.tuples(st.integers(1, 80), st.integers(1, 4)), min_size=1, max_size=4)
RULES = st.builds(
    CodecRules, st.sampled_from([1, 64, 1000, 2048, 4096]), st.integers(1, limits.MAGNITUDE_BITS_MAX), st.integers(1, 4)
)
EXTREMES = np.array([0, 0, 0, 1, -1, 5, -5, (1 << 24) - 1, 1 << 24, -(1 << 31), (1 << 31) - 1])


def vector_of(layout: TileLayout, seed: int, kind: str) -> Int64Array:
    rng = np.random.default_rng(seed)
    match kind:
        case "zero":
            return np.zeros(layout.size, np.int64)
        case "ties":
            return rng.integers(-1, 2, layout.size)
        case "extreme":
            return rng.choice(EXTREMES, layout.size)
        case "sparse":
            return np.where(rng.random(layout.size) < 0.02, rng.integers(-(1 << 20), 1 << 20, layout.size), 0)
    return (rng.standard_normal(layout.size) * 10.0 ** rng.integers(0, 8)).astype(np.int64)


KINDS = st.sampled_from(["zero", "ties", "extreme", "sparse", "normal"])


def assert_legal(layout: TileLayout, rules: CodecRules, sparse: Sparse) -> None:
    """What every consumer of a decoded payload relies on."""
    assert sparse.positions.dtype == np.int64
    assert sparse.values.dtype == np.int32
    assert len(sparse.positions) == len(sparse.values)
    if not len(sparse):
        return
    assert np.all(np.diff(sparse.positions) > 0)
    assert sparse.positions[0] >= 0
    assert sparse.positions[-1] < layout.size
    assert np.all(sparse.values != 0)
    assert int(np.abs(sparse.values.astype(np.int64)).max()) <= limits.LEVEL_MAX
    tile = np.searchsorted(layout.tile_starts(), sparse.positions, side="right") - 1
    assert np.all(np.bincount(tile, minlength=layout.tiles) <= layout.capacity(rules.per_tile * rules.turns))


def same(a: Sparse, b: Sparse) -> bool:
    return np.array_equal(a.positions, b.positions) and np.array_equal(a.values, b.values)


@given(groups=TILES, rules=RULES, seed=st.integers(0, 1 << 30), kind=KINDS)
@settings(max_examples=80)
def test_round_trip(groups: list[tuple[int, int]], rules: CodecRules, seed: int, kind: str) -> None:
    layout = TileLayout(tuple(groups))
    payload, sent = codec.encode_topk(layout, rules, vector_of(layout, seed, kind), 1 + seed % rules.turns)
    decoded = codec.decode(layout, rules, payload)
    assert same(decoded, sent)
    assert_legal(layout, rules, decoded)
    assert len(payload) <= codec.payload_bytes_max(layout, rules)


@given(groups=TILES, rules=RULES, seed=st.integers(0, 1 << 30), kind=KINDS)
@settings(max_examples=80)
def test_encoding_what_was_decoded_changes_nothing(
    groups: list[tuple[int, int]], rules: CodecRules, seed: int, kind: str
) -> None:
    """Otherwise the merge of one contribution would not be that contribution."""
    layout = TileLayout(tuple(groups))
    _, sent = codec.encode_topk(layout, rules, vector_of(layout, seed, kind), 1 + seed % rules.turns)
    _, again = codec.encode(layout, rules, sent)
    assert same(sent, again)


@given(values=st.lists(st.integers(0, (1 << 15) - 1), max_size=70), spare=st.integers(0, 3))
def test_bit_streams_come_back(values: list[int], spare: int) -> None:
    array = np.array(values, np.int64)
    width = min(16, max([0, *map(int.bit_length, values)]) + spare)
    packed = bitpack.pack_bits(array, width)
    assert len(packed) == bitpack.bytes_of_bits(len(values) * width)
    assert np.array_equal(bitpack.unpack_bits(memoryview(packed), len(values), width), array)
    short = array % 40
    assert np.array_equal(bitpack.unpack_unary(memoryview(bitpack.pack_unary(short)), len(values)), short)


@given(values=st.lists(st.integers(0, limits.LEVEL_MAX), max_size=30))
def test_levels_are_close_and_come_back(values: list[int]) -> None:
    array = np.array(values, np.int64)
    levels = bitpack.to_float16(array)
    found = bitpack.level_values(levels)
    assert np.all(np.abs(found - array) <= array >> 11)
    assert np.array_equal(bitpack.to_float16(found), levels)


def test_a_level_on_the_mean_survives_a_second_encoding() -> None:
    """Rounding the levels moves the tile's mean, here across one of them."""
    layout, rules = TileLayout(((16, 1),)), CodecRules(4096, 2)
    changed = 0
    for seed in range(200):
        vector = np.random.default_rng(seed).integers(-6, 7, 16)
        _, sent = codec.encode_topk(layout, rules, vector)
        _, again = codec.encode(layout, rules, sent)
        changed += not same(sent, again)
    assert changed == 0


def test_quantisation_is_close_and_keeps_signs() -> None:
    layout, rules = TileLayout(((4096, 2),)), CodecRules(4096, 4)
    vector = (np.random.default_rng(1).standard_normal(layout.size) * 1e5).astype(np.int64)
    _, sent = codec.encode_topk(layout, rules, vector)
    dense = sent.dense(layout.size)
    assert np.array_equal(np.sign(dense), np.sign(vector))
    assert np.linalg.norm(dense - vector) < 0.1 * np.linalg.norm(vector)


def test_topk_keeps_the_largest_and_of_equal_ones_the_first() -> None:
    layout = TileLayout(((8, 2),))
    vector = np.array([3, -5, 3, 3, 0, 1, -3, 2] + [7] * 8)
    chosen = select_topk(layout, vector, per_tile=4096 * 3 // 8)
    assert chosen.positions.tolist() == [0, 1, 2, 8, 9, 10]
    assert chosen.values.tolist() == [3, -5, 3, 7, 7, 7]


@pytest.mark.parametrize("groups", [((50, 3), (1, 5), (7, 2)), ((4096, 9), (4096, 1), (700, 60))])
@pytest.mark.parametrize("kind", ["zero", "ties", "sparse", "normal"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_topk_matches_a_plain_sort(groups: tuple[tuple[int, int], ...], kind: str, dtype: type[np.integer]) -> None:
    """Also where the layout is longer than what is read at a time."""
    layout = TileLayout(groups)
    for seed in range(2):
        vector = vector_of(layout, seed, kind).astype(dtype)
        chosen = select_topk(layout, vector, per_tile=400)
        expected: list[int] = []
        starts = layout.tile_starts().tolist()
        for start, size, keep in zip(starts, layout.tile_sizes(), layout.capacity(400), strict=True):
            ranked = sorted(range(start, start + size), key=lambda i: (-abs(int(vector[i])), i))
            expected += sorted(i for i in ranked[:keep] if vector[i])
        assert chosen.positions.tolist() == expected


def test_magnitudes_beyond_int32_are_told_apart_no_more() -> None:
    vector = np.array([1 << 31, -(1 << 40), (1 << 31) - 1, (1 << 31) - 2])
    chosen = select_topk(TileLayout(((4, 1),)), vector, per_tile=3072)
    assert chosen.positions.tolist() == [0, 1, 2]
    assert chosen.values.tolist() == [limits.LEVEL_MAX, -limits.LEVEL_MAX, limits.LEVEL_MAX]


def test_values_beyond_the_range_are_cut_to_the_largest_level() -> None:
    layout, rules = TileLayout(((2, 1),)), CodecRules(4096, 1)
    payload, sent = codec.encode_topk(layout, rules, np.array([(1 << 31) - 1, -(1 << 31)]))
    assert same(codec.decode(layout, rules, payload), sent)
    largest = 2047 << 13
    assert sent.values.tolist() == [largest, -largest]
    assert largest <= limits.LEVEL_MAX


def test_tiles_of_one_value() -> None:
    layout, rules = TileLayout(((1, 9),)), CodecRules(512, 1)
    vector = np.array([0, 1, -2, 0, 0, 300, -1, 0, 2047])
    payload, sent = codec.encode_topk(layout, rules, vector)
    assert np.array_equal(sent.dense(9), vector)
    assert same(codec.decode(layout, rules, payload), sent)


@pytest.mark.parametrize(("per_tile", "sharing"), [(1, 8), (64, 8), (100, 5), (256, 2), (512, 1), (4096, 1)])
def test_neighbours_with_few_values_share_a_table_of_levels(per_tile: int, sharing: int) -> None:
    layout, rules = TileLayout(((4, 2 * sharing + 1),)), CodecRules(per_tile, 1)
    assert rules.table_tiles == sharing
    vector = np.zeros(layout.size, np.int64)
    vector[::4] = 1000 + np.arange(2 * sharing + 1)  # one value in each tile
    payload, sent = codec.encode_topk(layout, rules, vector)
    tables = [set(sent.values[at : at + sharing].tolist()) for at in range(0, 2 * sharing + 1, sharing)]
    assert [len(levels) for levels in tables] == [min(2, sharing)] * 2 + [1]
    assert same(codec.decode(layout, rules, payload), sent)


def test_neighbours_without_values_have_no_table() -> None:
    layout, rules = TileLayout(((4, 24),)), CodecRules(64, 1)
    vector = np.zeros(layout.size, np.int64)
    vector[[0, 95]] = 7, 300  # the first tile and the last, and nothing in the eight between
    payload, sent = codec.encode_topk(layout, rules, vector)
    assert sent.values.tolist() == [7, 300]
    assert same(codec.decode(layout, rules, payload), sent)
    vector[40] = 50
    assert len(codec.encode_topk(layout, rules, vector)[0]) == len(payload) + 4  # two levels


def test_nothing_to_send_is_a_legal_payload() -> None:
    layout, rules = TileLayout(((64, 3),)), CodecRules(64, 2)
    payload, sent = codec.encode_topk(layout, rules, np.zeros(192, np.int64))
    assert len(sent) == 0
    assert len(codec.decode(layout, rules, payload)) == 0


LAYOUT, FEW = TileLayout(((64, 2), (1, 2), (16, 1))), CodecRules(800, 2, 3)


def sample(kind: str) -> bytes:
    return codec.encode_topk(LAYOUT, FEW, vector_of(LAYOUT, 3, kind))[0]


@pytest.mark.parametrize("kind", ["zero", "ties", "sparse", "normal"])
def test_truncated_or_extended_payloads_are_refused(kind: str) -> None:
    payload = sample(kind)
    for length in range(len(payload)):
        with pytest.raises(WireError) as caught:
            codec.decode(LAYOUT, FEW, payload[:length])
        assert caught.value.refusal is Refusal.WRONG_SHAPE
    for tail in (b"\0", b"\x80", b"\xff" * 9):
        with pytest.raises(WireError):
            codec.decode(LAYOUT, FEW, payload + tail)


@pytest.mark.parametrize("kind", ["ties", "sparse", "normal"])
def test_every_bit_flip_is_legal_or_refused(kind: str) -> None:
    payload = sample(kind)
    legal = 0
    for bit in range(8 * len(payload)):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            decoded = codec.decode(LAYOUT, FEW, bytes(flipped))
        except WireError:
            continue
        assert_legal(LAYOUT, FEW, decoded)
        legal += 1
    assert 0 < legal < 8 * len(payload)  # a sign may flip; a header may not


@given(data=st.binary(max_size=200), header=st.booleans(), n=st.integers(0, 40), rice=st.integers(0, 16))
@settings(max_examples=300)
def test_any_bytes_are_legal_or_refused(data: bytes, header: bool, n: int, rice: int) -> None:
    if header:
        data = bytes([sample("zero")[0], FEW.magnitude_bits, rice, 1]) + n.to_bytes(4, "little") + data
    try:
        decoded = codec.decode(LAYOUT, FEW, data)
    except WireError:
        return
    assert_legal(LAYOUT, FEW, decoded)


def test_a_payload_of_another_fragment_or_direction_is_refused() -> None:
    payload = sample("normal")
    for layout, rules in ((TileLayout(((64, 3),)), FEW), (LAYOUT, CodecRules(800, 3)), (LAYOUT, CodecRules(100, 2))):
        with pytest.raises(WireError):
            codec.decode(layout, rules, payload)


@pytest.mark.parametrize("per_tile", [16, 64, 300])
def test_who_missed_turns_sends_the_values_of_several_at_once(per_tile: int) -> None:
    layout, rules = TileLayout(((4096, 9), (100, 2))), CodecRules(per_tile, 1, 4)
    vector = np.random.default_rng(1).integers(-(1 << 20), 1 << 20, layout.size)
    for turns in (1, 2, 3, 4):
        payload, sent = codec.encode_topk(layout, rules, vector, turns)
        assert same(codec.decode(layout, rules, payload), sent)
        assert len(sent) == layout.capacity(turns * per_tile).sum()
        assert len(payload) <= codec.payload_bytes_max(layout, rules)
        chosen = select_topk(layout, vector, turns * per_tile)
        assert np.array_equal(sent.positions, chosen.positions)


def test_no_payload_claims_more_turns_than_it_needs_or_may() -> None:
    layout, rules = TileLayout(((64, 20),)), CodecRules(256, 1, 3)
    vector = np.arange(1, 1 + layout.size)
    payload = bytearray(codec.encode_topk(layout, rules, vector, 2)[0])
    with pytest.raises(WireError, match="another format"):
        codec.decode(layout, CodecRules(256, 1), bytes(payload))
    payload[3] += 2  # one turn more: there would have to be counts now
    with pytest.raises(WireError, match="do not add up"):
        codec.decode(layout, rules, bytes(payload))
    few = np.where(vector % 64 < 3, vector, 0)  # three of the four values of one turn
    payload = bytearray(codec.encode_topk(layout, rules, few, 2)[0])
    payload[3] += 2
    with pytest.raises(WireError, match="fewer turns"):
        codec.decode(layout, rules, bytes(payload))


def test_payloads_grow_with_misses_and_then_begin_anew() -> None:
    rules = CodecRules(64, 1, 4)
    assert [rules.turns_after(missed) for missed in range(8)] == [1, 2, 3, 4, 1, 2, 3, 4]
    assert [CodecRules(64, 1).turns_after(missed) for missed in range(4)] == [1, 1, 1, 1]


def test_the_bound_on_payloads_is_tight_enough_to_be_useful() -> None:
    layout, rules = TileLayout(((4096, 64),)), CodecRules(64, 2)
    vector = np.random.default_rng(0).integers(-1000, 1000, layout.size)
    payload, _ = codec.encode_topk(layout, rules, vector)
    assert len(payload) < codec.payload_bytes_max(layout, rules) < layout.size // 4
    assert 8 < 8 * len(payload) / (64 * 64) < 13
