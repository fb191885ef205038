"""Mix'n'Match: any width per layer out of one set of weights, what each choice costs in loss, and models cut from it.

A *width map* names the FFN neurons of every layer. Only uniform maps were trained, and yet the mixed ones between them
work, because every neuron was trained in the company of all that come before it (MatFormer, Devvrit et al. 2023,
arXiv 2310.07707; Gemma 3n's MatFormer Lab). budget.py chooses the map, recipes.py keeps it.

`controls` shows that this is a property of the training and not of slicing: the same maps with the neurons of each
layer in random order, and on a model that was trained at full width only.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from braniac.model.config import ModelConfig
from braniac.model.convert import orderings, reorder_
from braniac.model.errors import ConfigError
from braniac.model.evaluate import held_out_loss
from braniac.model.gpt import GPT
from braniac.model.tiers import WidthMap, check_width, tier_widths

MAX_MAPS = 10_000

Order = Literal["any", "non-decreasing", "non-increasing"]
"""Which maps to enumerate: all, or those whose layers become only wider, or only narrower, with depth."""

Windows = tuple[Tensor, Tensor]
"""Tokens and targets to evaluate on, int64 [N, T] each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sensitivities:
    """What narrowing one layer costs. Raises ConfigError for numbers that are not finite."""

    full_loss: float
    """With every layer at full width, nats per token."""

    layers: tuple[Mapping[int, float], ...]
    """Per layer, what each width adds to the loss when only this layer has it; noise can make it negative."""

    def __post_init__(self) -> None:
        for number in (self.full_loss, *(number for layer in self.layers for number in layer.values())):
            if not math.isfinite(number):
                raise ConfigError(f"a sensitivity is {number}: load weights with which every loss is a finite number.")

    def expected_loss(self, widths: Sequence[int]) -> float:
        """The additive proxy: as if the layers' increases added up, nats per token."""
        total = self.full_loss
        for increases, width in zip(self.layers, widths, strict=True):
            total += increases[width]
        return total


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """The held-out loss of one map, in nats per token, and of what should be worse."""

    widths: tuple[int, ...]
    """FFN neurons per layer."""

    loss: float
    """Of the model itself."""

    permuted_loss: float
    """Of a copy with each layer's neurons in random order, whose full-width loss is the same."""

    unnested_loss: float | None
    """Of the model that was trained at full width only, if one was given."""


def candidate_widths(config: ModelConfig) -> tuple[int, ...]:
    """The widths to choose from where nobody says otherwise: the tiers' and those halfway, the narrowest first."""
    tiers, step = tier_widths(config), config.width_step
    halfway = ((wide + narrow) // 2 // step * step for wide, narrow in itertools.pairwise(tiers))
    return tuple(sorted({*tiers, *halfway}))


def checked_candidates(config: ModelConfig, candidates: Sequence[int] | None) -> tuple[int, ...]:
    """`candidates`, sorted, or `candidate_widths`. Raises ConfigError for none at all or one that does not fit."""
    if candidates is None:
        return candidate_widths(config)
    if not candidates:
        raise ConfigError("no candidate widths are given: name at least one.")
    for width in candidates:
        check_width(config, width)
    return tuple(sorted(set(candidates)))


def enumerate_maps(
    config: ModelConfig,
    candidates: Sequence[int] | None = None,
    *,
    order: Order = "any",
    limit: int = MAX_MAPS,
) -> list[tuple[int, ...]]:
    """All width maps over the candidates, in lexicographic order.

    Raises ConfigError if they are more than `limit`: W^L for W widths and L layers, C(L + W - 1, L) if ordered.
    """
    widths, layers = checked_candidates(config, candidates), config.num_hidden_layers
    count = len(widths) ** layers if order == "any" else math.comb(layers + len(widths) - 1, layers)
    if count > limit:
        raise ConfigError(
            f"{len(widths)} widths in {layers} layers are {count} width maps, more than {limit}: "
            "give fewer candidate widths, or ask for ordered maps only."
        )
    if order == "any":
        return list(itertools.product(widths, repeat=layers))
    maps = itertools.combinations_with_replacement(widths if order == "non-decreasing" else widths[::-1], layers)
    return sorted(maps)


def evaluate_maps(model: GPT, maps: Sequence[WidthMap], windows: Windows) -> list[float]:
    """Held-out loss at each map, in nats per token. Raises ConfigError for a map that the model does not hold."""
    checked = [model.held_widths(width_map) for width_map in maps]
    return [held_out_loss(model, windows, widths) for widths in checked]


def sensitivities(model: GPT, windows: Windows, candidates: Sequence[int] | None = None) -> Sensitivities:
    """Measure by how much the loss grows when one layer is narrowed and all others keep their full width.

    One evaluation per layer and candidate. Raises ConfigError for candidates that the model does not hold.
    """
    widths = checked_candidates(model.config, candidates)
    (full_loss,) = evaluate_maps(model, [model.neurons], windows)
    layers = []
    for layer in range(len(model.neurons)):
        maps = [(*model.neurons[:layer], width, *model.neurons[layer + 1 :]) for width in widths]
        losses = evaluate_maps(model, maps, windows)
        layers.append({width: loss - full_loss for width, loss in zip(widths, losses, strict=True)})
    return Sensitivities(full_loss=full_loss, layers=tuple(layers))


def extract(model: GPT, width_map: WidthMap) -> GPT:
    """A model of its own that holds, and computes, what `model` does at this map; a tier's model if the map is a tier.

    Raises ConfigError for a map that the model does not hold.
    """
    config, widths = model.config, model.held_widths(width_map)
    tiers = tier_widths(config)
    if len(set(widths)) == 1 and widths[0] in tiers:
        part = GPT(config, tiers.index(widths[0]))
    else:
        part = GPT(config, neurons=widths)
    held = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in part.named_parameters():
            p.copy_(held[name][: len(p)])
    return part


def permuted(model: GPT, seed: int) -> GPT:
    """A copy that computes the same at full width, with each layer's FFN neurons (and nested heads) in random order."""
    twin = copy.deepcopy(model)
    reorder_(twin, orderings(model, "random", seed=seed))
    return twin


def controls(
    model: GPT, maps: Sequence[WidthMap], windows: Windows, seed: int, unnested: GPT | None = None
) -> list[Control]:
    """Each map's loss beside those of the controls; `seed` draws the permutation, `unnested` never saw a narrow width.

    Raises ConfigError for a map that one of the models does not hold.
    """
    own, shuffled = (evaluate_maps(each, maps, windows) for each in (model, permuted(model, seed)))
    plain = [None] * len(maps) if unnested is None else evaluate_maps(unnested, maps, windows)
    return [
        Control(widths=model.held_widths(width_map), loss=a, permuted_loss=b, unnested_loss=c)
        for width_map, a, b, c in zip(maps, own, shuffled, plain, strict=True)
    ]
