"""Mix'n'Match on models trained here: maps, sensitivities, extracted models, and the controls that must be worse."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from braniac.model.budget import choose, choose_greedily, parameter_costs, refine
from braniac.model.config import ModelConfig
from braniac.model.data import Batches
from braniac.model.errors import ConfigError
from braniac.model.evaluate import held_out_loss
from braniac.model.gpt import GPT
from braniac.model.mixnmatch import (
    Sensitivities,
    Windows,
    candidate_widths,
    controls,
    enumerate_maps,
    evaluate_maps,
    extract,
    permuted,
    sensitivities,
)
from braniac.model.objective import Mode, ObjectiveSettings
from braniac.model.sources import Corpus
from braniac.model.tiers import is_gain, parameter_shapes, tier_widths
from braniac.model.trainer import Trainer, TrainSettings

SMALL = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, context=16)
LLAMA = dataclasses.replace(SMALL, family="llama", num_attention_heads=4, num_key_value_heads=2)
NESTED = dataclasses.replace(SMALL, num_attention_heads=16, num_key_value_heads=8, head_size=4, nested_heads=True)
TIED = dataclasses.replace(NESTED, family="llama", tie_word_embeddings=True)
each_family = pytest.mark.parametrize(
    "config", [SMALL, LLAMA, NESTED, TIED], ids=("nanogpt", "llama", "nested", "tied")
)

# Learned within seconds, but not without FFNs: a residual stream of 16 cannot tell 128 tokens' successors by itself.
TOY = ModelConfig(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=1,
    head_size=8,
    intermediate_size=64,
    vocab_size=128,
    context=16,
)
STEPS = 80


def batches() -> Batches:
    """Every token has its own successor, which follows it three times out of four."""
    dice = np.random.default_rng(0)
    successors, surprises = dice.integers(0, 128, 128), dice.integers(0, 128, 20_000)
    tokens = np.zeros(20_000, np.uint8)
    for i, surprised in enumerate(dice.random(20_000 - 1) < 0.25):
        tokens[i + 1] = surprises[i] if surprised else successors[tokens[i]]
    corpus = Corpus("made here", (tokens[2000:],), (tokens[:2000],))
    return Batches(corpus, seed=0, peer=b"", context=TOY.context, batch=16)


def trained(mode: Mode) -> GPT:
    settings = TrainSettings(
        batch=16, learning_rate=0.05, warmup_steps=10, total_steps=STEPS, objective=ObjectiveSettings(mode=mode)
    )
    trainer = Trainer(TOY, 0, batches(), settings)
    for _ in range(STEPS):
        trainer.step()
    return trainer.model


@pytest.fixture(scope="module")
def windows() -> Windows:
    return batches().held_out(32)


@pytest.fixture(scope="module")
def nested() -> GPT:
    return trained("joint")


@pytest.fixture(scope="module")
def unnested() -> GPT:
    return trained("fixed")


@pytest.fixture(scope="module")
def measured(nested: GPT, windows: Windows) -> Sensitivities:
    return sensitivities(nested, windows)


def random_model(config: ModelConfig) -> GPT:
    """A model whose zero matrices were filled too."""
    model, dice = GPT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=dice) * 0.2
            p.copy_(1 + values if is_gain(name) else values)
    return model


def some_tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))


def test_candidates_are_the_tiers_and_what_lies_halfway() -> None:
    assert candidate_widths(TOY) == (8, 16, 24, 32, 48, 64)
    whole_only = dataclasses.replace(SMALL, matformer_factor=1)
    assert candidate_widths(whole_only) == (64,)
    uneven = dataclasses.replace(SMALL, intermediate_size=1536)  # 288 is no multiple of 64
    assert candidate_widths(uneven) == (192, 256, 384, 576, 768, 1152, 1536)


def test_enumerated_maps_are_all_there_are() -> None:
    every = enumerate_maps(TOY, (32, 8, 64, 8))
    assert every == list(itertools.product((8, 32, 64), repeat=2))
    wider = [widths for widths in every if list(widths) == sorted(widths)]
    assert enumerate_maps(TOY, (8, 32, 64), order="non-decreasing") == wider
    assert enumerate_maps(TOY, (8, 32, 64), order="non-increasing") == sorted(widths[::-1] for widths in wider)
    assert len(wider) == 6


def test_too_many_maps_are_refused_before_they_are_made() -> None:
    deep = dataclasses.replace(TOY, num_hidden_layers=64)
    with pytest.raises(ConfigError, match=rf"6 widths in 64 layers are {6**64} width maps, more than 10000"):
        enumerate_maps(deep)
    assert len(enumerate_maps(TOY, (8, 64), limit=4)) == 4
    with pytest.raises(ConfigError, match="4 width maps, more than 3"):
        enumerate_maps(TOY, (8, 64), limit=3)
    assert len(enumerate_maps(deep, (8, 64), order="non-increasing", limit=65)) == 65
    with pytest.raises(ConfigError, match="65 width maps, more than 64"):
        enumerate_maps(deep, (8, 64), order="non-increasing", limit=64)


def test_candidates_that_do_not_fit_are_refused(nested: GPT, windows: Windows) -> None:
    for bad in ((8, 12), (72,)):
        with pytest.raises(ConfigError, match=f"width of {bad[-1]} is none of this model's"):
            enumerate_maps(TOY, bad)
        with pytest.raises(ConfigError, match=f"width of {bad[-1]} is none of this model's"):
            sensitivities(nested, windows, bad)
    with pytest.raises(ConfigError, match="name at least one"):
        parameter_costs(TOY, ())


@each_family
@pytest.mark.parametrize("width_map", [(64, 24), (8, 48), 40, None, 16])
def test_an_extracted_model_computes_what_the_universal_one_does(
    config: ModelConfig, width_map: tuple[int, ...] | int | None
) -> None:
    model, tokens = random_model(config), some_tokens()
    part = extract(model, width_map)
    assert part.neurons == model.layer_widths(width_map)
    expected = model(tokens, width_map)
    assert torch.allclose(part(tokens), expected, atol=1e-5)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.allclose(part(tokens), expected, atol=1e-5)


@each_family
def test_a_tier_is_extracted_as_that_tiers_model(config: ModelConfig) -> None:
    model = random_model(config)
    for tier, width_map in ((0, None), (1, 32), (3, (8, 8))):
        part = extract(model, width_map)
        assert part.tier == tier
        assert {name: tuple(p.shape) for name, p in part.named_parameters()} == parameter_shapes(config, tier)
    assert extract(extract(model, (64, 32)), (32, 32)).tier == 1


def test_more_neurons_than_are_held_cannot_be_extracted_or_evaluated(windows: Windows) -> None:
    part = extract(GPT(TOY), (64, 8))
    for widths, message in (
        ((64, 16), "a width of 16 in layer 1 exceeds the 8 neurons"),
        ((64,), "a width map of 1 widths"),
        ((30, 8), "width of 30 is none of this model's"),
        (32, "a width of 32 in layer 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            extract(part, widths)
        with pytest.raises(ConfigError, match=message):
            evaluate_maps(part, [(8, 8), widths], windows)


def test_maps_are_evaluated_in_the_order_given(nested: GPT, windows: Windows) -> None:
    maps = [(64, 16), 8, None]
    losses = evaluate_maps(nested, maps, windows)
    assert losses == [held_out_loss(nested, windows, widths) for widths in maps]
    assert losses[0] == pytest.approx(held_out_loss(extract(nested, maps[0]), windows), rel=1e-5)
    assert len(set(losses)) == 3


def test_sensitivities_narrow_one_layer_at_a_time(nested: GPT, windows: Windows, measured: Sensitivities) -> None:
    assert measured.full_loss == held_out_loss(nested, windows)
    assert [tuple(layer) for layer in measured.layers] == [candidate_widths(TOY)] * 2
    for layer in range(2):
        widths = [64, 64]
        widths[layer] = 16
        loss = held_out_loss(nested, windows, widths)
        assert measured.layers[layer][16] == pytest.approx(loss - measured.full_loss)
        assert measured.expected_loss(widths) == pytest.approx(loss)
        assert measured.layers[layer][64] == 0
        assert measured.layers[layer][8] > measured.layers[layer][32] > 0


def test_the_additive_proxy_ranks_maps_as_their_real_losses_do(
    nested: GPT, windows: Windows, measured: Sensitivities
) -> None:
    maps = enumerate_maps(TOY)
    real = evaluate_maps(nested, maps, windows)
    expected = [measured.expected_loss(widths) for widths in maps]
    ranks = (np.argsort(np.argsort(losses)) for losses in (real, expected))
    assert np.corrcoef(*ranks)[0, 1] > 0.9


def test_a_chosen_map_is_really_good_for_its_size(nested: GPT, windows: Windows, measured: Sensitivities) -> None:
    costs, maps = parameter_costs(TOY), enumerate_maps(TOY)
    losses = dict(zip(maps, evaluate_maps(nested, maps, windows), strict=True))
    for budget_map in ((32, 32), (24, 24), (16, 16)):
        budget = costs.of(budget_map)
        choice = choose(costs, measured, budget)
        assert sum(p.numel() for p in extract(nested, choice.widths).parameters()) == choice.cost <= budget
        assert choice.expected_loss <= choose_greedily(costs, measured, budget).expected_loss
        affordable = sorted(loss for widths, loss in losses.items() if costs.of(widths) <= budget)
        assert losses[choice.widths] <= affordable[len(affordable) // 5]


def test_refining_goes_downhill_by_real_losses_and_stays_within_the_budget(nested: GPT, windows: Windows) -> None:
    costs = parameter_costs(TOY, tier_widths(TOY))
    budget = costs.of((64, 8))
    start = (8, 32)
    found, loss = refine(nested, costs, start, budget, windows)
    assert costs.of(found) <= budget
    every = [widths for widths in enumerate_maps(TOY, tier_widths(TOY)) if costs.of(widths) <= budget]
    losses = dict(zip(every, evaluate_maps(nested, every, windows), strict=True))
    assert loss == losses[found] < losses[start]
    near = [w for w in every if (w[0] == found[0]) != (w[1] == found[1]) or w == found[::-1]]
    assert loss <= min(losses[widths] for widths in near)
    assert refine(nested, costs, start, budget, windows, rounds=0) == (start, losses[start])
    with pytest.raises(ConfigError, match="allows no width map"):
        refine(nested, costs, start, 1, windows)


@each_family
def test_the_permutation_shuffles_every_narrow_width_but_not_the_whole(config: ModelConfig) -> None:
    model, tokens = random_model(config), some_tokens()
    twin = permuted(model, seed=3)
    assert torch.allclose(twin(tokens), model(tokens), atol=1e-4)
    assert not torch.allclose(twin(tokens, 32), model(tokens, 32), atol=1e-2)
    assert torch.equal(permuted(model, seed=3)(tokens, 32), twin(tokens, 32))
    assert not torch.equal(permuted(model, seed=4)(tokens, 32), twin(tokens, 32))


def test_without_nesting_or_in_random_order_the_same_maps_are_clearly_worse(
    nested: GPT, unnested: GPT, windows: Windows
) -> None:
    maps = [(64, 64), (8, 8), (8, 24), (24, 8), (16, 16)]
    whole, *narrow = controls(nested, maps, windows, seed=0, unnested=unnested)
    assert whole.widths == (64, 64)
    assert whole.permuted_loss == pytest.approx(whole.loss, rel=1e-4)
    assert whole.unnested_loss is not None
    assert whole.unnested_loss == pytest.approx(whole.loss, rel=0.05)
    for control in narrow:
        assert control.unnested_loss is not None
        assert control.permuted_loss > control.loss + 0.1
        assert control.unnested_loss > control.loss + 0.1
    assert all(control.loss < math.log(128) for control in narrow)


def test_a_control_without_another_model_says_nothing_of_it(nested: GPT, windows: Windows) -> None:
    (control,) = controls(nested, [8], windows, seed=0)
    assert control.widths == (8, 8)
    assert control.unnested_loss is None
