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
    check_width,
    heads_at,
    layer_widths,
    mirror_of,
    parameter_count,
    parameter_shapes,
    ring_rows,
    rings_of,
    table_parameters,
    tier_width,
    value_table_of,
)

TINY = PRESETS["tiny"]

GOLDEN_EMBEDDING = [[-1284077, -554548, 1034170], [1381697, -1398875, 1003070]]
GOLDEN_UP_SUM = -1377864


def test_every_error_is_a_model_error() -> None:
    assert all(issubclass(kind, ModelError) for kind in (ConfigError, DataError, CheckpointError, TrainingDiverged))


def test_presets_have_the_announced_sizes() -> None:
    assert parameter_count(TINY, 0) == 458_752
    assert parameter_count(PRESETS["small"], 0) == 10_813_440
    assert parameter_count(PRESETS["nano-124m"], 0) - 50304 * 768 == 123_568_128
    assert [parameter_count(PRESETS["nano-1b"], tier) for tier in range(4)] == [
        1_011_351_552,
        742_916_096,
        608_698_368,
        541_589_504,
    ]
    assert TINY.tiers == 4
    assert [tier_width(TINY, tier) for tier in range(4)] == [512, 256, 128, 64]


def test_dict_round_trip_survives_json() -> None:
    stretched = dataclasses.replace(NESTED, rope_scaling=(8.0, 1.0, 4.0, 64.0))
    for config in (TINY, stretched):
        text = json.dumps(config.to_dict()).replace("15.0", "15").replace("4.0", "4")
        assert ModelConfig.from_dict(json.loads(text)) == config


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
        ({"logit_softcap": 0.5}, r"model.logit_softcap is 0.5: it must be 0 \(none\), or at least 1"),
        ({"qk_norm": 0}, "model.qk_norm is 0: it must be true or false"),
        ({"activation": "silu"}, "model.activation is 'silu': it must be one of relu2, gelu"),
        ({"value_embeddings": 2}, "each takes two layers, and there are 2, so choose at most 1"),
        (
            {"value_embeddings": 1, "nested_heads": True, "num_key_value_heads": 0, "num_attention_heads": 8},
            "one order",
        ),
        ({"skip_connections": True, "num_hidden_layers": 1}, "each takes two layers, and there are 1"),
        ({"family": "llama", "embedding_norm": False}, "only the nanogpt family can have it so, leave it out"),
        ({"family": "llama", "value_embeddings": 1}, "model.value_embeddings is 1: only the nanogpt family"),
        ({"rope_theta": True}, "model.rope_theta is True"),
        ({"num_attention_heads": 3}, "multiple of model.num_attention_heads"),
        ({"num_attention_heads": 128}, "even"),
        ({"matformer_factor": 6}, "power of two"),
        ({"intermediate_size": 516}, "multiple of model.matformer_factor"),
        ({"family": "gpt2"}, "model.family is 'gpt2': it must be one of nanogpt, llama"),
        ({"num_key_value_heads": 3}, "multiple of model.num_key_value_heads"),
        ({"head_size": 7}, "model.head_size is 7"),
        ({"nested_heads": True}, "multiple of model.matformer_factor"),
        ({"nested_heads": 1}, "true or false"),
        ({"rope_scaling": [8.0, 1.0, 4.0]}, "model.rope_scaling"),
        ({"rope_scaling": [8.0, 4.0, 1.0, 64.0]}, "larger than its second"),
        ({"rope_scaling": "llama3"}, "model.rope_scaling"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_in_a_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        ModelConfig.from_dict({**TINY.to_dict(), **change})


def test_missing_keys_are_named() -> None:
    with pytest.raises(ConfigError, match="lacks hidden_size, context"):
        ModelConfig.from_dict({k: v for k, v in TINY.to_dict().items() if k not in ("hidden_size", "context")})


UP, QUERY, KEY = (f"model.layers.0.{part}_proj.weight" for part in ("mlp.up", "self_attn.q", "self_attn.k"))
NESTED = ModelConfig(
    family="llama",
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    intermediate_size=512,
    context=16,
    nested_heads=True,
)


def test_rings_partition_the_neurons_and_tiers_are_prefixes_of_rings() -> None:
    assert [ring_rows(TINY, UP, ring) for ring in range(4)] == [(0, 64), (64, 128), (128, 256), (256, 512)]
    for tier in range(4):
        rows = [row for ring in rings_of(TINY, tier) for row in range(*ring_rows(TINY, UP, ring))]
        assert rows == list(range(tier_width(TINY, tier)))


def test_nested_heads_are_halved_with_the_neurons() -> None:
    assert [ring_rows(NESTED, KEY, ring) for ring in range(4)] == [(0, 4), (4, 8), (8, 16), (16, 32)]
    assert [ring_rows(NESTED, QUERY, ring) for ring in range(4)] == [(0, 8), (8, 16), (16, 32), (32, 64)]
    assert parameter_shapes(NESTED, 3)[QUERY] == (8, 64)
    assert [heads_at(NESTED, width) for width in (64, 65, 128, 511, 512)] == [1, 2, 2, 8, 8]
    assert heads_at(dataclasses.replace(NESTED, nested_heads=False), 64) == 8


def test_a_model_without_nesting_has_one_tier_and_one_ring() -> None:
    config = dataclasses.replace(TINY, matformer_factor=1)
    assert config.tiers == 1
    assert ring_rows(config, UP, 0) == (0, 512)


@pytest.mark.parametrize("width", [0, -64, 63, 100, 576])
def test_a_width_that_is_no_prefix_of_the_configuration_is_refused(width: int) -> None:
    with pytest.raises(ConfigError, match="a multiple of 64 from 64 to 512"):
        check_width(TINY, width)


def test_one_width_per_layer_or_one_for_all() -> None:
    assert layer_widths(TINY, None) == (512, 512)
    assert layer_widths(TINY, None, tier=2) == (128, 128)
    assert layer_widths(TINY, 192) == (192, 192)
    assert layer_widths(TINY, [64, 320]) == (64, 320)
    with pytest.raises(ConfigError, match="3 widths: give one for each of 2 layers"):
        layer_widths(TINY, [64, 64, 64])
    with pytest.raises(ConfigError, match="exceeds the 128 neurons of tier 2"):
        layer_widths(TINY, [64, 192], tier=2)


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


def test_llama_has_gains_a_gate_and_fewer_keys() -> None:
    shapes = parameter_shapes(PRESETS["tiny-llama"], 1)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (256, 128)
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (64, 128)
    assert shapes["model.layers.1.post_attention_layernorm.weight"] == shapes["model.norm.weight"] == (128,)
    assert len(shapes) == 3 + 2 * 9
    tied = parameter_shapes(dataclasses.replace(PRESETS["tiny-llama"], tie_word_embeddings=True), 1)
    assert shapes.keys() - tied.keys() == {HEAD}


def test_value_embeddings_and_skip_connections_are_outside_the_layers_and_in_every_tier() -> None:
    rich = dataclasses.replace(TINY, num_hidden_layers=5, value_embeddings=2, skip_connections=True)
    plain = dataclasses.replace(TINY, num_hidden_layers=5)
    for tier in (0, 3):
        added = parameter_shapes(rich, tier).items() - parameter_shapes(plain, tier).items()
        assert dict(added) == {
            "model.value_embeds.0.weight": (256, 128),
            "model.value_embeds.1.weight": (256, 128),
            "model.skips.weight": (2, 128),
        }
    assert [value_table_of(rich, layer) for layer in range(5)] == [0, 1, None, 0, 1]
    assert [mirror_of(rich, layer) for layer in range(5)] == [None, None, None, 1, 0]
    assert {value_table_of(plain, layer) for layer in range(5)} == {mirror_of(plain, 4)} == {None}
    assert table_parameters(rich) == 4 * 256 * 128


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
    random = dataclasses.replace(TINY, zero_outputs=False)
    outputs = {HEAD: 128, "model.layers.0.mlp.down_proj.weight": 512, "model.layers.0.self_attn.o_proj.weight": 128}
    for name, inputs in outputs.items():
        assert not initial_tensor(TINY, name, (128, 128), seed=0).any()
        assert float(initial_tensor(random, name, (128, 128), seed=0).std()) == pytest.approx(
            0.5 / inputs**0.5, rel=0.02
        )
    assert not initial_tensor(random, "model.value_embeds.0.weight", (256, 128), seed=0).any()
    assert (initial_tensor(random, "model.skips.weight", (2, 128), seed=0) == 1).all()
