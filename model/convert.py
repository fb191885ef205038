"""Turning a dense model into a MatFormer: sort its neurons by importance, so that a prefix holds the best of them.

A neuron is a row of up (and gate) and the same row of down, and their sum does not care for the order of its terms. So
the whole model computes what it did before, but a narrow width keeps the neurons that matter most; a short joint
training then accustoms the widths to each other. With nested heads, the key-value heads of a layer, each with those
that ask it, are sorted in the same way. This is for models that were trained at their whole width only: it would
shuffle the rings of one that is a MatFormer already.

What is unusual: all scores measure one thing in three ways, the harm of leaving a unit (a neuron, or a key-value head
with those that ask it) out, and none changes when weights are rescaled in a way that leaves the function alone.
  norm        The largest length that the unit can add to the residual stream, up to a constant:
              |up|^2 |down| for ReLU squared, |up| |down| for GELU, |gate| |up| |down| for SwiGLU, |v| |o| for
              attention (Frobenius norms of the unit's rows), the gain of the norm before it multiplied in. Needs no
              data.
  activation  The length that it does add, as root mean square over the calibration text: the RMS of its activation
              times |down|. The idea of Wanda (Sun et al. 2023, arXiv 2306.11695), for whole neurons.
  fisher      What leaving it out adds to the loss, to second order: T/2 E[(dL/dz)^2] with a factor z on what the unit
              adds, L the mean loss of a window of T tokens, E over windows. Fisher pruning (Theis et al. 2018, arXiv
              1801.05787), each window being an example. It sees only where the loss still has a slope: on text that
              the model has learnt nearly by heart, it can be worse than random.
  random      The control: what the neurons that happen to come first are worth.
  identity    Leaves everything where it is.
Sorting a trained network and nesting it afterwards is also what Flextron does (Cai et al. 2024, arXiv 2406.10260).

Shape legend: B = sequences, T = tokens, D = hidden size, N = windows, U = units of one block, K = rows of one unit.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from braniac.model.data import Batches
from braniac.model.errors import CheckpointError, ConfigError
from braniac.model.evaluate import EVALUATION_BATCH, held_out_loss
from braniac.model.gpt import GPT, Block, RMSNorm
from braniac.model.objective import ObjectiveSettings
from braniac.model.optim import copy_checked
from braniac.model.tiers import tier_widths
from braniac.model.trainer import Trainer, TrainSettings

Kind = Literal["norm", "activation", "fisher", "random", "identity"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Windows = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class _Units:
    """The neurons or the key-value heads of one layer; every matrix of `block` has the same number of rows for each."""

    count: int
    block: nn.Module
    norm: RMSNorm
    inputs: tuple[Tensor, ...]
    """Matrices whose norms bound the activation."""
    output: Tensor
    """The matrix that takes the activations back to the residual stream, [U * K, D]."""
    hidden: Callable[..., Tensor]
    """The activations [B, T, U * K], from what `block` is called with."""

    def lengths(self, matrix: Tensor) -> Tensor:
        """Frobenius norm of each unit's rows, float64 [U]."""
        lengths_U: Tensor = matrix.detach().double().view(self.count, -1).norm(dim=1)
        return lengths_U


def _units(model: GPT) -> dict[str, _Units]:
    """All that is sorted, by the name of its module."""
    found: dict[str, _Units] = {}
    for layer, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        mlp, prefix = block.mlp, f"model.layers.{layer}"
        inputs: tuple[Tensor, ...] = (mlp.up_proj.weight,)
        if mlp.gate_proj is not None or mlp.activation == "relu2":
            inputs = (*inputs, (mlp.gate_proj or mlp.up_proj).weight)  # ReLU squared: the same row twice
        found[f"{prefix}.mlp"] = _Units(
            mlp.neurons, mlp, block.post_attention_layernorm, inputs, mlp.down_proj.weight, mlp.activations
        )
        if model.config.nested_heads:
            attention = block.self_attn
            found[f"{prefix}.self_attn"] = _Units(
                len(attention.k_proj.weight) // attention.head_dim,
                attention,
                block.input_layernorm,
                (attention.v_proj.weight,),
                attention.o_proj.weight,
                _without_output(attention, attention.o_proj.weight),
            )
    return found


