"""One peer's training: inner steps on its own data, with fragments read and rebased between steps.

The trainer is a plain object without clock, thread or network. Whoever owns it calls everything from one thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor

from braniac.model.config import Device, ModelConfig, Precision
from braniac.model.data import Batches, keyed_bits
from braniac.model.errors import CheckpointError, ConfigError, TrainingDiverged
from braniac.model.fragments import Fragment, gather, scatter_, scatter_add_
from braniac.model.gpt import GPT
from braniac.model.lean import LeanStep, lean_bytes_needed
from braniac.model.lean_optim import LeanOptimizer
from braniac.model.objective import Objective, ObjectiveSettings, Term, backward
from braniac.model.optim import Optimizer, copy_checked
from braniac.model.rounding import Dice
from braniac.model.tiers import (
    is_sliced,
    layer_of,
    parameter_count,
    rings_of,
    rows_at,
    table_parameters,
    tier_width,
)

_LEAN_FROM = 100_000_000  # parameters of the whole model


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """How a peer trains. Two peers of one run may differ in all of it but the seed."""

    learning_rate: float = 0.02
    """Muon's: the length by which one step moves each direction of a matrix."""

    adam_learning_rate: float = 0.01
    """Adam's, for what has a row per token (embedding, head, value embeddings) and for gains."""

    batch: int = 8
    """Windows per step."""

    warmup_steps: int = 20
    """Steps over which both learning rates rise linearly from zero."""

    total_steps: int = 0
    """Length of the training if it has one: the learning rates then fall linearly to zero at its end. 0: endless."""

    cooldown_fraction: float = 0.4
    """Last share of `total_steps` over which the learning rates fall."""

    weight_decay: float = 0.0
    """Decoupled decay: each step shrinks the weights by learning rate times this."""

    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    """Which widths each step trains."""

    kept_layers: int | None = None
    """Of so many of the last layers keep what the forward pass computed; of the others only their input, and compute
    them once more in the backward pass: less memory, up to a third more work. None: lean keeps no layer, fp32 all."""

    precision: Precision = "fp32"
    """fp32: everything in float32; lean: bfloat16 weights, 8-bit momentum, a layer at a time (see lean.py)."""

    device: Device = "cpu"
    """cpu, cuda, or auto for a GPU if there is one; there, matmuls of fp32 are autocast to bfloat16."""

    seed: int = 0
    """The run's seed: initial weights, and with the peer id all random choices."""

    check_gradients: bool = False
    """Assert after each backward pass that no gradient leaked beyond the width in use."""

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ConfigError(
                f"train.precision is {self.precision!r}: it must be one of {', '.join(get_args(Precision))}."
            )
        if self.kept_layers is not None and self.kept_layers < 0:
            raise ConfigError(f"train.kept_layers is {self.kept_layers}: it must be at least 0.")
        if self.device not in get_args(Device):
            raise ConfigError(f"train.device is {self.device!r}: it must be one of {', '.join(get_args(Device))}.")

    def kept_of(self, layers: int) -> int:
        """How many of so many layers are kept."""
        wanted = self.kept_layers
        return min(layers, wanted if wanted is not None else 0 if self.precision == "lean" else layers)

    def lr_scale(self, step: int) -> float:
        """What step number `step` multiplies both learning rates by."""
        rise = (step + 1) / max(1, self.warmup_steps)
        fall = (
            (self.total_steps - step) / max(1.0, self.cooldown_fraction * self.total_steps) if self.total_steps else 1
        )
        return max(0.0, min(1.0, rise, fall))


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did."""

    loss: float
    """Of the widest width trained, before the update, nats per token."""
    tokens: int
    widths: tuple[int, ...]
    """FFN neurons that the widest width used, per layer."""
    losses: tuple[float, ...]
    """Of every width trained, the widest first."""


class Trainer:
    """A model of one tier, its optimizer and its place in the data."""

    def __init__(self, config: ModelConfig, tier: int, batches: Batches, settings: TrainSettings) -> None:
        assert (batches.context, batches.batch_size) == (config.context, settings.batch), "batches of another shape"
        self.config = config
        self.tier = tier
        self.batches = batches
        self.settings = settings
        self.step_count = 0
        self.device = choose_device(settings.device)
        with self._on_device():
            self._build()
        self.objective = Objective(settings.objective, config, tier, settings.seed, batches.peer)

    def _build(self) -> None:
        """The tensors: weights and the optimizer's memory."""
        settings, lean = self.settings, self.settings.precision == "lean"
        self.model = GPT(self.config, self.tier, dtype=torch.bfloat16 if lean else torch.float32)
        self.model.init_weights(settings.seed)
        layers = self.config.num_hidden_layers
        kept = settings.kept_of(layers)
        self.model.model.recomputed_layers = layers - kept
        self.params = dict(self.model.named_parameters())
        self.optimizer: Optimizer | LeanOptimizer = (LeanOptimizer if lean else Optimizer)(
            self.params,
            self.config,
            learning_rate=settings.learning_rate,
            adam_learning_rate=settings.adam_learning_rate,
            weight_decay=settings.weight_decay,
        )
        self._dice = Dice(device=self.device)
        self._lean_step = None
        if isinstance(self.optimizer, LeanOptimizer):
            self._lean_step = LeanStep(self.model, self.optimizer, kept_layers=kept)

    def _on_device(self) -> AbstractContextManager[object]:
        """Within it, tensors that are made without naming a device are made on this trainer's."""
        return nullcontext() if self.device.type == "cpu" else self.device

    def step(self) -> StepResult:
        """One update, from a forward and backward pass at each width of the step.

        Raises TrainingDiverged, with weights, optimizer and step count as before, if loss or gradient are not finite.
        (Lean training does not see all gradients before the first update: see `LeanStep.run`.)
        """
        terms = self.objective.terms(self.step_count)
        tokens, targets = (part.to(self.device) for part in self.batches.batch(self.step_count))
        widths = tuple(map(max, zip(*(term.widths for term in terms), strict=True)))
        update = self._update if self._lean_step is None else self._update_lean
        with self._on_device():
            losses = update(tokens, targets, terms, widths)
        self.step_count += 1
        return StepResult(losses[0], tokens.numel(), widths, tuple(losses))

    def _update_lean(self, tokens: Tensor, targets: Tensor, terms: list[Term], widths: tuple[int, ...]) -> list[float]:
        assert self._lean_step is not None
        lr_scale, kl_weight = self.settings.lr_scale(self.step_count), self.settings.objective.kl_weight
        return self._lean_step.run(tokens, targets, terms, kl_weight, lr_scale, self._seed("rounding"))

    def _update(self, tokens: Tensor, targets: Tensor, terms: list[Term], widths: tuple[int, ...]) -> list[float]:
        assert isinstance(self.optimizer, Optimizer)
        self.model.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type != "cpu"):
            losses = backward(self.model, tokens, targets, terms, self.settings.objective.kl_weight)
        if not all(map(math.isfinite, losses)) or not self._gradient_is_finite():
            raise TrainingDiverged(
                f"the loss or its gradient is not finite at step {self.step_count} (loss {losses[0]:g}): "
                "lower the learning rate or reload the weights."
            )
        if self.settings.check_gradients:
            self._assert_gradient_stays_within(widths)
        self.optimizer.step(self.settings.lr_scale(self.step_count), widths)
        return losses

    def _seed(self, purpose: str) -> int:
        """Of this step's chances for one purpose."""
        return int(keyed_bits(purpose, self.settings.seed, self.batches.peer, self.step_count, 1)[0])

    def _gradient_is_finite(self) -> bool:
        # A sum is finite only if every term is, and one number per tensor is cheaper than a mask.
        return all(p.grad is not None and math.isfinite(p.grad.sum().item()) for p in self.params.values())

    def _assert_gradient_stays_within(self, widths: Sequence[int]) -> None:
        for name, p in self.params.items():
            layer = layer_of(name)
            if layer is not None and is_sliced(self.config, name):
                assert p.grad is not None
                rows = rows_at(self.config, name, widths[layer])
                assert not p.grad[rows:].any(), f"{name} has a gradient beyond the {rows} rows in use"

    def read(self, fragment: Fragment) -> Tensor:
        """A copy of the fragment's weights, float32 [size]."""
        self._assert_held(fragment)
        return gather(self.params, fragment)

    def rebase(self, fragment: Fragment, change: Tensor) -> None:
        """Add `change`, float32 [size], to the fragment's weights; the optimizer's memory stays."""
        self._assert_held(fragment)
        assert torch.isfinite(change).all(), "integers became non-finite on their way to the weights"
        if self._lean_step is None:
            scatter_add_(self.params, fragment, change)
            return
        # Most changes are smaller than the distance to the next bfloat16: only by chance do they count on average.
        self._dice.seed(self._seed(f"rebase {fragment.index}"))
        scatter_add_(self.params, fragment, change, self._dice)

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
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._tensors().items()}
        return copies, {"step": self.step_count}

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


