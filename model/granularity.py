"""What a joint step does to each granularity: loss, gradient norms, and whether the granularities pull one way.

All granularities of a MatFormer share the rows of the smallest and everything that is not sliced. On these shared
parameters their gradients add up, so one granularity can spend the small one's capacity on itself. `measure` shows it
for one batch, `DominationWatch` over many. Gradient cosine as the sign of conflict between objectives: PCGrad, Yu et
al. 2020 (arXiv 2001.06782).

Each width is differentiated by itself and unweighted; whoever trains with weights alpha_g gives them to the watch. This
costs one forward and backward pass per width and keeps one gradient of the shared parameters per width.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from braniac.model.errors import TrainingDiverged
from braniac.model.gpt import GPT
from braniac.model.tiers import shapes_at


@dataclass(frozen=True, kw_only=True, slots=True)
class GranularityReport:
    """One granularity's part in one batch."""

    width: int
    """FFN neurons in use."""

    loss: float
    """Nats per token."""

    shared_norm: float
    """Euclidean norm of the loss's gradient on what all measured granularities share."""

    tail_norm: float
    """The same on the rows that this granularity and wider ones use but no narrower one: 0 for the smallest."""

    cosines: Mapping[int, float]
    """Other width -> cosine between the two shared gradients, from -1 to 1; 0 if one of them is all zero."""


def measure(model: GPT, tokens_BT: Tensor, targets_BT: Tensor, widths: Sequence[int]) -> tuple[GranularityReport, ...]:
    """Differentiate the loss on one batch, int64 [B, T] each, at every width; reports come widest first.

    The model's weights and its `.grad` stay as they are. Raises TrainingDiverged if a loss or a gradient is not finite.
    """
    ordered = sorted(set(widths), reverse=True)
    assert ordered, "no widths to measure"
    rows = {width: _rows(model, width) for width in ordered}
    losses, tails, shared = {}, {}, {}
    for width, narrower in zip(ordered, [*ordered[1:], ordered[-1]], strict=True):
        losses[width], gradients = _gradients(model, tokens_BT, targets_BT, width)
        tail = [g[rows[narrower][name] : rows[width][name]] for name, g in gradients.items()]
        tails[width] = math.sqrt(_dot(tail, tail))
        # Copies, so that the long gradients they are views of can be freed before the next width's pass.
        shared[width] = [g[: rows[ordered[-1]][name]].clone() for name, g in gradients.items()]
    norms = {width: math.sqrt(_dot(shared[width], shared[width])) for width in ordered}
    for width in ordered:
        if not math.isfinite(losses[width] + norms[width] + tails[width]):
            raise TrainingDiverged(
                f"the loss at width {width} ({losses[width]:g}) or its gradient is not finite: "
                "lower the learning rate or reload the weights."
            )
    cosines: dict[int, dict[int, float]] = {width: {} for width in ordered}
    for index, width in enumerate(ordered):
        for other in ordered[index + 1 :]:
            scale = norms[width] * norms[other]
            cosine = _dot(shared[width], shared[other]) / scale if scale else 0.0
            cosines[width][other] = cosines[other][width] = max(-1.0, min(1.0, cosine))
    return tuple(
        GranularityReport(width=w, loss=losses[w], shared_norm=norms[w], tail_norm=tails[w], cosines=cosines[w])
        for w in ordered
    )


def _rows(model: GPT, width: int) -> dict[str, int]:
    """Name -> rows of each parameter in use at a width."""
    return {name: shape[0] for name, shape in shapes_at(model.config, model.layer_widths(width)).items()}


