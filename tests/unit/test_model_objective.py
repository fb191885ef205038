"""The training modes: which widths a step trains and how much each counts, and the gradient that comes of it."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from braniac.model.config import ModelConfig
from braniac.model.data import Batches
from braniac.model.errors import ConfigError
from braniac.model.gpt import GPT
from braniac.model.objective import Objective, ObjectiveSettings, Term, backward
from braniac.model.sources import Corpus
from braniac.model.trainer import Trainer, TrainSettings

CONFIG = ModelConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, context=8)
WIDTHS = (64, 32, 16, 8)
MODES = ("fixed", "sampled", "sandwich", "joint", "layers")


def objective_of(mode: str, tier: int = 0, seed: int = 0, peer: bytes = b"peer", **values: object) -> Objective:
    return Objective(ObjectiveSettings(mode=mode, **values), CONFIG, tier, seed, peer)  # type: ignore[arg-type]


def drawn(objective: Objective, steps: int = 64) -> list[list[Term]]:
    return [objective.terms(step) for step in range(steps)]


def uniform(width: int) -> tuple[int, ...]:
    return (width,) * CONFIG.num_hidden_layers


# --- which widths, and with what weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("tier", range(4))
def test_fixed_trains_all_that_is_held_and_nothing_else(tier: int) -> None:
    assert drawn(objective_of("fixed", tier), 8) == [[Term(uniform(WIDTHS[tier]), 1.0)]] * 8


@pytest.mark.parametrize("mode", MODES)
def test_whoever_holds_the_smallest_tier_only_trains_that(mode: str) -> None:
    assert drawn(objective_of(mode, 3, subwidth_fraction=1.0), 8) == [[Term(uniform(8), 1.0)]] * 8


@settings(max_examples=60)
@given(
    mode=st.sampled_from(MODES),
    tier=st.integers(0, 3),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**40),
    fraction=st.floats(0, 1),
    between=st.integers(0, 5),
)
def test_in_every_mode_the_weights_sum_to_one_and_the_widest_comes_first(
    mode: str, tier: int, seed: int, step: int, fraction: float, between: int
) -> None:
    terms = objective_of(mode, tier, seed, subwidth_fraction=fraction, sandwich_random=between).terms(step)
    assert sum(term.weight for term in terms) == pytest.approx(1)
    assert all(term.weight > 0 and set(term.widths) <= set(WIDTHS[tier:]) for term in terms)
    assert [len(term.widths) for term in terms] == [3] * len(terms)
    assert [term.widths for term in terms] == sorted({term.widths for term in terms}, reverse=True)


@pytest.mark.parametrize("mode", ["sampled", "sandwich", "layers"])
def test_what_is_drawn_depends_on_seed_peer_and_step_alone(mode: str) -> None:
    one = drawn(objective_of(mode, subwidth_fraction=0.5))
    assert drawn(objective_of(mode, subwidth_fraction=0.5)) == one
    assert objective_of(mode, subwidth_fraction=0.5).terms(37) == one[37]
    assert len(set(map(tuple, one))) > 1
    assert drawn(objective_of(mode, seed=1, subwidth_fraction=0.5)) != one
    assert drawn(objective_of(mode, peer=b"other", subwidth_fraction=0.5)) != one


@pytest.mark.parametrize("mode", ["sampled", "layers"])
def test_the_share_of_narrow_steps(mode: str) -> None:
    whole = [[Term(uniform(64), 1.0)]]
    assert drawn(objective_of(mode, subwidth_fraction=0.0)) == whole * 64
    shares = [drawn(objective_of(mode, subwidth_fraction=f), 400).count(whole[0]) / 400 for f in (0.25, 0.75)]
    assert shares == [pytest.approx(0.75, abs=0.07), pytest.approx(0.25, abs=0.07)]


def test_a_sampled_narrow_step_draws_each_narrower_tier_alike() -> None:
    widths = [term.widths for (term,) in drawn(objective_of("sampled", subwidth_fraction=1.0), 300)]
    assert {width: widths.count(uniform(width)) for width in WIDTHS[1:]} == {
        width: pytest.approx(100, abs=25) for width in WIDTHS[1:]
    }


def test_a_narrow_step_of_layers_draws_a_width_for_every_layer_by_itself() -> None:
    maps = [term.widths for (term,) in drawn(objective_of("layers", subwidth_fraction=1.0), 300)]
    for layer in range(3):
        counts = [[widths[layer] for widths in maps].count(width) for width in WIDTHS]
        assert counts == [pytest.approx(75, abs=25)] * 4
    pairs = {(widths[0], widths[1]) for widths in maps}
    assert len(pairs) == 16  # one layer's width says nothing about the next one's


@pytest.mark.parametrize(("between", "count"), [(0, 2), (1, 3), (2, 4), (5, 4)])
def test_a_sandwich_has_the_widest_the_narrowest_and_so_many_between(between: int, count: int) -> None:
    steps = drawn(objective_of("sandwich", sandwich_random=between))
    for terms in steps:
        widths = [term.widths for term in terms]
        assert (widths[0], widths[-1], len(set(widths))) == (uniform(64), uniform(8), count)
        assert {term.weight for term in terms} == {1 / count}
    if between == 1:
        assert {terms[1].widths for terms in steps} == {uniform(32), uniform(16)}


def test_joint_trains_every_tier_that_is_held_all_alike() -> None:
    assert objective_of("joint").terms(5) == [Term(uniform(width), 0.25) for width in WIDTHS]
    assert objective_of("joint", 2).terms(5) == [Term(uniform(width), 0.5) for width in WIDTHS[2:]]


@pytest.mark.parametrize("mode", ["sandwich", "joint"])
def test_mixed_maps_lie_between_two_neighbouring_tiers_and_weigh_as_much_as_the_others(mode: str) -> None:
    steps = drawn(objective_of(mode, mixed_maps=2, mixed_weight=1.0), 300)
    plain = drawn(objective_of(mode), 300)
    maps = []
    for terms, without in zip(steps, plain, strict=True):
        assert [term.widths for term in terms[:-2]] == [term.widths for term in without]
        assert [term.weight for term in terms] == [pytest.approx(1 / len(terms))] * len(terms)
        maps += [term.widths for term in terms[-2:]]
    pairs = [{64, 32}, {32, 16}, {16, 8}]
    assert all(any(set(widths) <= pair for pair in pairs) for widths in maps)
    # Three pairs with eight maps each, of which the uniform ones between two pairs are the same.
    assert len(set(maps)) == 3 * 8 - 2
    assert len({terms[-1].widths == terms[-2].widths for terms in steps}) == 2  # the two maps are drawn apart


def test_mixed_maps_keep_the_shares_of_the_tiers() -> None:
    terms = objective_of("joint", alphas=(6.0, 2.0, 0.0, 0.0), mixed_maps=1, mixed_weight=1.0).terms(0)
    assert [term.weight for term in terms] == pytest.approx([0.5, 1 / 6, 1 / 3])
    lighter = objective_of("joint", mixed_maps=2, mixed_weight=0.5).terms(0)
    assert [term.weight for term in lighter] == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.1, 0.1])
    assert len(objective_of("joint", mixed_maps=2, mixed_weight=0.0).terms(0)) == 4


def test_the_weights_of_joint_count_as_shares_and_a_weight_of_zero_costs_nothing() -> None:
    objective = objective_of("joint", alphas=(4.0, 0.0, 2.0, 2.0))
    assert objective.alphas(0) == [0.5, 0.0, 0.25, 0.25]
    assert objective.terms(0) == [Term(uniform(64), 0.5), Term(uniform(16), 0.25), Term(uniform(8), 0.25)]


def test_a_curriculum_moves_the_weights_in_a_straight_line() -> None:
    objective = objective_of(
        "joint", alphas=(1.0, 0.0, 0.0, 0.0), final_alphas=(2.0, 2.0, 2.0, 2.0), curriculum_steps=10
    )
    assert objective.terms(0) == [Term(uniform(64), 1.0)]
    assert objective.alphas(5) == pytest.approx([0.625, 0.125, 0.125, 0.125])
    assert objective.alphas(10) == objective.alphas(1000) == [0.25] * 4
    assert all(sum(objective.alphas(step)) == pytest.approx(1) for step in range(12))


def test_without_a_length_the_curriculum_is_at_its_end() -> None:
    objective = objective_of("joint", alphas=(1.0, 0.0, 0.0, 0.0), final_alphas=(0.0, 0.0, 0.0, 1.0))
    assert objective.terms(0) == [Term(uniform(8), 1.0)]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"mode": "all"}, "objective.mode is 'all': it must be one of fixed, sampled, sandwich, joint, layers"),
        ({"subwidth_fraction": 1.5}, "objective.subwidth_fraction is 1.5"),
        ({"subwidth_fraction": math.nan}, "objective.subwidth_fraction is nan"),
        ({"sandwich_random": -1}, "objective.sandwich_random"),
        ({"curriculum_steps": -1}, "objective.curriculum_steps is -1: it must not be negative"),
        ({"mixed_maps": -1}, "objective.mixed_maps is -1: it must not be negative"),
        ({"alphas": (1.0, -1.0)}, r"objective.alphas is \(1.0, -1.0\)"),
        ({"alphas": (0.0, 0.0)}, "not all 0"),
        ({"final_alphas": (1.0, math.inf)}, "objective.final_alphas"),
        ({"kl_weight": -0.5}, "objective.kl_weight is -0.5"),
        ({"mixed_weight": -0.5}, "objective.mixed_weight is -0.5"),
        ({"kl_weight": math.nan}, "objective.kl_weight is nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, object], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        ObjectiveSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["alphas", "final_alphas"])
def test_weights_for_another_number_of_tiers_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"objective.{name} has 4 weights: give one for each of the 3 tiers held"):
        objective_of("joint", 1, **{name: (1.0, 1.0, 1.0, 1.0)})


# --- the gradient ----------------------------------------------------------------------------------------------------


def model_of(family: str = "nanogpt", **ingredients: Any) -> GPT:
    """Float64, with weights that are nowhere zero."""
    config = ModelConfig(
        family=family, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, context=8,
        vocab_size=32, **ingredients,
    )  # fmt: skip
    model = GPT(config).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3, generator=generator)
    return model


def batch_of(model: GPT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    tokens, targets = torch.randint(model.config.vocab_size, (2, 2, 8), generator=generator)
    return tokens, targets


def gradient_of(model: GPT, terms: list[Term], kl_weight: float = 0.0) -> dict[str, Tensor]:
    model.zero_grad()
    backward(model, *batch_of(model), terms, kl_weight)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


TERMS = [Term((64, 64, 64), 0.5), Term((32, 16, 64), 0.3), Term((8, 8, 8), 0.2)]


RICH: dict[str, Any] = {"value_embeddings": 1, "skip_connections": True}


@pytest.mark.parametrize(("family", "ingredients"), [("nanogpt", {}), ("llama", {}), ("nanogpt", RICH)])
def test_the_gradient_of_a_step_is_the_weighted_sum_of_its_terms(family: str, ingredients: dict[str, Any]) -> None:
    model = model_of(family, **ingredients)
    together = gradient_of(model, TERMS)
    apart = [gradient_of(model, [Term(term.widths, 1.0)]) for term in TERMS]
    for name, gradient in together.items():
        wanted = sum(term.weight * part[name] for term, part in zip(TERMS, apart, strict=True))
        torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ingredients", [{}, RICH])
def test_the_losses_told_are_the_plain_ones(ingredients: dict[str, Any]) -> None:
    model = model_of(**ingredients)
    tokens, targets = batch_of(model)
    wanted = [model.loss(tokens, targets, term.widths).item() for term in TERMS]
    assert backward(model, tokens, targets, TERMS, 0.7) == pytest.approx(wanted)


def weighted_loss(model: GPT, kl_weight: float, teacher: np.ndarray | None) -> tuple[float, np.ndarray]:
    """Of TERMS, with NumPy from the logits on; and the widest's probabilities, [tokens, vocabulary]."""
    tokens, targets = batch_of(model)
    total = 0.0
    for number, term in enumerate(TERMS):
        with torch.no_grad():
            logits = model(tokens, term.widths).flatten(0, 1).numpy()
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        loss = -np.log(probabilities[np.arange(len(logits)), targets.flatten().numpy()]).mean()
        if number == 0:
            teacher = probabilities if teacher is None else teacher
        else:
            assert teacher is not None
            loss += kl_weight * (teacher * np.log(teacher / probabilities)).sum(axis=1).mean()
        total += term.weight * float(loss)
    assert teacher is not None
    return total, teacher


