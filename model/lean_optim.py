"""The optimizer of lean training: it takes one gradient at a time, in pieces, and keeps about one byte per parameter.

Against optim.py, of which it is the frugal twin (same learning rates, same step sizes):
* A matrix's momentum is int8. Its gradient arrives in blocks of rows that are forgotten once they have gone into the
  momentum; what is kept until the matrix is whole is the direction of the step, in bfloat16.
* Directions are orthogonalised through their Gram matrix, in float32 (muon.py).
* What has a row for each token (embedding, head, value embeddings) has one second moment per row and one per column,
  whose product stands for that of each value (after Adafactor, Shazeer & Stern 2018, arXiv 1804.04235), and no
  momentum. Rows that no token asked for are left alone, and count their own steps. As rows come in blocks, a block
  sees the columns of the blocks before it and of its own.
* Gains are float32, with Adam as ever.
A gradient that is not finite goes nowhere: `refused` names the parameters that were left as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from braniac.model.config import ModelConfig
from braniac.model.malloc import give_back_memory
from braniac.model.muon import add_gram_, gram_polar, mirror_, width_scale
from braniac.model.optim import ADAM_BETAS, ADAM_EPSILON, MOMENTUM, copy_checked, map_rows
from braniac.model.rounding import Dice, Int8Matrix, round_into_, widened
from braniac.model.tiers import is_gain, is_table

VALUES_AT_ONCE = 1 << 17
"""Values of a matrix that are in float32 at once: a few temporaries of that size stay in the processor's cache."""
MULTIPLIED_AT_ONCE = 1 << 20
"""The same where they are multiplied by a matrix, which pays only for many rows."""
_SPREAD_MIN = 1e-3  # what keeps a column whose gradients were all but zero from leaping


class Direction:
    """Where Muon is about to move a matrix, filled in by rows."""

    def __init__(self, name: str, rows: int, cols: int) -> None:
        self.name = name
        self.values = torch.empty(rows, cols, dtype=torch.bfloat16)
        self.is_finite = True