def choose_device(device: Device) -> torch.device:
    """The device meant. Raises ConfigError if it is not there."""
    found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise ConfigError(
            "train.device is cuda, but torch sees no GPU: install a CUDA build of torch, or set auto or cpu."
        )
    return torch.device("cuda" if found and device != "cpu" else "cpu")


def default_precision(config: ModelConfig) -> Precision:
    """What a node takes if it is not told: lean where float32 would ask for more than most devices have."""
    return "lean" if parameter_count(config, 0) >= _LEAN_FROM and not config.tie_word_embeddings else "fp32"


def memory_bytes_needed(config: ModelConfig, tier: int, settings: TrainSettings) -> int:
    """Estimate of what a Trainer of this tier adds to the process at its peak, in bytes; torch itself comes on top.

    Weights, gradients and momentum for all parameters and a second moment for the tables; on top, whichever is
    larger, the activations kept for the backward pass or the optimizer's temporaries. Counted from the code and
    corrected by measurement: within a third of the resident memory of both presets.
    """
    d, width, layers = config.hidden_size, tier_width(config, tier), config.num_hidden_layers
    kept_layers = settings.kept_of(layers)
    if settings.precision == "lean":
        terms = settings.objective.terms_at_most(config.tiers - tier)
        return lean_bytes_needed(config, tier, settings.batch * config.context, terms, kept_layers)
    parameters, tables = parameter_count(config, tier), table_parameters(config)
    positions = settings.batch * config.context
    per_layer = 20 * d + (5 if config.gated else 3) * width
    # Layers are computed again one at a time, when those that are kept are done with.
    kept = (layers - kept_layers) * d + max(1, kept_layers) * per_layer
    kept += 2 * config.value_embeddings * config.kv_heads * config.head_dim
    kept += 2 * d * (layers // 2) if config.skip_connections else 0
    activations = positions * (kept + 4 * config.vocab_size)
    updates = parameters - tables + 4 * layers * max(2 * width * d, 3 * d * d)  # all momenta, one batch orthogonalised
    return 4 * (3 * parameters + tables + max(activations, updates))
