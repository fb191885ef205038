"""Rounding by chance: no bias, neighbours only, exact values stay; the 8-bit matrix; repeatable noise."""

from __future__ import annotations

import pytest
import torch

from braniac.model.rounding import Dice, Int8Matrix, round_into_


def rounded(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    target = torch.empty(values.shape, dtype=torch.bfloat16)
    round_into_(target, values.clone(), Dice(seed))
    return target


@pytest.mark.parametrize("value", [0.0213, -0.0213, 1.001, -3e-7, 65000.0])
def test_rounding_goes_to_the_two_neighbours_and_is_right_on_average(value: float) -> None:
    values = torch.full((1 << 16,), value)
    found = rounded(values).double()
    near = values[:1].bfloat16().double().abs().item()
    step = 2.0 ** (torch.tensor(near).log2().floor().item() - 7)
    assert len(found.unique()) == 2
    assert bool((found.double() - value).abs().max() < step)
    assert found.mean().item() == pytest.approx(value, abs=step / 100)  # the error of 65536 throws is step / 512


def test_what_bfloat16_holds_is_left_alone() -> None:
    exact = torch.randn(4096, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact[:3] = torch.tensor([0.0, -0.0, torch.inf])
    assert torch.equal(rounded(exact.float()), exact)
    assert rounded(torch.tensor([torch.nan])).isnan().all()


def test_steps_too_small_to_see_still_add_up() -> None:
    weights, dice = torch.ones(1 << 12, dtype=torch.bfloat16), Dice(3)
    for _ in range(64):
        round_into_(weights, weights.float() - 2.0**-12, dice)  # an eighth of the distance to the neighbour
    assert weights.float().mean().item() == pytest.approx(1 - 2.0**-6, abs=1e-3)
    assert (torch.ones(1, dtype=torch.bfloat16) - 2.0**-12).item() == 1.0  # to nearest, nothing would ever happen


def test_noise_has_all_values_and_repeats() -> None:
    noise = Dice(5).noise(torch.Size((1 << 18,)))
    assert noise.dtype == torch.int16
    counts = torch.bincount(noise.int() + (1 << 15), minlength=1 << 16).view(16, -1).sum(1)
    assert counts.float().std().item() < 4 * (2**14) ** 0.5
    assert torch.equal(noise, Dice(5).noise(torch.Size((1 << 18,))))
    dice = Dice(6)
    dice.seed(5)
    assert torch.equal(dice.noise(torch.Size((3, 5))), Dice(5).noise(torch.Size((15,))).view(3, 5))


@pytest.mark.parametrize("cols", [512, 24])
def test_eight_bits_hold_a_matrix_to_a_127th_of_the_largest_in_each_run(cols: int) -> None:
    matrix, dice = Int8Matrix(8, cols), Dice(1)
    values = torch.randn(5, cols, generator=torch.Generator().manual_seed(2)) * 10.0 ** torch.arange(5)[:, None]
    matrix.write(2, values, dice)
    error = (matrix.read(2, 7) - values).view(5, -1, matrix.run)
    assert bool((error.abs() <= values.view(5, -1, matrix.run).abs().amax(-1, keepdim=True) / 126).all())
    assert not matrix.read(0, 2).any()
    assert not matrix.read(7, 8).any()
    assert matrix.codes.dtype == torch.int8
    assert matrix.scales.numel() == 8 * max(1, cols // 256)


def test_eight_bits_are_right_on_average_and_zeros_stay() -> None:
    matrix, dice, total = Int8Matrix(1, 256), Dice(4), torch.zeros(1, 256)
    values = torch.linspace(-1, 1, 256)[None] / 300
    values[0, 0] = 1.0  # so that a unit of the code is 1/127, larger than all the others
    for _ in range(400):
        matrix.write(0, values, dice)
        total += matrix.read(0, 1)
    assert (total / 400 - values).abs().max().item() < 4 * 0.5 / 127 / 20
    matrix.write(0, torch.zeros(1, 256), dice)
    assert not matrix.read(0, 1).any()
