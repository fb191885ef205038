"""MatFormer tiers and rings: which rows of which parameter belong to whom, and the name and shape of every parameter.

Tier t keeps the first h >> t FFN neurons. Ring j is the block of neurons that tier T-1-j adds to the next smaller tier,
so with T = 4:  ring 0 = [0, h/8)  ring 1 = [h/8, h/4)  ring 2 = [h/4, h/2)  ring 3 = [h/2, h).
With `nested_heads` the attention heads are halved in the same way; otherwise everything that is not an FFN matrix
belongs to every tier, hence to ring 0.

In memory the FFN matrices are neuron-major [h, D], `down` and `o` too, whose rows are therefore their inputs: a width
is a prefix of rows and a ring a block of rows, in every matrix that is sliced at all.
Source of the nesting: MatFormer, Devvrit et al. 2023 (arXiv 2310.07707).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from braniac.model.config import ModelConfig
from braniac.model.errors import ConfigError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
SKIPS = "model.skips.weight"

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_VALUES = "model.value_embeds."

WidthMap = int | Sequence[int] | None
"""FFN neurons to use: the same in every layer, or one number per layer; None: all that are held."""


def check_tier(config: ModelConfig, tier: int) -> None:
    """Raise ConfigError unless `tier` is one of the configuration's tiers."""
    if not 0 <= tier < config.tiers:
        raise ConfigError(f"tier {tier} does not exist in this model: choose one from 0 (whole) to {config.tiers - 1}.")


def tier_width(config: ModelConfig, tier: int) -> int:
    """FFN neurons of a tier."""
    check_tier(config, tier)
    return config.intermediate_size >> tier


def tier_widths(config: ModelConfig) -> tuple[int, ...]:
    """FFN neurons of all tiers, the whole model first."""
    return tuple(tier_width(config, tier) for tier in range(config.tiers))


def check_width(config: ModelConfig, width: int) -> None:
    """Raise ConfigError unless `width` is a prefix that this configuration allows."""
    smallest, step = tier_width(config, config.tiers - 1), config.width_step
    if not smallest <= width <= config.intermediate_size or width % step:
        raise ConfigError(
            f"an FFN width of {width} is none of this model's: "
            f"choose a multiple of {step} from {smallest} to {config.intermediate_size}."
        )


def layer_widths(config: ModelConfig, widths: WidthMap, tier: int = 0) -> tuple[int, ...]:
    """One checked width per layer. Raises ConfigError for a width, or a number of them, that does not fit."""
    held = tier_width(config, tier)
    if widths is None or isinstance(widths, int):
        widths = [held if widths is None else widths] * config.num_hidden_layers
    if len(widths) != config.num_hidden_layers:
        raise ConfigError(
            f"a width map of {len(widths)} widths: give one for each of {config.num_hidden_layers} layers."
        )
    for width in widths:
        check_width(config, width)
        if width > held:
            raise ConfigError(
                f"an FFN width of {width} exceeds the {held} neurons of tier {tier}: choose a smaller one."
            )
    return tuple(widths)


def rings_of(config: ModelConfig, tier: int) -> range:
    """The rings that a tier consists of."""
    check_tier(config, tier)
    return range(config.tiers - tier)


def heads_at(config: ModelConfig, width: int) -> int:
    """Key-value heads in use at an FFN width; any width has at least one."""
    return math.ceil(config.kv_heads * width / config.intermediate_size) if config.nested_heads else config.kv_heads


def is_ffn(name: str) -> bool:
    """Whether this parameter is an FFN matrix."""
    return ".mlp." in name


def is_gain(name: str) -> bool:
    """Whether this parameter multiplies channels: the gain of a norm [D], or those of all skip connections [S, D]."""
    return name.endswith("norm.weight") or name == SKIPS


def is_table(name: str) -> bool:
    """Whether this parameter has a row for each token: embedding, head, value embeddings."""
    return name in (EMBEDDING, HEAD) or name.startswith(_VALUES)


