"""What kind of model a checkpoint is, as one hash: equal for a universal checkpoint and all its slices.

Unlike psyche-elastic's, it is made of typed values, not of the text of a config.json: the order of keys, the spelling
of floats, keys that mean nothing to the model and transformers' renamings do not change it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

from braniac.model.errors import CheckpointError
from braniac.model.hf_config import BASE_HEADS_KEY, BASE_KV_HEADS_KEY
from braniac.model.slicing import infer

# What decides the parameters or the function of a model, its type, and the value that a missing key stands for.
_SCHEMA: Mapping[str, tuple[type, object]] = {
    "model_type": (str, None),
    "hidden_size": (int, None),
    "vocab_size": (int, None),
    "num_hidden_layers": (int, None),
    "num_attention_heads": (int, None),
    "num_key_value_heads": (int, None),
    "head_dim": (int, None),
    "max_position_embeddings": (int, None),
    "hidden_act": (str, "silu"),
    "rms_norm_eps": (float, 1e-6),
    "logit_softcap": (float, None),
    "attention_bias": (bool, False),
    "mlp_bias": (bool, False),
    "tie_word_embeddings": (bool, False),
    "nested_heads": (bool, False),
}
# Only what departs from its value is hashed, so that models of before these keys keep their hash.
_LATER: Mapping[str, tuple[type, object]] = {
    "qk_norm": (bool, True),
    "embedding_norm": (bool, True),
    "value_embeddings": (int, 0),
    "skip_connections": (bool, False),
}
_DEFAULT_ROPE_THETA = 10000.0
_LARGEST_FLOAT = 1e300


def schema_hash(config: Mapping[str, object], names: Iterable[str]) -> str:
    """SHA-256 (hex) of what kind of model this is.

    Of `config` (a config.json) only the keys that decide parameters or function count, in canonical spelling and with
    the base in place of the slice's width; `names` are the tensors' names in any order. It says nothing about values of
    weights. Raises CheckpointError for a key of a wrong type.
    """
    held = infer(config)
    # A slice of a model with nested heads has fewer of them, and says how many there were.
    whole_heads = (("num_attention_heads", BASE_HEADS_KEY), ("num_key_value_heads", BASE_KV_HEADS_KEY))
    config = {**config, **{key: config[base] for key, base in whole_heads if base in config}}
    fields = {key: _typed(key, config.get(key), kind, default) for key, (kind, default) in _SCHEMA.items()}
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = heads
    if fields["head_dim"] is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
        fields["head_dim"] = hidden // heads
    later = {key: _typed(key, config.get(key), kind, default) for key, (kind, default) in _LATER.items()}
    fields |= {key: value for key, value in later.items() if value != _LATER[key][1]}
    fields["rope"] = _rope(config)
    fields["base"] = held.base
    document = json.dumps([fields, sorted(set(names))], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(document.encode()).hexdigest()


def _typed(key: str, value: object, kind: type, default: object) -> object:
    """The value, or its default, in the one spelling that is hashed: floats as their exact hexadecimal."""
    if value is None:
        value = default
    if kind is float and isinstance(value, int | float) and type(value) is not bool:
        if abs(value) <= _LARGEST_FLOAT:  # NaN fails the comparison too
            return float(value).hex()
    elif value is None or type(value) is kind:
        return value
    raise CheckpointError(f"config.json has {key} {value!r}: it must be a {kind.__name__}.")


def _rope(config: Mapping[str, object]) -> dict[str, object]:
    """Rotary positions, which transformers 5 spells rope_parameters, others rope_theta and rope_scaling."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"config.json has rope_parameters or rope_scaling {scaling!r}: it must be an object.")
    theta = scaling.get("rope_theta", config.get("rope_theta"))
    kind = scaling.get("rope_type", scaling.get("type"))
    numbers = {key: value for key, value in scaling.items() if key not in ("rope_theta", "rope_type", "type")}
    return {
        "rope_theta": _typed("rope_theta", theta, float, _DEFAULT_ROPE_THETA),
        "rope_type": _typed("rope_type", kind, str, "default"),
        **{str(key): _typed(str(key), value, float, None) for key, value in numbers.items() if value is not None},
    }