@pytest.mark.parametrize("ingredients", [{}, RICH])
def test_the_gradient_pulls_the_narrow_towards_the_widest_which_is_held_still(ingredients: dict[str, Any]) -> None:
    model, kl_weight, step = model_of(**ingredients), 0.7, 1e-5
    gradient = gradient_of(model, TERMS, kl_weight)
    _, teacher = weighted_loss(model, kl_weight, None)
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        everybodys = p.shape[1] * min(8, len(p))  # values that any width has
        flat, place = p.detach().view(-1), int(torch.randint(everybodys, (), generator=generator))
        value = flat[place].item()
        losses = []
        for moved in (value + step, value - step):
            flat[place] = moved
            losses.append(weighted_loss(model, kl_weight, teacher)[0])
        flat[place] = value
        wanted = (losses[0] - losses[1]) / (2 * step)
        assert gradient[name].view(-1)[place].item() == pytest.approx(wanted, rel=1e-5, abs=1e-8), name


def test_the_pull_makes_a_difference_only_to_the_narrow() -> None:
    model = model_of()
    without, pulled = (gradient_of(model, TERMS, kl_weight) for kl_weight in (0.0, 0.7))
    name = "model.layers.0.mlp.up_proj.weight"  # its rows from 32 on belong to the widest alone
    assert torch.equal(pulled[name][32:], without[name][32:])
    assert not torch.equal(pulled[name][:32], without[name][:32])
    alone = [TERMS[0]]
    assert all(torch.equal(p, gradient_of(model, alone)[n]) for n, p in gradient_of(model, alone, 0.7).items())


