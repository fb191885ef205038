"""Few bits without bias: bfloat16 weights by stochastic rounding, and a momentum of 8 bits.

A weight of 0.02 in bfloat16 has a neighbour 0.6% away, while a step moves it by less, so rounding to nearest would lose
most steps. Rounded up or down by chance, in proportion to the distance, every step counts on average (Gupta et al.
2015, arXiv 1502.02551; for bfloat16 Zamirai et al. 2020, arXiv 2010.06192). The momentum is kept as int8 with one scale
per run of at most 256 values (Dettmers et al. 2021, arXiv 2110.02861, but linear) and is rounded by chance too: to
nearest, values below 8% of the largest in their run could never decay.

The chance is a seeded generator's, and whoever uses it seeds it anew for each step, so a resumed training repeats it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_SCALE_RUN = 256
_HALF, _UPPER_16 = 1 << 15, -1 << 16


class Dice:
    """Uniform 16-bit noise, the same for the same seed."""

    def __init__(self, seed: int = 0, device: torch.device | None = None) -> None:
        """For tensors on `device`, the processor's if not given; other devices throw other dice."""
        self._generator = torch.Generator(device or "cpu").manual_seed(seed)

    def seed(self, seed: int) -> None:
        """Begin anew, from a whole number below 2**64."""
        self._generator.manual_seed(seed)

    def noise(self, shape: torch.Size) -> Tensor:
        """int16 `shape`, uniform on all 65536 values."""
        count = shape.numel()
        # Four numbers for the price of one.
        words = torch.empty(-(-count // 4), dtype=torch.int64, device=self._generator.device)
        words.random_(-(1 << 63), None, generator=self._generator)
        return words.view(torch.int16)[:count].view(shape)


def round_into_(target: Tensor, values: Tensor, dice: Dice) -> None:
    """Write float32 `values`, which are destroyed, over bfloat16 `target` of the same shape, rounding by chance."""
    assert values.is_contiguous()
    bits = values.view(torch.int32)
    # bfloat16 is the upper half of a float32: adding noise below it carries into it with the right chance.
    bits.add_(dice.noise(values.shape)).add_(_HALF).bitwise_and_(_UPPER_16)
    target.copy_(values)


class Int8Matrix:
    """A matrix [rows, cols] of about 8 bits per value, read and written a few rows at a time."""

    def __init__(self, rows: int, cols: int) -> None:
        """All zero."""
        self.run = _SCALE_RUN if cols % _SCALE_RUN == 0 else cols
        self.codes = torch.zeros(rows, cols, dtype=torch.int8)
        self.scales = torch.zeros(rows, cols // self.run)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) in float32."""
        values = self.codes[start:stop].float()
        values.view(stop - start, -1, self.run).mul_(self.scales[start:stop, :, None])
        return values

    def write(self, start: int, values: Tensor, dice: Dice) -> None:
        """Replace the rows from `start` on by finite float32 `values` [rows, cols]."""
        stop = start + len(values)
        runs = values.view(len(values), -1, self.run)
        largest = torch.maximum(runs.amax(-1), runs.amin(-1).neg_())
        self.scales[start:stop] = largest / 127
        codes = runs * (127 / largest.clamp_min(1e-30))[:, :, None]
        codes.add_(dice.noise(codes.shape), alpha=2.0**-16).add_(0.5).floor_().clamp_(-127, 127)
        self.codes[start:stop] = codes.view_as(values)


def widened(matrix: Tensor, rows: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of so many rows of a matrix, each with its place, as `dtype`.

    A block is there until the next is asked for, because all are widened into the same room: fresh pages for each would
    cost more than the widening.
    """
    room_rows = 0 if matrix.dtype == dtype else min(rows, len(matrix))
    room = torch.empty(room_rows, matrix.shape[1], dtype=dtype, device=matrix.device)
    for start in range(0, len(matrix), rows):
        block = matrix[start : start + rows]
        yield slice(start, start + len(block)), block if room_rows == 0 else room[: len(block)].copy_(block)
