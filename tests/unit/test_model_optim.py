"""Muon and Adam: orthogonality, step sizes that do not depend on the width, inactive rows, saved memory."""

from __future__ import annotations

import pytest
import torch

from braniac.model.config import ModelConfig
from braniac.model.errors import CheckpointError
from braniac.model.muon import orthogonalize
from braniac.model.optim import Optimizer
from braniac.model.tiers import HEAD

UP, DOWN, QUERY = (
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.0.self_attn.q_proj.weight",
)
CONFIG = ModelConfig(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=16, context=4
)


def some_params(width: int = 32, seed: int = 0) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(seed)
    shapes = {UP: (width, 8), DOWN: (width, 8), QUERY: (8, 8), HEAD: (16, 8)}
    return {name: torch.randn(shape, generator=dice).requires_grad_() for name, shape in shapes.items()}


def set_gradients(params: dict[str, torch.Tensor], width: int, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    for name, p in params.items():
        p.grad = torch.randn(p.shape, generator=dice)
        if ".mlp." in name:
            p.grad[width:] = 0


def optimizer_for(params: dict[str, torch.Tensor], weight_decay: float = 0.0) -> Optimizer:
    return Optimizer(params, config=CONFIG, learning_rate=0.1, adam_learning_rate=0.01, weight_decay=weight_decay)


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16), (1, 32, 32)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions(shape: tuple[int, ...]) -> None:
    u, s, vh = torch.linalg.svd(torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    # Over three orders of magnitude; the input's scale does not matter.
    spectrum = torch.logspace(0, -2.5, s.shape[-1]) * 1e-4
    result = orthogonalize(u @ torch.diag_embed(spectrum.expand_as(s)) @ vh)
    inner = u.mT @ result @ vh.mT
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.7
    assert diagonal.max() < 1.2
    assert (inner - torch.diag_embed(diagonal)).abs().max() < 0.02


def test_orthogonalize_treats_each_matrix_of_the_batch_alone_and_leaves_zero_zero() -> None:
    batch = torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))
    batch[1] = 0
    result = orthogonalize(batch)
    assert torch.allclose(result[0], orthogonalize(batch[:1])[0], atol=1e-5)
    assert not result[1].any()


def test_rows_beyond_the_width_do_not_move_even_with_stale_momentum() -> None:
    params = some_params()
    optimizer = optimizer_for(params, weight_decay=0.1)
    set_gradients(params, 32, seed=1)
    optimizer.step(1.0, [32])
    before = {name: p.detach().clone() for name, p in params.items()}
    momentum = {name: m.clone() for name, m in optimizer.momentum.items()}
    set_gradients(params, 8, seed=2)
    optimizer.step(1.0, [8])
    for name in (UP, DOWN):
        assert torch.equal(params[name][8:], before[name][8:])
        assert torch.equal(optimizer.momentum[name][8:], momentum[name][8:])
        assert not torch.equal(params[name][:8], before[name][:8])


def test_a_narrow_step_equals_the_step_of_the_narrow_model() -> None:
    wide = some_params()
    narrow = {name: (p[:8] if ".mlp." in name else p).detach().clone().requires_grad_() for name, p in wide.items()}
    set_gradients(wide, 8, seed=3)
    for name, p in narrow.items():
        grad = wide[name].grad
        assert grad is not None
        p.grad = grad[: len(p)].clone()
    optimizer_for(wide).step(1.0, [8])
    optimizer_for(narrow).step(1.0, [8])
    for name, p in narrow.items():
        assert torch.allclose(wide[name][: len(p)], p, atol=1e-6)


@pytest.mark.parametrize("width", [4, 8, 32, 128])
def test_a_neurons_step_is_as_long_at_every_width(width: int) -> None:
    params = some_params(width)
    before = params[UP].detach().clone()
    set_gradients(params, width, seed=4)
    optimizer_for(params).step(1.0, [width])
    length = (params[UP] - before).norm(dim=1).square().mean().sqrt().item()
    assert length == pytest.approx(0.1, rel=0.2)  # the learning rate


