"""The network: shapes, causality, nesting of tiers; the FFN; evaluation and decoding."""

from __future__ import annotations

import math

import pytest
import torch

from braniac.model.config import ModelConfig
from braniac.model.decoding import generate
from braniac.model.errors import ModelError
from braniac.model.evaluate import held_out_loss
from braniac.model.gpt import GPT, rotate
from braniac.model.tiers import is_ffn, parameter_shapes
from braniac.model.tokenizer import SEPARATOR, ByteTokenizer

SMALL = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, context=16)


def random_model(tier: int = 0) -> GPT:
    """A model whose zero matrices were filled too, identically on all tiers."""
    model = GPT(SMALL, tier)
    whole = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(parameter_shapes(SMALL, 0)[name], generator=whole)[: p.shape[0]] * 0.2)
    return model


def some_tokens(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


def test_a_fresh_model_predicts_uniformly() -> None:
    model = GPT(SMALL, 0)
    model.init_weights(seed=0)
    tokens = some_tokens()
    assert model(tokens).shape == (2, 16, 256)
    assert model.loss(tokens, tokens).item() == pytest.approx(math.log(256), abs=1e-5)


def test_the_future_does_not_reach_the_past() -> None:
    model, tokens = random_model(), some_tokens()
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :10], after[:, :10], atol=1e-5)
    assert not torch.allclose(before[:, 10:], after[:, 10:], atol=1e-2)


def test_rotary_products_depend_on_distance_alone() -> None:
    model = random_model().model
    q_K, k_K = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    q_TK, k_TK = (rotate(x_K.expand(1, 1, 16, 16), model.cos_TK, model.sin_TK)[0, 0] for x_K in (q_K, k_K))
    products_TT = q_TK @ k_TK.T
    for distance in range(1, 16):
        diagonal = products_TT.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-4)
    assert products_TT[:, 0].std() > 0.1
    assert torch.allclose(q_TK.norm(dim=1), q_K.norm().expand(16), atol=1e-4)


def test_logits_stay_below_the_softcap() -> None:
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    assert model(some_tokens()).abs().max() <= SMALL.logit_softcap


@pytest.mark.parametrize("tier", [1, 2, 3])
def test_a_tier_computes_what_the_whole_model_computes_at_its_width(tier: int) -> None:
    whole, part, tokens = random_model(), random_model(tier), some_tokens()
    assert torch.allclose(part(tokens), whole(tokens, SMALL.intermediate_size >> tier), atol=1e-5)
    assert not torch.allclose(part(tokens), whole(tokens), atol=1e-2)


def test_gradients_beyond_the_width_are_exactly_zero() -> None:
    model, tokens = random_model(), some_tokens()
    model.loss(tokens, tokens, width=8).backward()  # type: ignore[no-untyped-call]
    for name, p in model.named_parameters():
        if is_ffn(name):
            assert p.grad is not None
            assert p.grad[:8].any()
            assert not p.grad[8:].any()


def test_a_width_that_is_not_held_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="width 64 of 8"):
        random_model(tier=3)(some_tokens(), width=64)


def test_held_out_loss_is_the_mean_over_all_windows_whatever_the_batching() -> None:
    model, tokens = random_model(), some_tokens(batch=21)
    with torch.no_grad():
        expected = sum(model.loss(row[None], row[None]).item() for row in tokens) / 21
    assert held_out_loss(model, (tokens, tokens)) == pytest.approx(expected, rel=1e-5)
    assert held_out_loss(model, (tokens, tokens), width=8) != pytest.approx(expected, rel=1e-3)


def test_generation_is_reproducible_and_rolls_past_the_context() -> None:
    model = random_model()
    first, second = (
        list(generate(model, [1, 2, 3], 40, generator=torch.Generator().manual_seed(5), top_k=20)) for _ in range(2)
    )
    assert first == second
    assert len(first) == 40
    assert len(set(first)) > 1


def test_temperature_zero_and_top_k_one_take_the_likeliest_token() -> None:
    model = random_model()
    likeliest = int(model(torch.tensor([[1, 2, 3]]))[0, -1].argmax())
    dice = torch.Generator().manual_seed(0)
    assert list(generate(model, [1, 2, 3], 1, generator=dice, temperature=0)) == [likeliest]
    assert list(generate(model, [1, 2, 3], 1, generator=dice, temperature=5.0, top_k=1)) == [likeliest]
    assert list(generate(model, [1, 2, 3], 1, generator=dice, temperature=1e-40)) == [likeliest]


def test_generation_at_a_width_equals_generation_by_that_tier() -> None:
    wide = generate(random_model(), [7], 12, generator=torch.Generator(), temperature=0, width=8)
    narrow = generate(random_model(tier=3), [7], 12, generator=torch.Generator(), temperature=0)
    assert list(wide) == list(narrow)


@pytest.mark.parametrize(
    ("prompt", "temperature", "top_k"), [([], 1.0, None), ([256], 1.0, None), ([1], -1.0, None), ([1], 1.0, 0)]
)
def test_generation_refuses_what_it_cannot_use(prompt: list[int], temperature: float, top_k: int | None) -> None:
    with pytest.raises(ModelError):
        list(generate(random_model(), prompt, 1, generator=torch.Generator(), temperature=temperature, top_k=top_k))


def test_byte_tokenizer() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode("naïve 🐍\n")) == "naïve 🐍\n"
    assert tokenizer.decode([*b"a", SEPARATOR, *b"b"]) == "ab"
    assert tokenizer.decode([0xC3]) == "�"
    assert tokenizer.encode("\ud800") == [ord("?")]
