"""The MatFormer feed-forward block: ReLU squared, GELU or SwiGLU, sliced to any width by taking a prefix of neurons.

Shape legend: B = sequences, T = tokens, D = hidden size, H = FFN neurons held (the tier's width), W = neurons in use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braniac.model.config import Activation


class Matrix(nn.Module):
    """One weight [rows, cols] under a Hugging Face style name. Starts at zero; `initial.py` has the first values."""

    def __init__(self, rows: int, cols: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, cols, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., cols] -> [..., rows]"""
        return F.linear(x, self.weight.to(x.dtype))


def activate(up: Tensor, gate: Tensor | None, activation: Activation) -> Tensor:
    """What neurons say whose pre-activations are `up` and, if they are gated, `gate`; all of one shape."""
    if gate is not None:
        return F.silu(gate) * up
    return up.relu().square() if activation == "relu2" else F.gelu(up)


class MatFormerFFN(nn.Module):
    """down(act(x)) over a prefix of the neurons; all matrices are neuron-major [H, D].

    act is relu(up(x))^2 or gelu(up(x)) by `activation`, but silu(gate(x)) * up(x) if `gated`.
    """

    def __init__(
        self,
        hidden_size: int,
        neurons: int,
        widths: Sequence[int] | None = None,
        *,
        gated: bool = False,
        activation: Activation = "relu2",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`widths` are the granularities of `nested`, in any order; the whole block alone if not given."""
        super().__init__()
        self.neurons = neurons
        self.widths = tuple(widths) if widths is not None else (neurons,)
        assert all(0 < width <= neurons for width in self.widths), f"widths {self.widths} of {neurons} neurons"
        self.activation: Activation = activation
        self.gate_proj = Matrix(neurons, hidden_size, dtype) if gated else None
        self.up_proj = Matrix(neurons, hidden_size, dtype)
        self.down_proj = Matrix(neurons, hidden_size, dtype)

    def forward(self, x_BTD: Tensor, width: int | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]. The slices are views; backward leaves exact zeros in the rows that were not used."""
        width = self.neurons if width is None else width
        return self.activations(x_BTD, width) @ self.down_proj.weight[:width].to(x_BTD.dtype)

    def activations(self, x_BTD: Tensor, width: int) -> Tensor:
        """What the first `width` neurons say, [B, T, W]."""
        assert 0 < width <= self.neurons, f"width {width} of {self.neurons}"
        up_BTW = F.linear(x_BTD, self.up_proj.weight[:width].to(x_BTD.dtype))
        gate = self.gate_proj
        gate_BTW = None if gate is None else F.linear(x_BTD, gate.weight[:width].to(x_BTD.dtype))
        return activate(up_BTW, gate_BTW, self.activation)

    def nested(self, x_BTD: Tensor, widths: Sequence[int] | None = None) -> list[Tensor]:
        """The outputs at several widths of one input, in the order asked for, at the price of the widest.

        A neuron's activation does not depend on the width, and each width's output is the next smaller one's plus what
        the neurons between them add.
        """
        asked = self.widths if widths is None else tuple(widths)
        act_BTW = self.activations(x_BTD, max(asked))
        outputs: dict[int, Tensor] = {}
        total, start = None, 0
        for width in sorted(set(asked)):
            part_BTD = act_BTW[..., start:width] @ self.down_proj.weight[start:width].to(x_BTD.dtype)
            total = part_BTD if total is None else total + part_BTD
            outputs[width], start = total, width
        return [outputs[width] for width in asked]