def _gradients(model: GPT, tokens_BT: Tensor, targets_BT: Tensor, width: int) -> tuple[float, dict[str, Tensor]]:
    """The loss and its gradient by parameter name."""
    named = dict(model.named_parameters())
    with torch.enable_grad():
        loss = model.loss(tokens_BT, targets_BT, width)
        gradients = torch.autograd.grad(loss, tuple(named.values()))
    return loss.item(), dict(zip(named, gradients, strict=True))


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    # In float64, one tensor at a time: large models have enough terms for float32 sums to drift.
    return math.fsum((x.double() * y.double()).sum().item() for x, y in zip(a, b, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchSettings:
    """When to warn that the smallest granularity is losing to the others."""

    decay: float = 0.9
    """Weight of the past in each exponential average, from 0 to below 1."""

    patience: int = 10
    """Observations in a row for which a sign must hold, and over which changes of loss are taken."""

    least_cosine: float = 0.0
    """The smallest's average gradient cosine with the largest must not stay below this."""

    least_gain: float = 0.8
    """Share of the largest's fall in log loss that the smallest must see too. Logarithms, because near the end of
    training a gap that stays the same is a growing part of the loss. In tiny models the share was 0.6 to 0.7 where only
    the largest was trained, and 0.9 or more in joint training."""

    noise: float = 0.01
    """A smaller fall of the largest's log loss than this (about one percent) says nothing."""

    least_norm: float = 0.25
    """The smallest's average share of the shared gradient norm, in units of an even share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opposed:
    """The smallest and the largest granularity pull the shared parameters in opposite directions."""

    step: int
    cosine: float
    """Average cosine of the two gradients."""
    bound: float

    def __str__(self) -> str:
        return f"step {self.step}: gradient cosine of smallest and largest {self.cosine:.3f}, below {self.bound:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class FallingBehind:
    """The largest granularity learns and the smallest does not keep up: the gap between their losses grows."""

    step: int
    gap: float
    """Average loss of the smallest minus that of the largest, nats."""
    largest_fall: float
    """By how much the logarithm of the largest's average loss fell over `patience` observations."""
    smallest_fall: float
    """The same of the smallest; negative if its loss rose."""
    bound: float
    """Share of `largest_fall` that was expected."""

    def __str__(self) -> str:
        return (
            f"step {self.step}: the largest's log loss fell by {self.largest_fall:.3f}, the smallest's by "
            f"{self.smallest_fall:.3f}, less than {self.bound:g} of it; the gap is {self.gap:.3f} nats"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Starved:
    """The smallest granularity hardly moves the parameters it shares."""

    step: int
    share: float
    """Its average share of the sum of all granularities' weighted gradient norms."""
    bound: float

    def __str__(self) -> str:
        return f"step {self.step}: gradient norm share of the smallest {self.share:.3f}, below {self.bound:.3f}"


# Of a loss that is exactly zero the logarithm of this is taken instead.
_LEAST_LOSS = 1e-12

DominationWarning = Opposed | FallingBehind | Starved


class DominationWatch:
    """Early warnings that wider granularities dominate the smallest one, from a series of measurements.

    Each of the three signs is judged on exponential averages and must hold for `patience` observations in a row. It
    then warns once, and again only after it had gone in between.
    """

    def __init__(self, settings: WatchSettings | None = None) -> None:
        self.settings = settings or WatchSettings()
        self._averages: dict[str, float] = {}
        self._log_losses: deque[tuple[float, float]] = deque(maxlen=self.settings.patience + 1)
        self._streaks: dict[type[DominationWarning], int] = {}

    def observe(
        self, step: int, reports: Sequence[GranularityReport], weights: Mapping[int, float] | None = None
    ) -> tuple[DominationWarning, ...]:
        """Take in one step's `measure` of the same two or more widths as always; return the warnings that begin here.

        `weights` are the alpha_g by which the losses are multiplied in the step (None: all equal).
        """
        ordered = sorted(reports, key=lambda report: report.width)
        smallest, largest = ordered[0], ordered[-1]
        assert smallest.width < largest.width, "a smallest and a largest granularity are needed"
        alpha = {report.width: 1.0 if weights is None else weights[report.width] for report in ordered}
        losses = self._average("smallest", smallest.loss), self._average("largest", largest.loss)
        logs = math.log(max(losses[0], _LEAST_LOSS)), math.log(max(losses[1], _LEAST_LOSS))
        self._log_losses.append(logs)
        cosine = self._average("cosine", smallest.cosines[largest.width])
        own = self._average("norm", alpha[smallest.width] * smallest.shared_norm)
        everybody = self._average("norms", sum(alpha[r.width] * r.shared_norm for r in ordered))
        share = own / everybody if everybody else 1 / len(ordered)
        settings, even = self.settings, 1 / len(ordered)
        falls = [before - now for before, now in zip(self._log_losses[0], logs, strict=True)]
        behind = falls[1] > settings.noise and falls[0] < settings.least_gain * falls[1]
        opposed = Opposed(step=step, cosine=cosine, bound=settings.least_cosine)
        falling = FallingBehind(
            step=step,
            gap=losses[0] - losses[1],
            largest_fall=falls[1],
            smallest_fall=falls[0],
            bound=settings.least_gain,
        )
        starved = Starved(step=step, share=share, bound=settings.least_norm * even)
        signs = ((opposed, cosine < opposed.bound), (falling, behind), (starved, share < starved.bound))
        return tuple(warning for warning, holds in signs if self._begins(warning, holds))

    def _average(self, name: str, value: float) -> float:
        assert math.isfinite(value), f"the measured {name} is {value}"
        # The first value starts the average, so that it never leans towards zero.
        before = self._averages.get(name, value)
        self._averages[name] = self.settings.decay * before + (1 - self.settings.decay) * value
        return self._averages[name]

    def _begins(self, warning: DominationWarning, holds: bool) -> bool:
        kind = type(warning)
        self._streaks[kind] = self._streaks.get(kind, 0) + 1 if holds else 0
        return self._streaks[kind] == self.settings.patience
