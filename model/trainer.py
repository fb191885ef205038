"""One peer's training: inner steps on its own data, with fragments read and rebased between steps.

The trainer is a plain object without clock, thread or network. Whoever owns it calls everything from one thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from braniac.model.config import ModelConfig
from braniac.model.data import Batches, keyed_bits
from braniac.model.errors import CheckpointError, TrainingDiverged
from braniac.model.fragments import Fragment, gather, scatter_, scatter_add_
from braniac.model.gpt import GPT
from braniac.model.optim import Optimizer, copy_checked
from braniac.model.tiers import EMBEDDING, HEAD, is_ffn, parameter_count, parameter_shapes, rings_of, tier_width


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """How a peer trains. Two peers of one run may differ in all of it but the seed."""

    learning_rate: float = 0.02
    """Muon's: the length by which one step moves each direction of a matrix."""

    adam_learning_rate: float = 0.01
    """Adam's, for the embedding and the head."""

    batch: int = 8
    """Windows per step."""

    warmup_steps: int = 20
    """Steps over which both learning rates rise linearly from zero."""

    weight_decay: float = 0.0
    """Decoupled decay: each step shrinks the weights by learning rate times this."""

    subwidth_fraction: float = 0.25
    """Share of the steps that train a random narrower tier inside this one (sandwich rule, Yu & Huang 2019)."""

    seed: int = 0
    """The run's seed: initial weights, and with the peer id all random choices."""

    check_gradients: bool = False
    """Assert after each backward pass that no gradient leaked beyond the width in use."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did."""

    loss: float
    """Before the update, nats per token."""
    tokens: int
    width: int
    """FFN neurons in use."""


class Trainer:
    """A model of one tier, its optimizer and its place in the data."""

    def __init__(self, config: ModelConfig, tier: int, batches: Batches, settings: TrainSettings) -> None:
        assert (batches.context, batches.batch_size) == (config.context, settings.batch), "batches of another shape"
        self.config = config
        self.tier = tier
        self.batches = batches
        self.settings = settings
        self.step_count = 0
        self.model = GPT(config, tier)
        self.model.init_weights(settings.seed)
        self.params = dict(self.model.named_parameters())
        self.optimizer = Optimizer(
            self.params,
            config.num_attention_heads,
            learning_rate=settings.learning_rate,
            adam_learning_rate=settings.adam_learning_rate,
            weight_decay=settings.weight_decay,
        )

    def step(self) -> StepResult:
        """One forward and backward pass and one update.

        Raises TrainingDiverged, with weights, optimizer and step count as before, if loss or gradient are not finite.
        """
        width = self._step_width()
        tokens, targets = self.batches.batch(self.step_count)
        self.model.zero_grad()
        loss = self.model.loss(tokens, targets, width)
        loss.backward()  # type: ignore[no-untyped-call]
        if not math.isfinite(loss.item()) or not self._gradient_is_finite():
            raise TrainingDiverged(
                f"the loss or its gradient is not finite at step {self.step_count} (loss {loss.item():g}): "
                "lower the learning rate or reload the weights."
            )
        if self.settings.check_gradients:
            self._assert_gradient_stays_within(width)
        self.optimizer.step(min(1.0, (self.step_count + 1) / max(1, self.settings.warmup_steps)), width)
        self.step_count += 1
        return StepResult(loss.item(), tokens.numel(), width)

    def _step_width(self) -> int:
        """The whole tier, or, for a fraction of the steps, one of the narrower tiers in it."""
        narrower = self.config.tiers - 1 - self.tier
        chance, choice = keyed_bits("width", self.settings.seed, self.batches.peer, self.step_count, 2).tolist()
        if narrower == 0 or chance >= self.settings.subwidth_fraction * 2.0**64:
            return self.model.width
        return tier_width(self.config, self.tier + 1 + choice % narrower)

    def _gradient_is_finite(self) -> bool:
        # A sum is finite only if every term is, and one number per tensor is cheaper than a mask.
        return all(p.grad is not None and math.isfinite(p.grad.sum().item()) for p in self.params.values())

    def _assert_gradient_stays_within(self, width: int) -> None:
        for name, p in self.params.items():
            if is_ffn(name):
                assert p.grad is not None
                assert not p.grad[width:].any(), f"{name} has a gradient beyond the {width} neurons in use"

    def read(self, fragment: Fragment) -> Tensor:
        """A copy of the fragment's weights, float32 [size]."""
        self._assert_held(fragment)
        return gather(self.params, fragment)

    def rebase(self, fragment: Fragment, change: Tensor) -> None:
        """Add `change`, float32 [size], to the fragment's weights; the optimizer's memory stays."""
        self._assert_held(fragment)
        assert torch.isfinite(change).all(), "integers became non-finite on their way to the weights"
        scatter_add_(self.params, fragment, change)

    def load_fragment(self, fragment: Fragment, values: Tensor) -> None:
        """Overwrite the fragment's weights with `values`, float32 [size]."""
        self._assert_held(fragment)
        assert torch.isfinite(values).all(), "integers became non-finite on their way to the weights"
        scatter_(self.params, fragment, values)

    def _assert_held(self, fragment: Fragment) -> None:
        assert fragment.ring in rings_of(self.config, self.tier), (
            f"tier {self.tier} does not hold ring {fragment.ring} of fragment {fragment.index}"
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """Copies of all weights and of the optimizer's memory, and the counters: all that resuming needs."""
        return {name: tensor.detach().clone() for name, tensor in self._tensors().items()}, {"step": self.step_count}

    def load_state(self, tensors: Mapping[str, Tensor], counters: Mapping[str, int]) -> None:
        """Inverse of `state`, all or nothing. Raises CheckpointError for a state of another model or tier."""
        step = counters.get("step")
        if type(step) is not int or step < 0 or len(counters) != 1:
            raise CheckpointError(f"the saved counters are {dict(counters)!r}: exactly one step count is expected.")
        copy_checked(self._tensors(), tensors)
        self.step_count = step

    def _tensors(self) -> dict[str, Tensor]:
        optimizer = {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state_tensors().items()}
        return {**self.params, **optimizer}


def memory_bytes_needed(config: ModelConfig, tier: int, settings: TrainSettings) -> int:
    """Estimate of what a Trainer of this tier adds to the process at its peak, in bytes; torch itself comes on top.

    Weights, gradients and momentum for all parameters and a second moment for embedding and head; on top, whichever is
    larger, the activations kept for the backward pass or the optimizer's temporaries. Counted from the code and
    corrected by measurement: within a third of the resident memory of both presets.
    """
    d, width, layers = config.hidden_size, tier_width(config, tier), config.num_hidden_layers
    shapes = parameter_shapes(config, tier)
    parameters = parameter_count(config, tier)
    tables = sum(math.prod(shapes[name]) for name in (EMBEDDING, HEAD))
    positions = settings.batch * config.context
    activations = positions * (layers * (20 * d + 3 * width) + 4 * config.vocab_size)
    updates = parameters - tables + 4 * layers * max(2 * width * d, 3 * d * d)  # all momenta, one batch orthogonalised
    return 4 * (3 * parameters + tables + max(activations, updates))
