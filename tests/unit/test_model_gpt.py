"""The network: shapes, causality, nesting of tiers; the FFN; evaluation and decoding."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from braniac.model.attention import KVCache, rotate
from braniac.model.config import ModelConfig
from braniac.model.decoding import generate
from braniac.model.errors import ModelError
from braniac.model.evaluate import held_out_loss
from braniac.model.ffn import MatFormerFFN
from braniac.model.gpt import GPT
from braniac.model.tiers import WidthMap, is_gain, is_sliced, layer_of, parameter_shapes, rows_at

SMALL = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, context=16)
LLAMA = dataclasses.replace(SMALL, family="llama", num_attention_heads=4, num_key_value_heads=2)
NESTED = dataclasses.replace(SMALL, num_attention_heads=16, num_key_value_heads=8, head_size=4, nested_heads=True)
TIED = dataclasses.replace(NESTED, family="llama", tie_word_embeddings=True)
PLAIN = dataclasses.replace(
    SMALL, qk_norm=False, embedding_norm=False, activation="gelu", logit_softcap=0.0, zero_outputs=False
)
RICH = dataclasses.replace(SMALL, value_embeddings=1, skip_connections=True)
FAMILIES = {"nanogpt": SMALL, "llama": LLAMA, "nested": NESTED, "tied": TIED, "plain": PLAIN, "rich": RICH}
each_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())


def random_model(tier: int = 0, config: ModelConfig = SMALL) -> GPT:
    """A model whose zero matrices were filled too, identically on all tiers."""
    model = GPT(config, tier)
    whole = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(parameter_shapes(config, 0)[name], generator=whole)[: p.shape[0]] * 0.2
            p.copy_(1 + values if is_gain(name) else values)
    return model


def some_tokens(batch: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(1))


@each_family
def test_a_fresh_model_predicts_uniformly(config: ModelConfig) -> None:
    model = GPT(config, 0)
    model.init_weights(seed=0)
    tokens = some_tokens()
    assert model(tokens).shape == (2, 16, 256)
    if not config.tie_word_embeddings and config.zero_outputs:  # the head is zero
        assert model.loss(tokens, tokens).item() == pytest.approx(math.log(256), abs=1e-5)


@each_family
def test_the_future_does_not_reach_the_past(config: ModelConfig) -> None:
    model, tokens = random_model(config=config), some_tokens()
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


@pytest.mark.parametrize("config", [SMALL, PLAIN])
def test_logits_stay_below_the_softcap_if_there_is_one(config: ModelConfig) -> None:
    model = random_model(config=config)
    assert model.lm_head is not None
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    assert (model(some_tokens()).abs().max() <= 15.0) == (config.softcap is not None)


@pytest.mark.parametrize(
    "change",
    [{"qk_norm": False}, {"embedding_norm": False}, {"activation": "gelu"}, {"logit_softcap": 0.0}],
    ids=lambda change: next(iter(change)),
)
def test_each_switch_changes_what_the_same_weights_compute(change: dict[str, Any]) -> None:
    tokens, expected = some_tokens(), random_model()(some_tokens())
    assert not torch.allclose(random_model(config=dataclasses.replace(SMALL, **change))(tokens), expected, atol=1e-2)


def test_a_value_embedding_adds_a_row_per_token_to_the_values_of_its_two_layers() -> None:
    config = dataclasses.replace(SMALL, num_hidden_layers=5, value_embeddings=2)
    model, tokens = random_model(config=config), some_tokens()
    extras, table = [], dict(model.named_parameters())
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda _, arguments: extras.append(arguments[5]))
    model(tokens)
    for extra, number in zip(extras, (0, 1, None, 0, 1), strict=True):
        wanted = None if number is None else table[f"model.value_embeds.{number}.weight"][tokens]
        assert (extra is None and wanted is None) or torch.equal(extra, wanted)


def test_a_skip_connection_brings_a_layer_the_input_of_its_mirror_image() -> None:
    config = dataclasses.replace(SMALL, num_hidden_layers=5, skip_connections=True)
    model, tokens = random_model(config=config), some_tokens()
    inputs, outputs = [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    model(tokens)
    assert model.model.skips is not None
    gains = model.model.skips.weight
    assert gains.shape == (2, 32)
    for layer in (1, 2):
        assert torch.equal(inputs[layer], outputs[layer - 1])
    for layer, mirror in ((3, 1), (4, 0)):
        assert torch.allclose(inputs[layer], outputs[layer - 1] + gains[mirror] * inputs[mirror])


@each_family
@pytest.mark.parametrize("tier", [1, 2, 3])
def test_a_tier_computes_what_the_whole_model_computes_at_its_width(config: ModelConfig, tier: int) -> None:
    whole, part, tokens = random_model(config=config), random_model(tier, config), some_tokens()
    assert torch.allclose(part(tokens), whole(tokens, config.intermediate_size >> tier), atol=1e-5)
    assert not torch.allclose(part(tokens), whole(tokens), atol=1e-2)


@each_family
@pytest.mark.parametrize("widths", [(8, 8), (24, 40)])
def test_gradients_beyond_the_width_are_exactly_zero(config: ModelConfig, widths: tuple[int, int]) -> None:
    model, tokens = random_model(config=config), some_tokens()
    model.loss(tokens, tokens, widths).backward()  # type: ignore[no-untyped-call]
    sliced = 0
    for name, p in model.named_parameters():
        layer = layer_of(name)
        if layer is not None and is_sliced(config, name):
            rows = rows_at(config, name, widths[layer])
            assert p.grad is not None
            assert p.grad[:rows].any()
            assert not p.grad[rows:].any()
            sliced += rows < len(p)
    assert sliced == 2 * ((3 if config.gated else 2) + (4 if config.nested_heads else 0))


def test_a_width_map_uses_each_layers_own_width() -> None:
    model, tokens = random_model(), some_tokens()
    mixed = model(tokens, (64, 8))
    assert torch.equal(model(tokens, (64, 64)), model(tokens))
    assert not torch.allclose(mixed, model(tokens), atol=1e-2)
    assert not torch.allclose(mixed, model(tokens, 8), atol=1e-2)


@each_family
def test_a_model_with_a_width_per_layer_computes_the_same_as_the_map(config: ModelConfig) -> None:
    whole, tokens = random_model(config=config), some_tokens()
    part = GPT(config, neurons=(64, 24))
    with torch.no_grad():
        held = dict(whole.named_parameters())
        for name, p in part.named_parameters():
            p.copy_(held[name][: p.shape[0]])
    assert torch.allclose(part(tokens), whole(tokens, (64, 24)), atol=1e-5)
    assert torch.allclose(part(tokens, 24), whole(tokens, 24), atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_all_granularities_of_one_input_equal_one_at_a_time(gated: bool) -> None:
    ffn = MatFormerFFN(6, 16, (16, 8, 4), gated=gated)
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in ffn.parameters():
            p.copy_(torch.randn(p.shape, generator=dice))
    x_BTD = torch.randn(2, 3, 6, generator=dice)
    for asked in ((16, 8, 4), (3, 16, 3)):
        for width, nested in zip(asked, ffn.nested(x_BTD, asked), strict=True):
            assert torch.allclose(nested, ffn(x_BTD, width), atol=1e-4)
    assert len(ffn.nested(x_BTD)) == 3


@each_family
@pytest.mark.parametrize("widths", [None, 24, (8, 64)])
def test_a_cache_changes_nothing_but_the_work(config: ModelConfig, widths: WidthMap) -> None:
    model, tokens = random_model(config=config), some_tokens()
    cache = KVCache(config, 2, 16)
    with torch.no_grad():
        whole = model(tokens, widths)
        parts = [model(tokens[:, a:b], widths, cache) for a, b in ((0, 5), (5, 6), (6, 9), (9, 16))]
        assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-4)
        cache.truncate(7)
        assert torch.allclose(model(tokens[:, 7:12], widths, cache), whole[:, 7:12], atol=1e-4)
        cache.select(torch.tensor([1, 1]))
        again = model(tokens[[1, 1], 12:], widths, cache)
        assert torch.allclose(again[0], whole[1, 12:], atol=1e-4)


@each_family
def test_recomputing_layers_gives_the_same_gradients(config: ModelConfig) -> None:
    model, tokens = random_model(config=config), some_tokens()
    gradients = []
    for recomputed in range(config.num_hidden_layers + 1):
        model.model.recomputed_layers = recomputed
        model.zero_grad()
        model.loss(tokens, tokens, (24, 64)).backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for other in gradients for a, b in zip(gradients[0], other, strict=True))
    assert len(gradients[0]) == len(list(model.parameters()))


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
