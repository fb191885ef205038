"""Which widths a step trains, and with what weights: the training modes of a MatFormer on one device.

  fixed    the whole tier, always
  sampled  one width per step: the whole tier, or for a share of the steps a random narrower tier (what swarm peers do)
  sandwich the widest, the narrowest and some random ones between, all in one step (Yu & Huang 2019, arXiv 1903.05134)
  joint    all tiers in every step, sum_g alpha_g L_g (MatFormer, arXiv 2310.07707)
  layers   like `sampled`, but a narrow step draws a width for every layer by itself

With `mixed_maps`, each step of `joint` and `sandwich` also trains that many random Mix'n'Match maps between two
neighbouring tiers, so that the maps a search chooses later are not strangers to the weights.

Curriculum: the weights of `joint` may move from `alphas` to `final_alphas`. With `kl_weight`, the narrower widths of a
step (`joint`, `sandwich`) are also pulled towards the distribution of the widest, which is held still.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from braniac.model.config import ModelConfig
from braniac.model.data import keyed_bits
from braniac.model.errors import ConfigError
from braniac.model.gpt import GPT
from braniac.model.tiers import tier_widths

Mode = Literal["fixed", "sampled", "sandwich", "joint", "layers"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSettings:
    """What a step optimises. Raises ConfigError for values that do not fit."""

    mode: Mode = "sampled"
    """Which widths a step trains: fixed, sampled, sandwich, joint or layers."""

    subwidth_fraction: float = 0.25
    """sampled, layers: share of the steps that train less than the whole tier."""

    sandwich_random: int = 1
    """sandwich: random tiers between the widest and the narrowest in each step."""

    mixed_maps: int = 0
    """joint, sandwich: random width maps in each step besides, each layer at one of two neighbouring tiers' widths."""

    mixed_weight: float = 1.0
    """joint, sandwich: weight of each of those maps, in units of a tier's mean weight."""

    alphas: tuple[float, ...] = ()
    """joint: weight of each tier's loss, the widest first; their sum counts as one. Empty: all alike."""

    final_alphas: tuple[float, ...] = ()
    """joint: weights at the end of the curriculum. Empty: `alphas` throughout."""

    curriculum_steps: int = 0
    """joint: steps over which the weights move in a straight line from `alphas` to `final_alphas`."""

    kl_weight: float = 0.0
    """joint, sandwich: weight of KL(widest || narrower) in the loss of each narrower width."""

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"objective.mode is {self.mode!r}: it must be one of {', '.join(get_args(Mode))}.")
        if not 0 <= self.subwidth_fraction <= 1:
            raise ConfigError(f"objective.subwidth_fraction is {self.subwidth_fraction!r}: it must be from 0 to 1.")
        for name in ("sandwich_random", "mixed_maps", "curriculum_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"objective.{name} is {getattr(self, name)}: it must not be negative.")
        for name in ("alphas", "final_alphas"):
            values = getattr(self, name)
            if not all(math.isfinite(value) and value >= 0 for value in values) or (values and not sum(values)):
                raise ConfigError(f"objective.{name} is {values!r}: it must be weights of at least 0, not all 0.")
        for name in ("kl_weight", "mixed_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"objective.{name} is {value!r}: it must be at least 0.")

    def terms_at_most(self, held: int) -> int:
        """Widths that one step of a model with `held` tiers trains at most."""
        match self.mode:
            case "joint":
                return held + self.mixed_maps
            case "sandwich":
                return min(held, 2 + self.sandwich_random) + self.mixed_maps
            case _:
                return 1

    def check_tiers(self, held: int) -> None:
        """Raise ConfigError unless the weights are for `held` tiers."""
        for name in ("alphas", "final_alphas"):
            if (count := len(getattr(self, name))) not in (0, held):
                raise ConfigError(f"objective.{name} has {count} weights: give one for each of the {held} tiers held.")


@dataclass(frozen=True, slots=True)
class Term:
    """One width (or width map) of a step and the weight of its loss."""

    widths: tuple[int, ...]
    weight: float


class Objective:
    """The terms of every step: a function of the settings, the run's seed, the peer and the step."""

    def __init__(self, settings: ObjectiveSettings, config: ModelConfig, tier: int, seed: int, peer: bytes) -> None:
        self.settings = settings
        self.layers = config.num_hidden_layers
        self.held = tier_widths(config)[tier:]
        self._draw: Callable[[int, int], list[int]] = lambda step, count: keyed_bits(
            "width", seed, peer, step, count
        ).tolist()
        settings.check_tiers(len(self.held))

    def terms(self, step: int) -> list[Term]:
        """What step number `step` trains, the widest first."""
        match self.settings.mode:
            case "fixed":
                return [self._uniform(0, 1.0)]
            case "sampled" | "layers":
                return [self._sampled(step)]
            case "sandwich":
                return self._with_mixed(step, self._sandwich(step))
            case "joint":
                weights = self.alphas(step)
                terms = [self._uniform(tier, weight) for tier, weight in enumerate(weights) if weight > 0]
                return self._with_mixed(step, terms)

    def alphas(self, step: int) -> list[float]:
        """Weights of the held tiers in a step of mode joint; they sum to one."""
        first = _normalised(self.settings.alphas or (1.0,) * len(self.held))
        last = _normalised(self.settings.final_alphas) if self.settings.final_alphas else first
        share = min(1.0, step / self.settings.curriculum_steps) if self.settings.curriculum_steps else 1.0
        return [a + (b - a) * share for a, b in zip(first, last, strict=True)]

    def _uniform(self, tier: int, weight: float) -> Term:
        return Term((self.held[tier],) * self.layers, weight)

    def _sampled(self, step: int) -> Term:
        per_layer = self.settings.mode == "layers"
        chance, *choices = self._draw(step, 1 + (self.layers if per_layer else 1))
        narrower = len(self.held) - 1
        if narrower == 0 or chance >= self.settings.subwidth_fraction * 2.0**64:
            return self._uniform(0, 1.0)
        if per_layer:
            return Term(tuple(self.held[choice % len(self.held)] for choice in choices), 1.0)
        return self._uniform(1 + choices[0] % narrower, 1.0)

    def _sandwich(self, step: int) -> list[Term]:
        last = len(self.held) - 1
        between = list(range(1, last))
        count = min(self.settings.sandwich_random, len(between))
        chosen = [between.pop(draw % len(between)) for draw in (self._draw(step, count) if count else ())]
        tiers = sorted({0, last, *chosen})
        return [self._uniform(tier, 1 / len(tiers)) for tier in tiers]

    def _with_mixed(self, step: int, terms: list[Term]) -> list[Term]:
        """The terms, and after them the random maps, each `mixed_weight` times as heavy as the mean of the others."""
        count, pairs = self.settings.mixed_maps, len(self.held) - 1
        weight = self.settings.mixed_weight
        if not count or not pairs or not weight:
            return terms
        share = 1 / (len(terms) + count * weight)
        maps = []
        for number in range(count):
            # The first draws of a step are those of sandwich.
            at = self.settings.sandwich_random + number * (1 + self.layers)
            pair, *choices = self._draw(step, at + 1 + self.layers)[at:]
            widths = self.held[pair % pairs : pair % pairs + 2]
            maps.append(Term(tuple(widths[choice % 2] for choice in choices), weight * share))
        return [Term(term.widths, term.weight * len(terms) * share) for term in terms] + maps


def _normalised(weights: tuple[float, ...]) -> list[float]:
    return [weight / sum(weights) for weight in weights]


def backward(model: GPT, tokens_BT: Tensor, targets_BT: Tensor, terms: list[Term], kl_weight: float) -> list[float]:
    """Add the gradient of the weighted loss to the model's; the plain loss of each term, in nats per token.

    The terms share the embeddings, the first layer's attention and its first FFN matmul, which do not depend on the
    width. After that they go one at a time, so that the activations of only one are alive.
    """
    outputs, sources = model.model.begin(tokens_BT, [term.widths[0] for term in terms])
    shared = [*outputs, *sources]
    leaves = [x.detach().requires_grad_() for x in shared]
    losses, teacher_NV = [], None
    for term, x_BTD in zip(terms, leaves[: len(terms)], strict=True):
        logits_NV = model.logits(model.model.finish(x_BTD, leaves[len(terms) :], term.widths)).flatten(0, 1)
        loss = F.cross_entropy(logits_NV, targets_BT.flatten())
        losses.append(loss.item())
        if kl_weight and len(terms) > 1:
            log_probs_NV = F.log_softmax(logits_NV, dim=-1)
            if teacher_NV is None:
                teacher_NV = log_probs_NV.detach()  # the widest comes first
            else:
                loss = loss + kl_weight * F.kl_div(log_probs_NV, teacher_NV, log_target=True, reduction="batchmean")
        (term.weight * loss).backward()  # type: ignore[no-untyped-call]
    pairs = [(x, leaf.grad) for x, leaf in zip(shared, leaves, strict=True) if leaf.grad is not None]
    torch.autograd.backward([pairing(*pair) for pair in pairs])
    return losses


def pairing(output: Tensor, gradient: Tensor) -> Tensor:
    """A number whose gradient with respect to `output` is `gradient`, to continue a backward pass with.

    Handing gradients to autograd would do too, but on the first such call torch imports sympy: 40 MB, and 0.3 s in
    which no other thread of the process gets anywhere.
    """
    return (output * gradient).sum()
