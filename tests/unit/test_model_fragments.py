"""The fragment table: partition, rings, order, gather and scatter."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from braniac.model.config import PRESETS, ModelConfig
from braniac.model.errors import ConfigError
from braniac.model.fragments import (
    Fragment,
    Tile,
    fragment_table,
    gather,
    initial_fragment,
    layout_digest,
    scatter_,
    scatter_add_,
)
from braniac.model.initial import initial_tensor
from braniac.model.tiers import is_sliced, parameter_count, parameter_shapes, ring_rows, rings_of

TINY = PRESETS["tiny"]
GOLDEN_LAYOUT = "453cbc08ece0eb3b25a255a14c76211ce2b4a044e8ee82d8c9e9f4238f91cccf"
# Nothing here is a multiple of 64: tiles shrink at every edge, ring 0 has 10 neurons.
ODD = ModelConfig(
    hidden_size=72, num_hidden_layers=2, num_attention_heads=2, intermediate_size=80, vocab_size=100, context=8
)
# Gains, a gate, grouped queries, nested heads, a tied head.
LLAMA = ModelConfig(
    family="llama",
    hidden_size=72,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_size=6,
    intermediate_size=80,
    vocab_size=100,
    context=8,
    tie_word_embeddings=True,
    nested_heads=True,
)
# Value embeddings and skip connections, which every tier has.
RICH = ModelConfig(
    hidden_size=72,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=80,
    vocab_size=100,
    context=8,
    value_embeddings=1,
    skip_connections=True,
)


def numbered(config: ModelConfig, tier: int) -> dict[str, torch.Tensor]:
    """Every parameter of the whole model holds its own number; a tier is the prefix."""
    params, start = {}, 0
    for name, shape in parameter_shapes(config, 0).items():
        size = math.prod(shape)
        whole = torch.arange(start, start + size, dtype=torch.float32).view(shape)
        params[name] = whole[: parameter_shapes(config, tier)[name][0]].clone()
        start += size
    return params


@pytest.mark.parametrize(
    ("config", "count"), [(TINY, 4), (TINY, 8), (TINY, 23), (ODD, 5), (ODD, 9), (LLAMA, 7), (RICH, 7)]
)
@pytest.mark.parametrize("tier", [0, 1, 2, 3])
def test_the_fragments_of_a_tiers_rings_are_exactly_its_parameters(config: ModelConfig, count: int, tier: int) -> None:
    params = numbered(config, tier)
    held = [f for f in fragment_table(config, count) if f.ring in rings_of(config, tier)]
    found = torch.cat([gather(params, fragment) for fragment in held])
    expected = torch.cat([p.flatten() for p in params.values()])
    assert len(found) == parameter_count(config, tier)
    assert torch.equal(found.sort().values, expected.sort().values)


@settings(max_examples=30)
@given(
    heads=st.integers(1, 3),
    half_head=st.integers(1, 25),
    layers=st.integers(1, 2),
    core=st.integers(1, 70),
    llama=st.booleans(),
    nested=st.booleans(),
    log_factor=st.integers(0, 3),
    vocab=st.integers(2, 150),
    extra=st.integers(0, 3),
)
def test_any_table_is_a_partition(
    heads: int,
    half_head: int,
    layers: int,
    core: int,
    llama: bool,
    nested: bool,
    log_factor: int,
    vocab: int,
    extra: int,
) -> None:
    factor = 1 << log_factor
    config = ModelConfig(
        family="llama" if llama else "nanogpt",
        nested_heads=nested,
        head_size=2 * half_head,
        hidden_size=heads * half_head * 2,
        num_hidden_layers=layers,
        num_attention_heads=heads * factor,
        intermediate_size=core * factor,
        matformer_factor=factor,
        vocab_size=vocab,
        context=4,
    )
    cover = {name: np.zeros(shape, int) for name, shape in parameter_shapes(config, 0).items()}
    for fragment in fragment_table(config, config.tiers + min(extra, 1)):
        assert sum(size * count for size, count in fragment.groups) == fragment.size
        for tile in fragment.tiles:
            assert tile.rows <= 64
            assert tile.cols <= 64
            counts = np.atleast_2d(cover[tile.tensor])
            counts[tile.row0 : tile.row0 + tile.rows, tile.col0 : tile.col0 + tile.cols] += 1
            if is_sliced(config, tile.tensor):
                start, stop = ring_rows(config, tile.tensor, fragment.ring)
                assert start <= tile.row0
                assert tile.row0 + tile.rows <= stop
            else:
                assert fragment.ring == 0
    assert all((counts == 1).all() for counts in cover.values())


def test_equal_tiles_are_contiguous_and_largest_first() -> None:
    for fragment in fragment_table(ODD, 6):
        sizes = [size for size, _ in fragment.groups]
        assert sizes == sorted(set(sizes), reverse=True)


def test_fragments_have_their_place_as_index_and_share_out_the_parameters_evenly() -> None:
    table = fragment_table(PRESETS["small"], 64)
    assert [fragment.index for fragment in table] == list(range(64))
    sizes = [fragment.size for fragment in table]
    assert max(sizes) < 1.25 * min(sizes)


def test_every_fragment_has_tiles_of_every_layer() -> None:
    for fragment in fragment_table(PRESETS["small"], 16):
        layers = {tile.tensor.split(".")[2] for tile in fragment.tiles if ".layers." in tile.tensor}
        assert layers == {str(layer) for layer in range(6)}


def test_rings_are_spread_over_the_window() -> None:
    rings = [fragment.ring for fragment in fragment_table(TINY, 8)]
    assert Counter(rings) == {0: 4, 1: 1, 2: 1, 3: 2}
    places = [i for i, ring in enumerate(rings) if ring == 0]
    assert all(0 < later - earlier <= 3 for earlier, later in itertools.pairwise(places))


@pytest.mark.parametrize(("count", "sentence"), [(3, "use more"), (500, "too many")])
def test_impossible_fragment_counts_are_refused(count: int, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        fragment_table(TINY, count)


def test_the_layout_digest_tells_tables_apart() -> None:
    digest = layout_digest(TINY, 8)
    assert len(digest) == 32
    assert digest == layout_digest(TINY, 8)
    assert digest.hex() == GOLDEN_LAYOUT
    assert len({digest, layout_digest(TINY, 9), layout_digest(ODD, 8)}) == 3


def test_gather_order_is_tile_after_tile_row_major() -> None:
    params = {"a": torch.arange(12.0).view(3, 4)}
    fragment = Fragment(0, 0, (Tile("a", 1, 2, 1, 2), Tile("a", 0, 1, 3, 1)))
    assert gather(params, fragment).tolist() == [5, 6, 9, 10, 3]


def test_scatter_writes_what_gather_reads_and_nothing_else() -> None:
    params = numbered(ODD, 0)
    for fragment in fragment_table(ODD, 6):
        before = {name: p.clone() for name, p in params.items()}
        old = gather(params, fragment)
        scatter_(params, fragment, torch.full((fragment.size,), -1.0))
        assert sum(int((p != before[name]).sum()) for name, p in params.items()) == fragment.size
        scatter_add_(params, fragment, old + 1)
        assert all(torch.equal(p, before[name]) for name, p in params.items())


def test_a_tier_cannot_touch_a_ring_that_it_does_not_hold() -> None:
    params = numbered(TINY, 1)
    outer = next(fragment for fragment in fragment_table(TINY, 8) if fragment.ring == 3)
    with pytest.raises(AssertionError, match="ends before row"):
        gather(params, outer)


@pytest.mark.parametrize("config", [ODD, LLAMA])
def test_initial_fragments_are_the_initial_tensors(config: ModelConfig) -> None:
    params = {
        name: torch.from_numpy(initial_tensor(config, name, shape, seed=9))
        for name, shape in parameter_shapes(config, 0).items()
    }
    for fragment in fragment_table(config, 6):
        units = initial_fragment(config, fragment, seed=9)
        assert units.dtype == np.int32
        assert np.array_equal(units, gather(params, fragment).numpy() * 2**20)


def test_a_fragment_of_a_million_parameters_is_gathered_quickly() -> None:
    config = ModelConfig(hidden_size=512, num_hidden_layers=2, num_attention_heads=4, intermediate_size=1024, context=8)
    fragment = max(fragment_table(config, 4), key=lambda f: f.size)
    params = {name: torch.zeros(shape) for name, shape in parameter_shapes(config, 0).items()}
    assert fragment.size > 1_000_000
    durations_s = []
    for _ in range(5):
        start_s = time.process_time()
        scatter_add_(params, fragment, gather(params, fragment))
        durations_s.append(time.process_time() - start_s)
    assert min(durations_s) / fragment.size * 1e6 < 0.1  # per million and both ways; about 0.005 here
