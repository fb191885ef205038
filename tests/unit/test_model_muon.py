"""Orthogonalisation through the Gram matrix gives what the plain iteration gives, and what a singular value says."""

from __future__ import annotations

import pytest
import torch

from braniac.model.lean_optim import orthogonal_rows
from braniac.model.muon import gram_polar, iterate, orthogonalize

SHAPES = [(3, 16, 64), (1, 96, 32), (2, 24, 24)]


def matrices(shape: tuple[int, ...], decades: float) -> torch.Tensor:
    """Random directions, singular values spread over so many powers of ten."""
    dice = torch.Generator().manual_seed(0)
    u, s, vh = torch.linalg.svd(torch.randn(shape, generator=dice), full_matrices=False)
    return u @ torch.diag_embed(torch.logspace(0, -decades, s.shape[-1]).expand_as(s) * 1e-3) @ vh


@pytest.mark.parametrize("shape", SHAPES)
def test_it_agrees_with_the_plain_iteration(shape: tuple[int, ...]) -> None:
    x = matrices(shape, decades=2.5)
    wide = x.mT if shape[1] > shape[2] else x
    turned = gram_polar(wide @ wide.mT) @ wide
    expected = iterate(wide)
    assert (turned - expected).norm().item() < 2e-3 * expected.norm().item()
    assert torch.allclose(orthogonalize(x), turned.mT if wide is not x else turned, atol=2e-3)
    found = torch.linalg.svdvals(turned)
    assert found.min().item() > 0.7
    assert found.max().item() < 1.3


def test_a_spectrum_beyond_float32_does_not_explode() -> None:
    x = matrices((1, 32, 128), decades=9)
    values = torch.linalg.svdvals(gram_polar(x @ x.mT) @ x)
    assert values.max().item() < 1.3
    assert not gram_polar(torch.zeros(1, 4, 4)).isnan().any()


def test_large_products_by_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = matrices((2, 50, 70), decades=1)
    expected = gram_polar(x @ x.mT)
    monkeypatch.setattr("braniac.model.muon._LARGE", 16)
    assert torch.allclose(gram_polar(x @ x.mT), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_in_pieces_it_is_the_same(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    maps = matrices(shape, decades=1).bfloat16()
    x = maps.float()
    expected = (iterate(x.mT).mT if shape[1] > shape[2] else iterate(x)).flatten(0, 1)
    monkeypatch.setattr("braniac.model.lean_optim.MULTIPLIED_AT_ONCE", 1024)
    pieces = [(first, piece.clone()) for first, piece in orthogonal_rows(maps)]
    assert len(pieces) > 1 or shape == (1, 24, 24)
    assert [first for first, _ in pieces] == [sum(len(p) for _, p in pieces[:n]) for n in range(len(pieces))]
    assert torch.allclose(torch.cat([piece for _, piece in pieces]), expected, atol=1e-3)