def _without_output(attention: nn.Module, output: Tensor) -> Callable[..., Tensor]:
    """Attention up to, but without, its output projection."""
    return lambda *arguments: functional_call(attention, {"o_proj.weight": torch.eye(len(output))}, arguments)


def importance(model: GPT, kind: Kind, calibration: Windows | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Score of every neuron, float64 [neurons held] by name of its FFN; with nested heads also of the key-value heads.

    `calibration` is (tokens, targets) of text from the training set, int64 [N, T] each, for activation and fisher;
    `seed` is for random. Raises ConfigError for an unknown kind or missing text, CheckpointError for weights that are
    not finite.
    """
    units = _units(model)
    match kind:
        case "norm":
            scores = {name: _largest_length(unit) for name, unit in units.items()}
        case "activation":
            scores = _typical_length(model, units, _needed(calibration, kind))
        case "fisher":
            scores = _expected_harm(model, units, _needed(calibration, kind))
        case "random":
            dice = torch.Generator().manual_seed(seed)
            scores = {name: torch.rand(unit.count, generator=dice).double() for name, unit in units.items()}
        case "identity":
            scores = {name: torch.zeros(unit.count).double() for name, unit in units.items()}  # ties stay in order
        case _:
            raise ConfigError(f"there is no ordering {kind!r}: choose one of {', '.join(KINDS)}.")
    for name, score in scores.items():
        if not torch.isfinite(score).all():
            raise CheckpointError(f"the {kind} of {name} is not finite: its weights are damaged, use an earlier state.")
    return scores


def _needed(calibration: Windows | None, kind: str) -> Windows:
    if calibration is None or not len(calibration[0]):
        raise ConfigError(f"an ordering by {kind} needs calibration text: give at least one window.")
    return calibration


@torch.no_grad()
def _largest_length(unit: _Units) -> Tensor:
    score = unit.lengths(unit.output)
    for matrix in unit.inputs:
        score = score * unit.lengths(matrix if unit.norm.weight is None else matrix * unit.norm.weight)
    return score


@torch.no_grad()
def _typical_length(model: GPT, units: Mapping[str, _Units], calibration: Windows) -> dict[str, Tensor]:
    calls: dict[nn.Module, tuple[Any, ...]] = {}
    moments = {name: torch.zeros(unit.count, 1, 1).double() for name, unit in units.items()}
    hooks = [unit.block.register_forward_pre_hook(calls.__setitem__) for unit in units.values()]
    try:
        for tokens_BT in torch.split(calibration[0], EVALUATION_BATCH):
            model(tokens_BT)
            for name, unit in units.items():
                rows_NUK = unit.hidden(*calls[unit.block]).view(tokens_BT.numel(), unit.count, -1)
                moments[name] = moments[name] + torch.einsum("nuk,nul->ukl", rows_NUK, rows_NUK)
    finally:
        for hook in hooks:
            hook.remove()
    scores = {}
    for name, unit in units.items():
        out_UKD = unit.output.detach().double().view(unit.count, -1, unit.output.shape[1])
        squares_U = (moments[name] * (out_UKD @ out_UKD.mT)).sum((1, 2)) / calibration[0].numel()
        scores[name] = squares_U.clamp(min=0).sqrt()  # rounding may leave a sum of nearly opposite rows below zero
    return scores


@torch.enable_grad()
def _expected_harm(model: GPT, units: Mapping[str, _Units], calibration: Windows) -> dict[str, Tensor]:
    scores = {name: torch.zeros(unit.count).double() for name, unit in units.items()}
    outputs = [unit.output for unit in units.values()]
    for tokens_T, targets_T in zip(*calibration, strict=True):
        gradients = torch.autograd.grad(model.loss(tokens_T[None], targets_T[None]), outputs)
        for score, unit, gradient in zip(scores.values(), units.values(), gradients, strict=True):
            # A factor on the unit's rows of the output matrix is a factor on its output.
            slope_U = (gradient.double() * unit.output.detach()).view(unit.count, -1).sum(1)
            score += slope_U.square()
    tokens, windows = calibration[0].shape[1], len(calibration[0])
    return {name: score * tokens / (2 * windows) for name, score in scores.items()}


def orderings(model: GPT, kind: Kind, calibration: Windows | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Where every new place gets its neuron from, int64 [neurons held], the most important first; see `importance`.

    Of equally important ones, the one that came first stays first.
    """
    scores = importance(model, kind, calibration, seed)
    return {name: torch.argsort(score, descending=True, stable=True) for name, score in scores.items()}


@torch.no_grad()
def reorder_(model: GPT, orders: Mapping[str, Tensor]) -> None:
    """Move the neurons (and heads) of each module named to these orders; the whole model's function stays.

    An optimizer's memory does not move with them: begin a new one.
    """
    units = _units(model)
    for name, order in orders.items():
        count = units[name].count
        assert torch.equal(order.sort().values, torch.arange(count)), f"no permutation of {count} units for {name}"
    for name, order in orders.items():
        for matrix in units[name].block.parameters():
            matrix.copy_(matrix.view(len(order), -1, matrix.shape[1])[order].view_as(matrix))


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderingLosses:
    """Held-out loss of one ordering at each width, nats per token."""

    before: tuple[float, ...]
    """Sorted, and nothing else."""
    after: tuple[float, ...]
    """After the training that followed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConversionReport:
    """What each ordering is worth, and what the dense model was worth."""

    widths: tuple[int, ...]
    """FFN neurons per layer, the whole model first."""

    dense: float
    """Held-out loss of the dense model, nats per token."""

    dense_continued: float
    """Of the dense model after as many further steps, at the whole width only: what the sorted ones compete with."""

    orderings: dict[Kind, OrderingLosses]


def report(
    model: GPT,
    kinds: Sequence[Kind],
    *,
    calibration: Windows,
    windows: Windows,
    batches: Batches,
    settings: TrainSettings,
    widths: Sequence[int] | None = None,
    seed: int = 0,
) -> ConversionReport:
    """Sort a dense model in several ways, then train each for `settings.total_steps` steps on the same batches.

    The objective of `settings` is what makes a MatFormer of them: usually mode joint. `calibration` decides the orders,
    `windows` (held-out text) the losses. The model itself is left as it is. Raises what `importance` raises, and
    TrainingDiverged.
    """
    widths = tier_widths(model.config)[model.tier :] if widths is None else tuple(widths)
    rows: dict[Kind, OrderingLosses] = {}
    for kind in kinds:
        sorted_model = copy.deepcopy(model)
        reorder_(sorted_model, orderings(model, kind, calibration, seed))
        before = [held_out_loss(sorted_model, windows, width) for width in widths]
        trained = _trained(sorted_model, batches, settings)
        after = [held_out_loss(trained, windows, width) for width in widths]
        rows[kind] = OrderingLosses(before=tuple(before), after=tuple(after))
    whole_only = dataclasses.replace(settings, objective=ObjectiveSettings(mode="fixed"))
    return ConversionReport(
        widths=widths,
        dense=held_out_loss(model, windows),
        dense_continued=held_out_loss(_trained(model, batches, whole_only), windows),
        orderings=rows,
    )


def _trained(model: GPT, batches: Batches, settings: TrainSettings) -> GPT:
    trainer = Trainer(model.config, model.tier, batches, settings)
    copy_checked(trainer.params, dict(model.named_parameters()))
    for _ in range(settings.total_steps):
        trainer.step()
    return trainer.model
