"""The inner optimizer: Muon for the matrices inside the blocks, Adam for what has a row per token and for the gains.

Muon replaces the momentum of a matrix by its nearest orthogonal matrix (see muon.py). q, k and v are orthogonalised
head by head, each head being an independent map. Step sizes do not depend on the width of a tier. This is the
optimizer of `precision: fp32`; that of lean training is in lean_optim.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from braniac.model.config import ModelConfig
from braniac.model.errors import CheckpointError
from braniac.model.muon import orthogonalize, width_scale
from braniac.model.tiers import is_gain, is_sliced, is_table, layer_of, rows_at

MOMENTUM = 0.95
ADAM_BETAS = (0.9, 0.95)
ADAM_EPSILON = 1e-10


class Optimizer:
    """Updates parameters in place from their `.grad`."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        config: ModelConfig,
        *,
        learning_rate: float,
        adam_learning_rate: float,
        weight_decay: float,
    ) -> None:
        self.tables = {name: p for name, p in params.items() if is_table(name) or is_gain(name)}
        self.matrices = {name: p for name, p in params.items() if name not in self.tables}
        self.config = config
        self.learning_rate = learning_rate
        self.adam_learning_rate = adam_learning_rate
        self.weight_decay = weight_decay
        self.momentum = {name: torch.zeros_like(p.detach()) for name, p in self.matrices.items()}
        self.first = {name: torch.zeros_like(p.detach()) for name, p in self.tables.items()}
        self.second = {name: torch.zeros_like(p.detach()) for name, p in self.tables.items()}
        self.steps = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def step(self, lr_scale: float, widths: Sequence[int]) -> None:
        """One update. `lr_scale` multiplies both learning rates, `widths` are what the gradient is for."""
        self.steps += 1
        self._muon_step(self.learning_rate * lr_scale, widths)
        self._adam_step(self.adam_learning_rate * lr_scale)

    def _muon_step(self, lr: float, widths: Sequence[int]) -> None:
        # A step at a narrow width is a step of that narrower model: the rows beyond it, their momentum and their decay
        # are left alone. Their gradient is zero, but orthogonalising the whole matrix would move them by stale
        # momentum, under a loss that never saw them, and take length away from the rows that did learn something.
        batches: dict[torch.Size, list[tuple[str, Tensor]]] = {}
        for name, param in self.matrices.items():
            assert param.grad is not None, f"{name} has no gradient"
            layer = layer_of(name)
            assert layer is not None
            rows = rows_at(self.config, name, widths[layer]) if is_sliced(self.config, name) else len(param)
            gradient, momentum = param.grad[:rows], self.momentum[name][:rows]
            momentum.lerp_(gradient, 1 - MOMENTUM)
            update = gradient.lerp(momentum, MOMENTUM)  # Nesterov
            update = update.view(-1, map_rows(self.config, name, rows), update.shape[1])
            batches.setdefault(update.shape[1:], []).append((name, update))
        for batch in batches.values():
            orthogonal = orthogonalize(torch.cat([update for _, update in batch]))
            parts = torch.split(orthogonal, [len(update) for _, update in batch])
            for (name, _), part in zip(batch, parts, strict=True):
                active = self.matrices[name][: part.shape[0] * part.shape[1]]
                active.mul_(1 - lr * self.weight_decay)
                active.add_(part.flatten(0, 1), alpha=-lr * width_scale(name, part.shape[1], part.shape[2]))

    def _adam_step(self, lr: float) -> None:
        beta1, beta2 = ADAM_BETAS
        correction1, correction2 = 1 - beta1 ** int(self.steps), 1 - beta2 ** int(self.steps)
        for name, param in self.tables.items():
            assert param.grad is not None, f"{name} has no gradient"
            first = self.first[name].lerp_(param.grad, 1 - beta1)
            second = self.second[name].lerp_(param.grad.square(), 1 - beta2)
            denominator = (second / correction2).sqrt_().add_(ADAM_EPSILON)
            if not is_gain(name):  # a gain decays towards silence, not towards simplicity
                param.mul_(1 - lr * self.weight_decay)
            param.addcdiv_(first, denominator, value=-lr / correction1)

    def state_tensors(self) -> dict[str, Tensor]:
        """Name -> the live tensors of the optimizer's memory; clone them before training goes on."""
        return (
            {f"momentum.{name}": tensor for name, tensor in self.momentum.items()}
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


def map_rows(config: ModelConfig, name: str, rows: int) -> int:
    """Rows of each of the independent maps that are stacked in this matrix, of which `rows` rows are in use."""
    return config.head_dim if any(kind in name for kind in (".q_proj.", ".k_proj.", ".v_proj.")) else rows


def copy_checked(live: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy each saved tensor over the live one of its name, after checking all of them; CheckpointError otherwise."""
    if live.keys() != saved.keys():
        odd = sorted(live.keys() ^ saved.keys())[0]
        where = "lacks" if odd in live else "has an unknown"
        raise CheckpointError(f"the saved state {where} tensor {odd!r}: it belongs to another model or tier.")
    for name, tensor in live.items():
        other = saved[name]
        if other.shape != tensor.shape or other.dtype != tensor.dtype:
            raise CheckpointError(
                f"saved tensor {name!r} is {other.dtype} {tuple(other.shape)}: "
                f"this model and tier need {tensor.dtype} {tuple(tensor.shape)}."
            )
        if not bool(torch.isfinite(other).all()):
            raise CheckpointError(f"saved tensor {name!r} holds values that are not finite: use an earlier state.")
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(saved[name])