class LeanOptimizer:
    """Updates bfloat16 parameters in place. `begin` a step, hand in every gradient, then look at `refused`."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        config: ModelConfig,
        *,
        learning_rate: float,
        adam_learning_rate: float,
        weight_decay: float,
    ) -> None:
        self.params = params
        self.config = config
        self.learning_rate = learning_rate
        self.adam_learning_rate = adam_learning_rate
        self.weight_decay = weight_decay
        tables = {name: p for name, p in params.items() if is_table(name)}
        self.gains = {name: p for name, p in params.items() if is_gain(name)}
        others = {name: p for name, p in params.items() if name not in tables and name not in self.gains}
        self.momentum = {name: Int8Matrix(*p.shape) for name, p in others.items()}
        self.row_second = {name: torch.zeros(len(p)) for name, p in tables.items()}
        self.row_steps = {name: torch.zeros(len(p), dtype=torch.int32) for name, p in tables.items()}
        self.column_second = {name: torch.zeros(p.shape[1]) for name, p in tables.items()}
        self.first = {name: torch.zeros_like(p) for name, p in self.gains.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.gains.items()}
        self.steps = torch.zeros((), dtype=torch.int64)
        self.refused: list[str] = []
        self._dice = Dice(device=next(iter(params.values())).device)
        self._lr_scale = 0.0

    def begin(self, lr_scale: float, seed: int) -> None:
        """Start a step. `lr_scale` multiplies both learning rates, `seed` decides how weights are rounded."""
        self.steps += 1
        self.refused = []
        self._dice.seed(seed)
        self._lr_scale = lr_scale

    # --- matrices: Muon ----------------------------------------------------------------------------------------------

    def direction(self, name: str, rows: int) -> Direction:
        """Room for the step of the first `rows` rows of a matrix; the others, and their momentum, are left alone."""
        return Direction(name, rows, self.params[name].shape[1])

    def add_gradient(self, direction: Direction, start: int, gradient: Tensor) -> None:
        """Take the gradient of the rows from `start` on, float32 [rows, cols]: momentum, then Nesterov's direction."""
        if not math.isfinite(gradient.sum().item()):
            direction.is_finite = False
            return
        momentum = self.momentum[direction.name]
        for part in row_slices(gradient, VALUES_AT_ONCE):
            piece, first, last = gradient[part], start + part.start, start + part.stop
            mean = momentum.read(first, last).lerp_(piece, 1 - MOMENTUM)
            direction.values[first:last] = piece.lerp(mean, MOMENTUM)
            momentum.write(first, mean, self._dice)

    def apply(self, direction: Direction) -> None:
        """Move the matrix, once all rows of the direction are there."""
        name, values = direction.name, direction.values
        if not direction.is_finite:
            self.refused.append(name)
            return
        give_back_memory()
        rows = map_rows(self.config, name, len(values))
        lr = self.learning_rate * self._lr_scale
        step = lr * width_scale(name, rows, values.shape[1])
        for first, turned in orthogonal_rows(values.view(-1, rows, values.shape[1])):
            for part in row_slices(turned, VALUES_AT_ONCE):
                target = self.params[name][first + part.start : first + part.stop]
                moved = turned[part].mul_(-step).add_(target, alpha=1 - lr * self.weight_decay)
                round_into_(target, moved, self._dice)

    # --- tables: second moments of rows and columns ------------------------------------------------------------------

    def update_rows(self, name: str, rows: slice | Tensor, gradient: Tensor) -> None:
        """Move some rows of a table, by their float32 gradient [rows, cols], which is destroyed.

        `rows` is a block of the table, all of which comes block by block in a step, or the only rows of a step.
        """
        if not math.isfinite(gradient.sum().item()):
            self.refused.append(name)
            return
        rows_in_step = len(self.params[name]) if isinstance(rows, slice) else len(rows)
        for part in row_slices(gradient, VALUES_AT_ONCE):
            place = slice(rows.start + part.start, rows.start + part.stop) if isinstance(rows, slice) else rows[part]
            spread = self._column_spread(name, gradient[part], rows_in_step)
            self._update_some_rows(name, place, gradient[part], spread)

    def _column_spread(self, name: str, gradient: Tensor, rows_in_step: int) -> Tensor:
        """[cols], how much larger than an average column's the gradients of each column are, these included."""
        second = self.column_second[name]
        # All rows of a step together count as much as one step does in Adam.
        second.lerp_(gradient.square().mean(0), (1 - ADAM_BETAS[1]) * len(gradient) / rows_in_step)
        return (second / second.mean().clamp_min(ADAM_EPSILON**2)).sqrt_().clamp_min_(_SPREAD_MIN)

    def _update_some_rows(self, name: str, rows: slice | Tensor, gradient: Tensor, spread: Tensor) -> None:
        beta, second, steps = ADAM_BETAS[1], self.row_second[name], self.row_steps[name]
        steps[rows] += 1
        second[rows] = second[rows].lerp(gradient.square().mean(1), 1 - beta)
        deviation = (second[rows] / (1 - beta ** steps[rows].float())).sqrt_().add_(ADAM_EPSILON)
        lr = self.adam_learning_rate * self._lr_scale
        table = self.params[name]
        step = gradient.div_(spread).mul_((-lr / deviation)[:, None])
        moved = step.add_(table[rows], alpha=1 - lr * self.weight_decay)
        rounded = torch.empty(moved.shape, dtype=table.dtype)
        round_into_(rounded, moved, self._dice)
        table[rows] = rounded

    # --- gains: Adam -------------------------------------------------------------------------------------------------

    def update_gains(self) -> None:
        """Move the gains by their `.grad`."""
        beta1, beta2 = ADAM_BETAS
        correction1, correction2 = 1 - beta1 ** int(self.steps), 1 - beta2 ** int(self.steps)
        for name, gain in self.gains.items():
            gradient, gain.grad = gain.grad, None
            assert gradient is not None, f"{name} has no gradient"
            if not math.isfinite(gradient.sum().item()):
                self.refused.append(name)
                continue
            first = self.first[name].lerp_(gradient, 1 - beta1)
            second = self.second[name].lerp_(gradient.square(), 1 - beta2)
            denominator = (second / correction2).sqrt_().add_(ADAM_EPSILON)
            lr = self.adam_learning_rate * self._lr_scale
            gain.detach().addcdiv_(first, denominator, value=-lr / correction1)

    # --- memory ------------------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        """Name -> the live tensors of the optimizer's memory; clone them before training goes on."""
        return (
            {f"momentum.{name}": matrix.codes for name, matrix in self.momentum.items()}
            | {f"scales.{name}": matrix.scales for name, matrix in self.momentum.items()}
            | {f"row_second.{name}": tensor for name, tensor in self.row_second.items()}
            | {f"row_steps.{name}": tensor for name, tensor in self.row_steps.items()}
            | {f"column_second.{name}": tensor for name, tensor in self.column_second.items()}
            | {f"first.{name}": tensor for name, tensor in self.first.items()}
            | {f"second.{name}": tensor for name, tensor in self.second.items()}
            | {"steps": self.steps}
        )

    def forget(self) -> None:
        """Begin anew: all memory is zero, as at first."""
        for tensor in self.state_tensors().values():
            tensor.zero_()

    def load_state_tensors(self, saved: Mapping[str, Tensor]) -> None:
        """Copy `saved` in, all or nothing. Raises CheckpointError if names, shapes, types or values do not fit."""
        copy_checked(self.state_tensors(), saved)


def orthogonal_rows(maps: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Orthogonalise stacked maps bfloat16 [n, rows, cols]: their rows in pieces, with the number of the first row.

    A piece is the caller's until the next is asked for.
    """
    count, rows, cols = maps.shape
    if count == 1 and rows >= cols:
        at_once = max(1, MULTIPLIED_AT_ONCE // cols)
        gram_NN = torch.zeros(cols, cols)
        for _, piece_RC in widened(maps[0], at_once, torch.float32):
            add_gram_(gram_NN, piece_RC)
        mirror_(gram_NN)
        q_NN = gram_polar(gram_NN[None])[0]
        room_RC = torch.empty(min(rows, at_once), cols)
        for at, piece_RC in widened(maps[0], at_once, torch.float32):
            yield at.start, torch.mm(piece_RC, q_NN, out=room_RC[: len(piece_RC)])
        return
    assert rows <= cols, "stacked maps are attention's heads, none of which is wider than the model"
    at_once = max(1, MULTIPLIED_AT_ONCE // (rows * cols))
    for first in range(0, count, at_once):
        wide_BRC = maps[first : first + at_once].float()
        yield first * rows, (gram_polar(wide_BRC @ wide_BRC.mT) @ wide_BRC).flatten(0, 1)


def row_slices(matrix: Tensor, values: int) -> Iterator[slice]:
    """Rows of a matrix, so many at a time that there are about `values` values in them."""
    at_once = max(1, values // matrix.shape[1])
    for start in range(0, len(matrix), at_once):
        yield slice(start, min(start + at_once, len(matrix)))
