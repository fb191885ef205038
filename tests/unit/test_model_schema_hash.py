"""The schema hash: one for a model and all its slices, whatever the spelling; another for any other model."""

from __future__ import annotations

import dataclasses
import json

import pytest

from braniac.model.config import ModelConfig
from braniac.model.errors import CheckpointError
from braniac.model.hf_config import to_config_json
from braniac.model.schema import schema_hash
from braniac.model.slicing import annotate
from tests.unit.checkpoint_folders import MODEL, NAMES

FULL = {
    **MODEL,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def test_a_universal_checkpoint_and_its_slices_have_one_schema() -> None:
    whole = annotate(FULL, width=64)
    hashes = {schema_hash(annotate(whole, width=width), NAMES) for width in (64, 48, 32, 16)}
    assert hashes == {schema_hash(FULL, NAMES)}
    assert schema_hash({**FULL, "intermediate_size": 32}, NAMES) not in hashes


def test_a_slice_with_fewer_heads_has_the_schema_of_the_whole() -> None:
    config = ModelConfig(
        family="llama",
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=64,
        context=8,
        matformer_factor=4,
        nested_heads=True,
    )
    documents = [to_config_json(config, [width]) for width in (64, 32, 16)]
    assert [document["num_attention_heads"] for document in documents] == [8, 4, 2]
    assert len({schema_hash(document, NAMES) for document in documents}) == 1
    dense = to_config_json(dataclasses.replace(config, nested_heads=False), [64])
    assert schema_hash(dense, NAMES) != schema_hash(documents[0], NAMES)


@pytest.mark.parametrize(
    "other",
    [
        dict(reversed(FULL.items())),
        json.loads(json.dumps(FULL).replace("1e-06", "0.0000010")),
        json.loads(json.dumps(FULL).replace("10000.0", "10000")),
        json.loads(json.dumps(FULL).replace("10000.0", "1E+4")),
        {**FULL, "transformers_version": "5.0", "_comment": "x", "torch_dtype": "bfloat16", "eos_token_id": [1, 2]},
        {**FULL, "matformer_tier": 0, "matformer_base_intermediate_size": 64, "head_dim": 2, "hidden_act": "silu"},
        {key: value for key, value in FULL.items() if key not in ("rms_norm_eps", "rope_theta", "num_key_value_heads")},
        {**FULL, "rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {**FULL, "rope_scaling": {"type": "default"}},
        {**FULL, "qk_norm": True, "embedding_norm": True, "value_embeddings": 0, "skip_connections": False},
    ],
)
def test_spelling_does_not_change_the_schema(other: dict[str, object]) -> None:
    assert schema_hash(other, NAMES) == schema_hash(FULL, reversed(NAMES))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "nanogpt"},
        {"hidden_size": 8},
        {"intermediate_size": 128},
        {"vocab_size": 9},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 4},
        {"max_position_embeddings": 32},
        {"rms_norm_eps": 1e-5},
        {"rope_theta": 5e5},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
        {"logit_softcap": 15.0},
        {"qk_norm": False},
        {"embedding_norm": False},
        {"value_embeddings": 1},
        {"skip_connections": True},
    ],
)
def test_what_changes_the_model_changes_the_schema(change: dict[str, object]) -> None:
    assert schema_hash({**FULL, **change}, NAMES) != schema_hash(FULL, NAMES)


def test_the_names_of_the_tensors_belong_to_the_schema() -> None:
    assert schema_hash(FULL, NAMES[1:]) != schema_hash(FULL, NAMES)
    assert schema_hash(FULL, ["ab", "c"]) != schema_hash(FULL, ["a", "bc"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "4"),
        ("hidden_size", True),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", 10**400),
        ("rope_theta", False),
        ("tie_word_embeddings", 1),
        ("model_type", 3),
        ("rope_scaling", [1.0]),
        ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
    ],
)
def test_a_key_of_a_wrong_type_is_refused(key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=r"config.json has .*it must be"):
        schema_hash({**FULL, key: value}, NAMES)
