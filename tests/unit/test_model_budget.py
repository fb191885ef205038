"""Choosing a width map under a budget: counted costs, the exact choice against brute force, the greedy check."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braniac.model import budget as budget_module
from braniac.model.budget import Choice, CostTable, choose, choose_greedily, flop_costs, parameter_costs
from braniac.model.config import ModelConfig
from braniac.model.errors import ConfigError
from braniac.model.gpt import GPT
from braniac.model.mixnmatch import Sensitivities, enumerate_maps, extract

SMALL = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, context=16)
LLAMA = dataclasses.replace(SMALL, family="llama", num_attention_heads=4, num_key_value_heads=2)
NESTED = dataclasses.replace(SMALL, num_attention_heads=16, num_key_value_heads=8, head_size=4, nested_heads=True)
TIED = dataclasses.replace(NESTED, family="llama", tie_word_embeddings=True)
FAMILIES = ("nanogpt", "llama", "nested", "tied")
WIDTHS = (8, 16, 24, 32)


@st.composite
def problems(draw: st.DrawFn) -> tuple[CostTable, Sensitivities]:
    """A few layers and widths, with small whole costs (many ties) or arbitrary ones, and increases of either sign."""
    layers, widths = draw(st.integers(1, 4)), WIDTHS[: draw(st.integers(1, 4))]
    cost: st.SearchStrategy[float] = draw(st.sampled_from([st.integers(0, 6), st.floats(0, 1, width=32)]))
    loss: st.SearchStrategy[float] = draw(st.sampled_from([st.integers(-1, 5), st.floats(-1, 5, width=32)]))
    tables = [{width: (draw(cost), draw(loss)) for width in widths} for _ in range(layers)]
    costs = CostTable(
        unit="coins", layers=tuple({w: pair[0] for w, pair in t.items()} for t in tables), fixed=draw(cost)
    )
    proxy = Sensitivities(layers=tuple({w: float(pair[1]) for w, pair in t.items()} for t in tables), full_loss=3.0)
    return costs, proxy


def all_choices(costs: CostTable, proxy: Sensitivities) -> list[Choice]:
    return [
        Choice(widths=widths, cost=costs.of(widths), expected_loss=proxy.expected_loss(widths))
        for widths in itertools.product(*costs.layers)
    ]


@given(problems(), st.floats(0, 1))
def test_the_choice_is_the_best_of_all_maps_within_the_budget(
    problem: tuple[CostTable, Sensitivities], share: float
) -> None:
    costs, proxy = problem
    choices = all_choices(costs, proxy)
    cheapest, dearest = min(c.cost for c in choices), max(c.cost for c in choices)
    budget = max(cheapest, cheapest + share * (dearest - cheapest))
    best = min((c for c in choices if c.cost <= budget), key=lambda c: (c.expected_loss, c.cost))
    found, greedy = choose(costs, proxy, budget), choose_greedily(costs, proxy, budget)
    assert (found.expected_loss, found.cost) == (best.expected_loss, best.cost)
    assert found in choices
    assert greedy in choices
    assert greedy.cost <= budget
    assert greedy.expected_loss >= found.expected_loss


@given(problems(), st.lists(st.floats(0, 30), min_size=2, max_size=6))
def test_more_budget_is_never_worse(problem: tuple[CostTable, Sensitivities], extras: list[float]) -> None:
    costs, proxy = problem
    cheapest = min(choice.cost for choice in all_choices(costs, proxy))
    losses = [choose(costs, proxy, cheapest + extra).expected_loss for extra in sorted(extras)]
    assert losses == sorted(losses, reverse=True)


@given(problems())
def test_an_impossible_budget_names_the_smallest_possible_cost(problem: tuple[CostTable, Sensitivities]) -> None:
    costs, proxy = problem
    cheapest = min(choice.cost for choice in all_choices(costs, proxy))
    assert choose(costs, proxy, cheapest).cost == cheapest
    for search in (choose, choose_greedily):
        for budget in (math.nextafter(cheapest, -math.inf), -1, math.nan):
            with pytest.raises(ConfigError, match=r"^a budget of .* coins allows no width map") as caught:
                search(costs, proxy, budget)
            assert f"give at least {cheapest}, " in str(caught.value)


def test_greed_can_be_beaten() -> None:
    # The best gain per cost is to widen the second layer a little; then nothing else is affordable.
    costs = CostTable(unit="coins", layers=({8: 0, 16: 10}, {8: 0, 16: 1}), fixed=0)
    proxy = Sensitivities(full_loss=1.0, layers=({8: 1.0, 16: 0.0}, {8: 0.2, 16: 0.0}))
    assert choose_greedily(costs, proxy, 10).widths == (8, 16)
    assert choose(costs, proxy, 10) == Choice(widths=(16, 8), cost=10, expected_loss=1.2)


def test_too_many_combinations_are_thinned_out_and_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every increase is what was saved, in powers of two: all 256 combinations are worth considering.
    layers = tuple({8: 0.0, 16: 2.0**power} for power in range(8))
    costs = CostTable(unit="coins", layers=layers, fixed=0)
    proxy = Sensitivities(full_loss=300.0, layers=tuple({w: -cost for w, cost in layer.items()} for layer in layers))
    exact = [choose(costs, proxy, budget).cost for budget in range(256)]
    assert exact == list(range(256))
    monkeypatch.setattr(budget_module, "MAX_COMBINATIONS", 8)
    thinned = [choose(costs, proxy, budget).cost for budget in range(256)]
    assert all(cost <= budget for budget, cost in enumerate(thinned))
    assert thinned != exact
    assert sum(thinned) > 0.8 * sum(exact)


@pytest.mark.parametrize("config", [SMALL, LLAMA, NESTED, TIED], ids=FAMILIES)
def test_parameter_costs_are_what_extracted_models_hold(config: ModelConfig) -> None:
    costs, model = parameter_costs(config), GPT(config)
    for widths in enumerate_maps(config):
        assert costs.of(widths) == sum(p.numel() for p in extract(model, widths).parameters())


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        # Per layer: rows of q and of k, of FFN matrices, heads times their size; each layer's width is 8 and 48.
        (SMALL, [(32, 32, 2 * 8, 32), (32, 32, 2 * 48, 32)]),
        (LLAMA, [(32, 16, 3 * 8, 32), (32, 16, 3 * 48, 32)]),
        (NESTED, [(8, 4, 2 * 8, 8), (48, 24, 2 * 48, 48)]),
        (TIED, [(8, 4, 3 * 8, 8), (48, 24, 3 * 48, 48)]),
    ],
    ids=FAMILIES,
)
def test_flop_costs_count_every_multiply_add_twice(
    config: ModelConfig, layers: list[tuple[int, int, int, int]]
) -> None:
    attended, head = 11, 256 * 32
    multiply_adds = head + sum(32 * (2 * q + 2 * k + ffn) + 2 * heads * attended for q, k, ffn, heads in layers)
    assert flop_costs(config, attended, (8, 48)).of((8, 48)) == 2 * multiply_adds


def test_attention_to_nothing_or_to_more_than_the_context_has_no_cost() -> None:
    for attended in (0, 17):
        with pytest.raises(ConfigError, match=f"attend to {attended} tokens: choose from 1 to 16"):
            flop_costs(SMALL, attended)


@pytest.mark.parametrize(
    ("layers", "fixed", "message"),
    [
        (({8: math.nan},), 0, "a cost of nan coins"),
        (({8: 1}, {8: -1}), 0, "a cost of -1 coins"),
        (({8: 1},), math.inf, "a cost of inf coins"),
        (({8: 1}, {}), 0, "layer 1 has no coins"),
        (({8: 1 << 52}, {8: 1 << 52}), 1, "larger unit"),
    ],
)
def test_costs_that_cannot_be_added_up_are_refused(
    layers: tuple[dict[int, float], ...], fixed: float, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        CostTable(unit="coins", layers=layers, fixed=fixed)


def test_a_sensitivity_that_is_not_finite_is_refused() -> None:
    for full_loss, increase in ((math.nan, 0.0), (1.0, math.inf)):
        with pytest.raises(ConfigError, match="load weights"):
            Sensitivities(full_loss=full_loss, layers=({8: increase},))


def test_costs_and_sensitivities_of_different_models_or_widths_are_refused() -> None:
    costs = CostTable(unit="coins", layers=({8: 1}, {8: 1, 16: 2}), fixed=0)
    with pytest.raises(ConfigError, match="costs of 2 layers and sensitivities of 1"):
        choose(costs, Sensitivities(full_loss=1.0, layers=({8: 0.0},)), 9)
    with pytest.raises(ConfigError, match=r"layer 1 has costs for the widths \[8, 16\] but sensitivities for \[8\]"):
        choose(costs, Sensitivities(full_loss=1.0, layers=({8: 0.0}, {8: 0.0})), 9)
    with pytest.raises(ConfigError, match="layer 1 has no coins for width 24: choose from 8, 16"):
        costs.of((8, 24))
