"""Hugging Face's config.json <-> ModelConfig and the FFN width of each layer.

A llama with one width in all layers is written as the stock `LlamaForCausalLM` that it is: nested heads then shrink the
head counts, and keys that only braniac knows say what they were. Everything else (nanogpt, or widths that differ from
layer to layer) has a model_type of its own, `braniac-FAMILY`, which no other software will take for something it can
run, and in which head counts are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from braniac.model.config import FAMILIES, NANOGPT_SWITCHES, ModelConfig
from braniac.model.errors import CheckpointError, ConfigError
from braniac.model.slicing import BASE_KEY, Slice, annotate
from braniac.model.tiers import check_width, heads_at
from braniac.model.tokenizer import SEPARATOR, ByteTokenizer

LAYER_WIDTHS_KEY = "matformer_layer_widths"
FACTOR_KEY = "matformer_factor"
BASE_HEADS_KEY = "matformer_base_num_attention_heads"
BASE_KV_HEADS_KEY = "matformer_base_num_key_value_heads"

_DEFAULT_FACTOR = 8
_DEFAULT_ROPE_THETA = 10000.0
_OWN_TYPES = {f"braniac-{family}": family for family in FAMILIES}
_SWITCHES = tuple(key for key in NANOGPT_SWITCHES if key != "activation")  # which has a key of Hugging Face's
_OWN_KEYS = (FACTOR_KEY, LAYER_WIDTHS_KEY, "rope_theta", "rms_norm_eps", "logit_softcap", "nested_heads")
# What LlamaForCausalLM can be told to do and this package cannot, and the value that leaves it out.
_LLAMA_FIXED: Mapping[str, object] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
}
# transformers' own values for keys that an old config.json may lack.
_LLAMA_DEFAULTS: Mapping[str, object] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE_KEYS = ("rope_theta", "rope_type", "type", "partial_rotary_factor", *_LLAMA3_KEYS)


def is_stock(config: ModelConfig, widths: Sequence[int]) -> bool:
    """Whether a model with these FFN widths, one per layer, is a stock `LlamaForCausalLM`."""
    return config.family == "llama" and len(set(widths)) == 1


def to_config_json(config: ModelConfig, widths: Sequence[int]) -> dict[str, object]:
    """What config.json says of a model's first `widths` FFN neurons, one number per layer.

    Raises ConfigError if it is a llama whose head count at that width `LlamaForCausalLM` cannot have.
    """
    width, stock = max(widths), is_stock(config, widths)
    kv_heads = heads_at(config, width) if stock else config.kv_heads
    heads = kv_heads * (config.num_attention_heads // config.kv_heads)
    # Without the two token keys, LlamaForCausalLM would begin and end texts with tokens 1 and 2.
    end = SEPARATOR if config.vocab_size == ByteTokenizer.vocab_size else None
    document: dict[str, object] = {
        "model_type": "llama" if stock else f"braniac-{config.family}",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context,
        "hidden_act": "silu" if config.gated else config.activation,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        # The spelling of before transformers 5, which it still reads, as does all other software.
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(config),
        "bos_token_id": end,
        "eos_token_id": end,
        FACTOR_KEY: config.matformer_factor,
        BASE_KEY: config.intermediate_size,
    }
    if stock and config.hidden_size % heads:
        raise ConfigError(
            f"at {width} FFN neurons this model has {heads} attention heads, and LlamaForCausalLM refuses a number "
            f"that does not divide hidden_size ({config.hidden_size}): choose a width that has another number of them."
        )
    if stock:
        document |= {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False}
        if config.nested_heads:
            document |= {BASE_HEADS_KEY: config.num_attention_heads, BASE_KV_HEADS_KEY: config.kv_heads}
            document["nested_heads"] = True
    else:
        document |= {"logit_softcap": config.logit_softcap, "nested_heads": config.nested_heads}
        if config.family == "nanogpt":
            document |= {key: getattr(config, key) for key in _SWITCHES}
        document[LAYER_WIDTHS_KEY] = list(widths)
    return annotate(document, width=width)


def _rope_scaling(config: ModelConfig) -> dict[str, object] | None:
    if not config.rope_scaling:
        return None
    *factors, original = config.rope_scaling
    # transformers wants a whole number here, and a context is one.
    return {"rope_type": "llama3", **dict(zip(_LLAMA3_KEYS, (*factors, int(original)), strict=True))}


def from_config_json(
    found: Mapping[str, object], file: Path, held: Slice, context: int | None = None
) -> tuple[ModelConfig, tuple[int, ...]]:
    """The whole model's configuration and the FFN width of each layer in the tensors beside `file`.

    `held` is what the tensors are (`slicing.infer`); `context` shortens the longest input. A config without tiers gets
    as many of the usual four as its width can be halved for: that changes nothing in what the whole model computes.
    Raises CheckpointError naming the file, the key and what is expected.
    """
    family = _family(found, file)
    found = {key: value for key, value in found.items() if value is not None}
    if found["model_type"] in _OWN_TYPES:
        for key in _OWN_KEYS:
            _need(found, file, key)
    else:
        found = {**_LLAMA_DEFAULTS, **found}
        for key, wanted in _LLAMA_FIXED.items():
            if found.get(key, wanted) != wanted:
                _refuse(file, key, found[key], f"only {wanted!r} can be run, choose another model")
    longest = _whole(found, file, "max_position_embeddings")
    if context is not None and context > longest:
        _refuse(file, "max_position_embeddings", longest, f"ask for a context of at most that, not {context}")
    theta, scaling = _rope(found, file)
    values: dict[str, object] = {
        "family": family,
        **{key: _whole(found, file, key) for key in ("hidden_size", "num_hidden_layers", "vocab_size")},
        **_heads(found, file),
        "intermediate_size": held.base,
        "context": longest if context is None else context,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "matformer_factor": found.get(FACTOR_KEY, _default_factor(held)),
        "rms_norm_eps": found["rms_norm_eps"],
        **{key: found[key] for key in ("logit_softcap", "tie_word_embeddings", "nested_heads") if key in found},
    }
    if family == "nanogpt":
        values |= {key: found[key] for key in _SWITCHES if key in found}
        values["activation"] = found.get("hidden_act", "relu2")
    try:
        config = ModelConfig.from_dict(values)
        widths = _layer_widths(found, file, held, config.num_hidden_layers)
        for width in set(widths):
            check_width(config, width)
    except ConfigError as error:
        raise CheckpointError(f"{file} cannot be used: {error}") from error
    return config, widths


def _family(found: Mapping[str, object], file: Path) -> str:
    kind = found.get("model_type")
    if isinstance(kind, str) and kind in _OWN_TYPES:
        return _OWN_TYPES[kind]
    if kind != "llama":
        _refuse(file, "model_type", kind, f"one of llama, {', '.join(_OWN_TYPES)} is expected")
    architectures = found.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"]:
        _refuse(file, "architectures", architectures, "only ['LlamaForCausalLM'] can be run")
    return "llama"


def _heads(found: Mapping[str, object], file: Path) -> dict[str, int]:
    """Head counts of the whole model, with zeros where ModelConfig's defaults say the same."""
    heads_key, kv_key = "num_attention_heads", "num_key_value_heads"
    if BASE_HEADS_KEY in found:
        heads_key, kv_key = BASE_HEADS_KEY, BASE_KV_HEADS_KEY
    heads = _whole(found, file, heads_key)
    kv_heads = _whole(found, file, kv_key) if kv_key in found else heads
    head_dim = _whole(found, file, "head_dim") if "head_dim" in found else 0
    return {
        "num_attention_heads": heads,
        "num_key_value_heads": 0 if kv_heads == heads else kv_heads,
        "head_size": 0 if head_dim * heads == found["hidden_size"] else head_dim,
    }


