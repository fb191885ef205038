"""Configuration, tiers and rings, initial weights."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from braniac.model.config import PRESETS, ModelConfig
from braniac.model.errors import CheckpointError, ConfigError, DataError, ModelError, TrainingDiverged
from braniac.model.initial import initial_tensor, initial_units
from braniac.model.tiers import (
    EMBEDDING,
    HEAD,
    parameter_count,
    parameter_shapes,
    ring_of_row,
    ring_rows,
    rings_of,
    tier_width,
)

TINY = PRESETS["tiny"]

GOLDEN_EMBEDDING = [[-1284077, -554548, 1034170], [1381697, -1398875, 1003070]]
GOLDEN_UP_SUM = -1377864


def test_every_error_is_a_model_error() -> None:
    assert all(issubclass(kind, ModelError) for kind in (ConfigError, DataError, CheckpointError, TrainingDiverged))


def test_presets_have_the_announced_sizes() -> None:
    assert parameter_count(TINY, 0) == 458_752
    assert parameter_count(PRESETS["small"], 0) == 10_813_440
    assert TINY.tiers == 4
    assert [tier_width(TINY, tier) for tier in range(4)] == [512, 256, 128, 64]


def test_dict_round_trip_survives_json() -> None:
    text = json.dumps(TINY.to_dict()).replace("15.0", "15")
    assert ModelConfig.from_dict(json.loads(text)) == TINY


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hiden_size": 3}, "no key 'hiden_size': did you mean 'hidden_size'"),
        ({"zzz": 3}, "known keys are hidden_size"),
        ({"hidden_size": "128"}, "model.hidden_size is '128'"),
        ({"hidden_size": 128.0}, "model.hidden_size is 128.0"),
        ({"hidden_size": True}, "model.hidden_size is True"),
        ({"num_hidden_layers": 0}, "from 1 to"),
        ({"num_hidden_layers": 10**9}, "from 1 to"),
        ({"logit_softcap": float("nan")}, "model.logit_softcap is nan"),
        ({"rope_theta": True}, "model.rope_theta is True"),
        ({"num_attention_heads": 3}, "multiple of model.num_attention_heads"),
        ({"num_attention_heads": 128}, "even"),
        ({"matformer_factor": 6}, "power of two"),
        ({"intermediate_size": 516}, "multiple of model.matformer_factor"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_a_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ModelConfig.from_dict({**TINY.to_dict(), **change})


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError, match="lacks hidden_size, context"):
        ModelConfig.from_dict({k: v for k, v in TINY.to_dict().items() if k not in ("hidden_size", "context")})


def test_rings_partition_the_neurons_and_tiers_are_prefixes_of_rings() -> None:
    assert [ring_rows(TINY, ring) for ring in range(4)] == [(0, 64), (64, 128), (128, 256), (256, 512)]
    for tier in range(4):
        rows = [row for ring in rings_of(TINY, tier) for row in range(*ring_rows(TINY, ring))]
        assert rows == list(range(tier_width(TINY, tier)))
    for row in range(512):
        start, stop = ring_rows(TINY, ring_of_row(TINY, row))
        assert start <= row < stop


def test_a_model_without_nesting_has_one_tier_and_one_ring() -> None:
    config = dataclasses.replace(TINY, matformer_factor=1)
    assert config.tiers == 1
    assert ring_rows(config, 0) == (0, 512)


@pytest.mark.parametrize("tier", [-1, 4])
def test_a_tier_that_does_not_exist_is_refused(tier: int) -> None:
    with pytest.raises(ConfigError, match=f"tier {tier} does not exist"):
        parameter_shapes(TINY, tier)


def test_parameter_names_and_shapes() -> None:
    shapes = parameter_shapes(TINY, 2)
    assert next(iter(shapes)) == EMBEDDING
    assert list(shapes)[-1] == HEAD
    assert shapes["model.layers.1.mlp.down_proj.weight"] == (128, 128)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (128, 128)
    assert len(shapes) == 2 + 2 * 6


def test_initial_values_never_change() -> None:
    # Golden: peers of one run must agree on these for ever, whatever the versions of Python, NumPy and machine.
    units = initial_units(TINY, EMBEDDING, 0, 2, 0, 3, seed=0)
    assert units.tolist() == GOLDEN_EMBEDDING
    assert int(initial_units(TINY, "model.layers.1.mlp.up_proj.weight", 0, 512, 0, 128, seed=7).sum()) == GOLDEN_UP_SUM


def test_a_tier_starts_as_a_prefix_and_any_rectangle_agrees_with_the_whole() -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    whole = initial_tensor(TINY, name, (512, 128), seed=3)
    assert np.array_equal(initial_tensor(TINY, name, (64, 128), seed=3), whole[:64])
    part = initial_units(TINY, name, 50, 100, 60, 20, seed=3)
    assert np.array_equal(part, whole[50:150, 60:80] * 2**20)


def test_initial_values_have_the_declared_spread_and_depend_on_name_and_seed() -> None:
    embedding = initial_tensor(TINY, EMBEDDING, (256, 128), seed=0)
    assert abs(float(embedding.std()) - 1) < 0.02
    assert abs(float(embedding.mean())) < 0.02
    query = initial_tensor(TINY, "model.layers.0.self_attn.q_proj.weight", (128, 128), seed=0)
    assert abs(float(query.std()) - 0.5 / 128**0.5) < 0.002
    assert not np.array_equal(query, initial_tensor(TINY, "model.layers.0.self_attn.k_proj.weight", (128, 128), seed=0))
    assert not np.array_equal(query, initial_tensor(TINY, "model.layers.0.self_attn.q_proj.weight", (128, 128), seed=1))
    for name in (HEAD, "model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.o_proj.weight"):
        assert not initial_tensor(TINY, name, (128, 128), seed=0).any()
