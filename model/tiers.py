"""MatFormer tiers and rings: which FFN neurons belong to whom, and the canonical name and shape of every parameter.

Tier t keeps the first h >> t neurons. Ring j is the block of neurons that tier T-1-j adds to the next smaller tier,
so with T = 4:  ring 0 = [0, h/8)  ring 1 = [h/8, h/4)  ring 2 = [h/4, h/2)  ring 3 = [h/2, h).
Everything that is not an FFN matrix belongs to every tier, hence to ring 0.

In memory both FFN matrices are neuron-major [h, D], so that a tier is a prefix of rows and a ring a block of rows.
Source of the nesting: MatFormer, Devvrit et al. 2023 (arXiv 2310.07707).
"""

from __future__ import annotations

from braniac.model.config import ModelConfig
from braniac.model.errors import ConfigError

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def check_tier(config: ModelConfig, tier: int) -> None:
    """Raise ConfigError unless `tier` is one of the configuration's tiers."""
    if not 0 <= tier < config.tiers:
        raise ConfigError(f"tier {tier} does not exist in this model: choose one from 0 (whole) to {config.tiers - 1}.")


def tier_width(config: ModelConfig, tier: int) -> int:
    """FFN neurons of a tier."""
    check_tier(config, tier)
    return config.intermediate_size >> tier


def rings_of(config: ModelConfig, tier: int) -> range:
    """The rings that a tier consists of."""
    check_tier(config, tier)
    return range(config.tiers - tier)


def ring_rows(config: ModelConfig, ring: int) -> tuple[int, int]:
    """First and one-past-last FFN neuron of a ring."""
    assert 0 <= ring < config.tiers, ring
    start = 0 if ring == 0 else config.intermediate_size >> (config.tiers - ring)
    return start, config.intermediate_size >> (config.tiers - 1 - ring)


def ring_of_row(config: ModelConfig, row: int) -> int:
    """The ring that an FFN neuron belongs to."""
    assert 0 <= row < config.intermediate_size, row
    return next(ring for ring in range(config.tiers) if row < ring_rows(config, ring)[1])


def is_ffn(name: str) -> bool:
    """Whether this parameter is an FFN matrix, the only kind that tiers slice."""
    return ".mlp." in name


def parameter_shapes(config: ModelConfig, tier: int) -> dict[str, tuple[int, int]]:
    """Name -> in-memory shape of every parameter of a tier, in canonical order. Names are Hugging Face's."""
    width, d = tier_width(config, tier), config.hidden_size
    shapes: dict[str, tuple[int, int]] = {EMBEDDING: (config.vocab_size, d)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{kind}_proj.weight": (d, d) for kind in "qkvo"}
        shapes |= {f"{prefix}.mlp.{kind}_proj.weight": (width, d) for kind in ("up", "down")}
    shapes[HEAD] = (config.vocab_size, d)
    return shapes


def parameter_count(config: ModelConfig, tier: int) -> int:
    """Parameters of a tier."""
    return sum(rows * columns for rows, columns in parameter_shapes(config, tier).values())