def _layer_widths(found: Mapping[str, object], file: Path, held: Slice, layers: int) -> tuple[int, ...]:
    widths = found.get(LAYER_WIDTHS_KEY, [held.width] * layers)
    plain = [width for width in widths if type(width) is int] if isinstance(widths, list) else []
    if plain != widths or len(plain) != layers or max(plain) != held.width:
        _refuse(file, LAYER_WIDTHS_KEY, widths, f"{layers} whole numbers up to {held.width} are expected")
    return tuple(plain)


def _default_factor(held: Slice) -> int:
    """The usual number of tiers, more if this is an even smaller one, fewer if the width cannot be halved so often."""
    return min(max(_DEFAULT_FACTOR, 1 << held.tier), held.base & -held.base)


def _rope(found: Mapping[str, object], file: Path) -> tuple[object, list[object]]:
    """Base and Llama-3 stretch of the rotary frequencies, of before transformers 5 or, in rope_parameters, since."""
    old, new = found.get("rope_scaling", {}), found.get("rope_parameters", {})
    key = "rope_parameters" if new else "rope_scaling"
    if old and new and old != new:
        _refuse(file, "rope_scaling", old, "rope_parameters says otherwise, remove one of them")
    rope = new or old
    if not isinstance(rope, Mapping):
        _refuse(file, key, rope, "an object is expected")
    for name in rope:
        if name not in _ROPE_KEYS:
            _refuse(file, key, rope, f"{name!r} is none of the keys that can be used: {', '.join(_ROPE_KEYS)}")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        _refuse(file, key, rope, "only a partial_rotary_factor of 1.0 can be run")
    stated = [theta for theta in (found.get("rope_theta"), rope.get("rope_theta")) if theta is not None]
    if len(stated) == 2 and stated[0] != stated[1]:
        _refuse(file, "rope_theta", stated[0], f"{key} says {stated[1]!r}, remove one of them")
    theta = stated[0] if stated else _DEFAULT_ROPE_THETA
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, []
    if kind != "llama3":
        _refuse(file, "rope_type", kind, "only default and llama3 can be run, choose another model")
    return theta, [_need(rope, file, name) for name in _LLAMA3_KEYS]


def _need(found: Mapping[str, object], file: Path, key: str) -> object:
    if key not in found:
        raise CheckpointError(f"{file} lacks {key!r}: use the config.json that was saved with the weights.")
    return found[key]


def _whole(found: Mapping[str, object], file: Path, key: str) -> int:
    value = _need(found, file, key)
    if type(value) is not int or value < 1:
        _refuse(file, key, value, "a positive whole number is expected")
    return value


def _refuse(file: Path, key: str, value: object, remedy: str) -> NoReturn:
    raise CheckpointError(f"{file} has {key} {value!r:.200}: {remedy}.")
