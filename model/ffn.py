"""The MatFormer feed-forward block: ReLU squared, sliced to any width by taking a prefix of its neurons.

Shape legend: B = sequences, T = tokens, D = hidden size, H = FFN neurons held (the tier's width), W = neurons in use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Matrix(nn.Module):
    """One weight [rows, cols] under a Hugging Face style name. Starts at zero; `initial.py` has the first values."""

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, cols))

    def forward(self, x: Tensor) -> Tensor:
        """[..., cols] -> [..., rows]"""
        return F.linear(x, self.weight)


class MatFormerFFN(nn.Module):
    """down(relu(up(x))^2) over the first `width` neurons. Both matrices are neuron-major [H, D]."""

    def __init__(self, hidden_size: int, neurons: int) -> None:
        super().__init__()
        self.neurons = neurons
        self.up_proj = Matrix(neurons, hidden_size)
        self.down_proj = Matrix(neurons, hidden_size)

    def forward(self, x_BTD: Tensor, width: int) -> Tensor:
        """[B, T, D] -> [B, T, D]. The slices are views; backward leaves exact zeros in the rows that were not used."""
        assert 0 < width <= self.neurons, f"width {width} of {self.neurons}"
        up_WD, down_WD = self.up_proj.weight[:width], self.down_proj.weight[:width]
        return F.linear(x_BTD, up_WD).relu().square() @ down_WD