@pytest.mark.parametrize("kl_weight", [0.0, 0.7])
def test_recomputing_layers_changes_nothing_in_the_gradient(kl_weight: float) -> None:
    kept, recomputed = model_of("llama"), model_of("llama")
    recomputed.model.recomputed_layers = CONFIG.num_hidden_layers
    one, two = gradient_of(kept, TERMS, kl_weight), gradient_of(recomputed, TERMS, kl_weight)
    assert one.keys() == two.keys()
    assert all(torch.equal(gradient, two[name]) for name, gradient in one.items())


def test_rows_beyond_every_width_of_the_step_have_a_gradient_of_exactly_zero() -> None:
    gradient = gradient_of(model_of(), [Term((32, 8, 16), 1.0)], 0.7)
    for layer, width in enumerate((32, 8, 16)):
        for kind in ("up", "down"):
            rows = gradient[f"model.layers.{layer}.mlp.{kind}_proj.weight"]
            assert rows[:width].any()
            assert not rows[width:].any()


@pytest.mark.parametrize("mode", MODES)
def test_a_trainer_takes_every_mode(mode: str) -> None:
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 20, np.uint8)
    objective = ObjectiveSettings(mode=mode, subwidth_fraction=1.0, kl_weight=0.5)  # type: ignore[arg-type]
    settings = TrainSettings(batch=2, warmup_steps=2, check_gradients=True, objective=objective)
    trainer = Trainer(CONFIG, 0, Batches(Corpus("fox", (text,), ()), 0, b"peer", 8, 2), settings)
    before = copy.deepcopy(trainer.state()[0])
    for step in range(3):
        terms = trainer.objective.terms(step)
        result = trainer.step()
        assert len(result.losses) == len(terms)
        assert result.loss == result.losses[0]
        assert result.widths == tuple(max(term.widths[layer] for term in terms) for layer in range(3))
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not torch.equal(trainer.params[name], before[name])