def value_table(number: int) -> str:
    """The name of a value embedding."""
    return f"{_VALUES}{number}.weight"


def value_table_of(config: ModelConfig, layer: int) -> int | None:
    """The number of the value embedding that a layer reads; None if it reads none."""
    tables, beyond = config.value_embeddings, layer - (config.num_hidden_layers - config.value_embeddings)
    if layer < tables:
        return layer
    return beyond if beyond >= 0 else None


def mirror_of(config: ModelConfig, layer: int) -> int | None:
    """The layer whose input a layer's skip connection brings it, also its row of SKIPS; None if it has none."""
    mirror = config.num_hidden_layers - 1 - layer
    return mirror if config.skip_connections and mirror < config.num_hidden_layers // 2 else None


def is_sliced(config: ModelConfig, name: str) -> bool:
    """Whether narrower widths hold fewer rows of this parameter."""
    return is_ffn(name) or (config.nested_heads and ".self_attn." in name)


def is_input_major(name: str) -> bool:
    """Whether the rows of this matrix are its inputs in memory, and its columns on a Hugging Face disk."""
    return ".down_proj." in name or ".o_proj." in name


def layer_of(name: str) -> int | None:
    """The layer a parameter belongs to; None for those outside the layers."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def rows_at(config: ModelConfig, name: str, width: int) -> int:
    """Rows of a parameter of one layer that are in use at an FFN width."""
    if is_ffn(name):
        return width
    group = config.num_attention_heads // config.kv_heads
    per_kv_head = config.head_dim * (1 if ".k_proj." in name or ".v_proj." in name else group)
    return heads_at(config, width) * per_kv_head


def ring_rows(config: ModelConfig, name: str, ring: int) -> tuple[int, int]:
    """First and one-past-last row of a sliced parameter in a ring."""
    assert 0 <= ring < config.tiers, ring
    assert is_sliced(config, name), name
    first, last = (rows_at(config, name, config.intermediate_size >> (config.tiers - at)) for at in (ring, ring + 1))
    return (0 if ring == 0 else first), last


def shapes_at(config: ModelConfig, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Name -> in-memory shape of every parameter of a model with these FFN widths, one per layer, in canonical order.

    Names are Hugging Face's where it has one. Gains of norms have one dimension, everything else has two.
    """
    d, gains = config.hidden_size, config.family == "llama"
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, d)}
    values = (config.vocab_size, config.kv_heads * config.head_dim)
    shapes |= {value_table(number): values for number in range(config.value_embeddings)}
    for layer, width in enumerate(widths):
        prefix = f"model.layers.{layer}"
        names = [f"{prefix}.self_attn.{kind}_proj.weight" for kind in "qkvo"]
        names += [f"{prefix}.mlp.{kind}_proj.weight" for kind in (("gate",) if config.gated else ()) + ("up", "down")]
        shapes |= {name: (rows_at(config, name, width), d) for name in names}
        if gains:
            shapes |= {f"{prefix}.{which}_layernorm.weight": (d,) for which in ("input", "post_attention")}
    if gains:
        shapes[FINAL_NORM] = (d,)
    if config.skip_connections:
        shapes[SKIPS] = (config.num_hidden_layers // 2, d)
    if not config.tie_word_embeddings:
        shapes[HEAD] = (config.vocab_size, d)
    return shapes


def parameter_shapes(config: ModelConfig, tier: int) -> dict[str, tuple[int, ...]]:
    """Name -> in-memory shape of every parameter of a tier, in canonical order."""
    return shapes_at(config, [tier_width(config, tier)] * config.num_hidden_layers)


def parameter_count(config: ModelConfig, tier: int) -> int:
    """Parameters of a tier."""
    return sum(math.prod(shape) for shape in parameter_shapes(config, tier).values())


def table_parameters(config: ModelConfig) -> int:
    """Parameters of what has a row for each token, which every tier holds whole."""
    return sum(math.prod(shape) for name, shape in shapes_at(config, []).items() if is_table(name))