@pytest.mark.parametrize(("width", "scale"), [(4, 2**0.5), (8, 1.0), (32, 1.0)])
def test_down_counts_its_rows_as_inputs(width: int, scale: float) -> None:
    params = some_params(width)
    before = params[DOWN].detach().clone()
    set_gradients(params, width, seed=4)
    optimizer_for(params).step(1.0, [width])
    change = (params[DOWN] - before).detach()
    assert torch.linalg.matrix_norm(change, 2).item() == pytest.approx(0.1 * scale, rel=0.2)


def test_muon_steps_along_the_nesterov_momentum() -> None:
    params = some_params()
    optimizer = optimizer_for(params)
    gradients = []
    for seed in (0, 1):
        set_gradients(params, 32, seed)
        gradient = params[UP].grad
        assert gradient is not None
        gradients.append(gradient.clone())
        before = params[UP].detach().clone()
        optimizer.step(1.0, [32])
    momentum = 0.95 * 0.05 * gradients[0] + 0.05 * gradients[1]
    update = 0.05 * gradients[1] + 0.95 * momentum
    expected = before - 0.1 * 2 * orthogonalize(update[None])[0]
    assert torch.allclose(params[UP], expected, atol=1e-5)


def test_query_heads_are_orthogonalised_one_by_one() -> None:
    params = some_params()
    before = params[QUERY].detach().clone()
    set_gradients(params, 32, seed=5)
    gradient = params[QUERY].grad
    assert gradient is not None
    gradient[:4] *= 1e-3  # one head's gradient is small
    optimizer_for(params).step(1.0, [32])
    heads = (params[QUERY] - before).detach().view(2, 4, 8)
    assert heads[0].norm().item() == pytest.approx(heads[1].norm().item(), rel=0.2)


def test_adams_first_step_has_the_length_of_its_learning_rate() -> None:
    params = some_params()
    before = params[HEAD].detach().clone()
    set_gradients(params, 32, seed=6)
    optimizer_for(params).step(0.5, [32])
    assert torch.allclose((params[HEAD] - before).abs(), torch.full_like(before, 0.005), rtol=1e-3)


def test_weight_decay_shrinks_what_has_no_gradient() -> None:
    params = some_params()
    before = {name: p.detach().clone() for name, p in params.items()}
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer_for(params, weight_decay=0.5).step(1.0, [32])
    assert torch.allclose(params[UP], before[UP] * 0.95)
    assert torch.allclose(params[HEAD], before[HEAD] * 0.995)


def test_saved_memory_continues_to_the_bit() -> None:
    straight, resumed = some_params(), some_params()
    one, two = optimizer_for(straight), optimizer_for(resumed)
    for step in range(4):
        for params, optimizer in ((straight, one), (resumed, two)):
            set_gradients(params, 16, seed=step)
            optimizer.step(1.0, [16])
        saved = {name: t.clone() for name, t in two.state_tensors().items()}
        two = optimizer_for(resumed)
        two.load_state_tensors(saved)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("steps", None, "lacks tensor 'steps'"),
        ("extra", torch.zeros(1), "unknown tensor 'extra'"),
        (f"first.{HEAD}", torch.zeros(3), r"need torch.float32 \(16, 8\)"),
        (f"first.{HEAD}", torch.zeros(16, 8, dtype=torch.float64), "torch.float64"),
        (f"first.{HEAD}", torch.full((16, 8), torch.nan), "not finite"),
    ],
)
def test_memory_that_does_not_fit_is_refused_whole(key: str, value: torch.Tensor | None, sentence: str) -> None:
    params = some_params()
    optimizer = optimizer_for(params)
    set_gradients(params, 32, seed=0)
    optimizer.step(1.0, [32])
    kept = {name: t.clone() for name, t in optimizer.state_tensors().items()}
    saved = {name: torch.zeros_like(t) for name, t in kept.items()}
    if value is None:
        del saved[key]
    else:
        saved[key] = value
    with pytest.raises(CheckpointError, match=sentence):
        optimizer.load_state_tensors(saved)
    assert all(torch.equal(t, kept[name]) for name, t in optimizer.state_tensors().items())
