"""Sorting neurons: planted ones are found, scores against slower ways to compute them, the whole function kept."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from braniac.model.config import ModelConfig
from braniac.model.convert import KINDS, ConversionReport, Kind, importance, orderings, reorder_, report
from braniac.model.data import Batches
from braniac.model.errors import CheckpointError, ConfigError
from braniac.model.evaluate import held_out_loss
from braniac.model.gpt import GPT, Block
from braniac.model.objective import ObjectiveSettings
from braniac.model.sources import Corpus
from braniac.model.tiers import is_gain
from braniac.model.trainer import Trainer, TrainSettings

SMALL = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, context=16)
LLAMA = dataclasses.replace(SMALL, family="llama", num_attention_heads=4, num_key_value_heads=2)
NESTED = dataclasses.replace(SMALL, num_attention_heads=16, num_key_value_heads=8, head_size=4, nested_heads=True)
TIED = dataclasses.replace(NESTED, family="llama", tie_word_embeddings=True)
RICH = dataclasses.replace(SMALL, value_embeddings=1, skip_connections=True)
FAMILIES = {"nanogpt": SMALL, "llama": LLAMA, "nested": NESTED, "tied": TIED, "rich": RICH}
each_family = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
MEASURED: tuple[Kind, ...] = ("norm", "activation", "fisher")
PLANTED = [3, 11, 20, 31, 40, 47, 55, 62]


def random_model(config: ModelConfig = SMALL, neurons: tuple[int, ...] | None = None) -> GPT:
    """A model whose every value is random, the gains of its norms around one."""
    model, dice = GPT(config, neurons=neurons), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            values = torch.randn(p.shape, generator=dice) * 0.2
            p.copy_(1 + values if is_gain(name) else values)
    return model


def some_windows(count: int = 20) -> tuple[Tensor, Tensor]:
    """More than are evaluated at once."""
    dice = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 16), generator=dice), torch.randint(0, 256, (count, 16), generator=dice)


def blocks(model: GPT) -> list[Block]:
    return [block for block in model.model.layers if isinstance(block, Block)]


def per_unit(matrix: Tensor, units: int) -> Tensor:
    """[rows, D] -> [units, rows of a unit, D]"""
    return matrix.detach().view(units, -1, matrix.shape[1])


def plant(model: GPT) -> dict[str, list[int]]:
    """Make all neurons of every layer but a few much quieter, and the key-value heads but one if they are nested."""
    planted = {}
    with torch.no_grad():
        for layer, block in enumerate(blocks(model)):
            planted[f"model.layers.{layer}.mlp"] = PLANTED
            block.mlp.down_proj.weight *= 0.02
            block.mlp.down_proj.weight[PLANTED] *= 50
            if model.config.nested_heads:
                planted[f"model.layers.{layer}.self_attn"] = [5]
                block.self_attn.o_proj.weight *= 0.02
                per_unit(block.self_attn.o_proj.weight, 8)[5] *= 50
    return planted


@each_family
@pytest.mark.parametrize("kind", MEASURED)
def test_planted_units_come_first(config: ModelConfig, kind: Kind) -> None:
    model = random_model(config)
    planted = plant(model)
    orders = orderings(model, kind, some_windows())
    assert {name: sorted(order[: len(planted[name])].tolist()) for name, order in orders.items()} == planted


@each_family
def test_the_controls_do_not_know_what_was_planted(config: ModelConfig) -> None:
    model = random_model(config)
    names = plant(model).keys()
    assert orderings(model, "identity").keys() == names
    assert all(order.tolist() == list(range(len(order))) for order in orderings(model, "identity").values())
    shuffled = orderings(model, "random", seed=0)["model.layers.0.mlp"]
    assert sorted(shuffled[:8].tolist()) != PLANTED
    assert torch.equal(shuffled, orderings(model, "random", seed=0)["model.layers.0.mlp"])
    assert not torch.equal(shuffled, orderings(model, "random", seed=1)["model.layers.0.mlp"])
    assert not torch.equal(shuffled, orderings(model, "random", seed=0)["model.layers.1.mlp"])


@each_family
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_model_computes_the_same_and_a_narrow_one_more_of_it(config: ModelConfig, kind: Kind) -> None:
    model, (tokens, targets) = random_model(config), some_windows()
    plant(model)
    with torch.no_grad():
        whole, narrow = model(tokens), model(tokens, 8)
        reorder_(model, orderings(model, kind, (tokens, targets)))
        assert torch.allclose(model(tokens), whole, atol=1e-4)
        if kind in MEASURED:
            assert (model(tokens, 8) - whole).norm() < 0.2 * (narrow - whole).norm()


@each_family
def test_every_value_is_kept_and_moves_with_its_unit(config: ModelConfig) -> None:
    model = random_model(config)
    before = copy.deepcopy(model.state_dict())
    orders = orderings(model, "random", seed=3)
    reorder_(model, orders)
    moved = 0
    for name, values in model.state_dict().items():
        order = orders.get(name.rsplit(".", 2)[0])
        if order is None:
            assert torch.equal(values, before[name]), name
            continue
        moved += 1
        for place, source in enumerate(order.tolist()):
            assert torch.equal(per_unit(values, len(order))[place], per_unit(before[name], len(order))[source]), name
    assert moved == 2 * ((3 if config.gated else 2) + (4 if config.nested_heads else 0))


def without(output: Tensor, units: int, unit: int) -> Tensor:
    """The output matrix of a block, one unit's rows being zero."""
    cut = output.detach().clone()
    per_unit(cut, units)[unit] = 0
    return cut


@each_family
def test_activation_is_the_root_mean_square_of_what_a_unit_adds(config: ModelConfig) -> None:
    model, (tokens, targets) = random_model(config), some_windows()
    scores, calls = importance(model, "activation", (tokens, targets)), {}

    def remember(module: torch.nn.Module, arguments: Any) -> None:
        calls[module] = arguments

    for name, score in scores.items():
        block = model.get_submodule(name)
        output = "o_proj.weight" if name.endswith("attn") else "down_proj.weight"
        hook = block.register_forward_pre_hook(remember)
        with torch.no_grad():
            model(tokens)
            hook.remove()
            whole = block(*calls[block])
            for unit in (0, len(score) // 2, len(score) - 1):
                cut = without(block.get_parameter(output), len(score), unit)
                added = whole - functional_call(block, {output: cut}, calls[block])
                assert added.square().sum(-1).mean().sqrt().item() == pytest.approx(score[unit].item(), rel=1e-3)


@each_family
def test_fisher_is_the_gradient_of_a_factor_on_each_units_output(config: ModelConfig) -> None:
    model, windows = random_model(config), some_windows(5)
    for name, score in importance(model, "fisher", windows).items():
        output = f"{name}.{'o_proj' if name.endswith('attn') else 'down_proj'}.weight"
        weight, squares = model.get_parameter(output).detach(), torch.zeros(len(score))
        for tokens, targets in zip(*windows, strict=True):
            factors = torch.ones(len(score), 1, 1, requires_grad=True)
            scaled = (factors * per_unit(weight, len(score))).view_as(weight)
            logits = functional_call(model, {output: scaled}, (tokens[None],))
            torch.nn.functional.cross_entropy(logits[0], targets, reduction="sum").backward()  # type: ignore[no-untyped-call]
            assert factors.grad is not None
            squares += factors.grad.flatten().square()
        # The sum's Fisher information, per window and then per token.
        assert torch.allclose(score.float(), squares / 5 / 2 / 16, rtol=1e-3)


def test_fisher_leaves_the_gradients_alone() -> None:
    model = random_model()
    importance(model, "fisher", some_windows(2))
    assert all(p.grad is None for p in model.parameters())


def test_each_score_sees_what_it_should() -> None:
    """Neuron 0 is strong but never fires, neuron 1 fires but nothing reads what it says."""
    model, windows = random_model(dataclasses.replace(SMALL, num_hidden_layers=1)), some_windows()
    (block,) = blocks(model)
    assert model.lm_head is not None
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 20  # after the norm, feature 0 is large and positive everywhere
        block.mlp.down_proj.weight *= 0.01
        block.mlp.up_proj.weight[0] = -10 * torch.eye(32)[0]
        block.mlp.up_proj.weight[1] = 0.3 * torch.eye(32)[0]
        block.mlp.down_proj.weight[:2] = 0.1 * torch.eye(32)[1]
        model.lm_head.weight[:, 1] = 0
    norm, activation, fisher = (importance(model, kind, windows)["model.layers.0.mlp"] for kind in MEASURED)
    assert norm.argmax() == 0
    assert norm[1] < norm.median()
    assert activation[0] == 0
    assert activation.argmax() == 1
    assert fisher[0] == 0
    assert 0 < fisher[1] < 0.1 * fisher.max()


@each_family
@pytest.mark.parametrize("kind", MEASURED)
def test_rescaling_that_leaves_the_function_alone_leaves_the_scores_alone(config: ModelConfig, kind: Kind) -> None:
    model, windows = random_model(config), some_windows(4)
    before, logits = importance(model, kind, windows), model(windows[0])
    with torch.no_grad():
        for block in blocks(model):
            block.mlp.up_proj.weight[::2] *= 2
            block.mlp.down_proj.weight[::2] /= 2 if config.gated else 4
            if (gain := block.post_attention_layernorm.weight) is not None:
                assert block.mlp.gate_proj is not None
                gain[::3] *= 4
                block.mlp.up_proj.weight[:, ::3] /= 4
                block.mlp.gate_proj.weight[:, ::3] /= 4
            attention, units = block.self_attn, config.kv_heads
            per_unit(attention.v_proj.weight, units)[1] *= 8
            per_unit(attention.o_proj.weight, units)[1] /= 8
        if config.value_embeddings:  # both its layers do the same with it
            model.get_parameter("model.value_embeds.0.weight").view(256, units, -1)[:, 1] *= 8
    assert torch.allclose(model(windows[0]), logits, atol=1e-4)
    for name, score in importance(model, kind, windows).items():
        assert torch.allclose(score, before[name], rtol=1e-3), name


@each_family
@pytest.mark.parametrize("kind", MEASURED)
def test_equally_important_neurons_stay_in_order(config: ModelConfig, kind: Kind) -> None:
    model = random_model(config)
    with torch.no_grad():
        for block in blocks(model):
            block.mlp.down_proj.weight[:60] = 0
    for name, order in orderings(model, kind, some_windows()).items():
        if name.endswith("mlp"):
            assert [neuron for neuron in order.tolist() if neuron < 60] == list(range(60))


@pytest.mark.parametrize("kind", MEASURED)
def test_a_model_with_a_width_per_layer_is_sorted_layer_by_layer(kind: Kind) -> None:
    model, windows = random_model(neurons=(64, 24)), some_windows()
    logits = model(windows[0])
    orders = orderings(model, kind, windows)
    assert [len(order) for order in orders.values()] == [64, 24]
    reorder_(model, orders)
    assert torch.allclose(model(windows[0]), logits, atol=1e-4)


permutations_of_all = st.fixed_dictionaries(
    {f"model.layers.{layer}.{block}": st.permutations(range(8)) for layer in range(2) for block in ("mlp", "self_attn")}
)


@settings(max_examples=10)
@given(permutations_of_all)
def test_any_permutation_keeps_the_function_and_its_inverse_restores_every_bit(orders: dict[str, list[int]]) -> None:
    model = random_model(dataclasses.replace(TIED, intermediate_size=8))
    before, tokens = copy.deepcopy(model.state_dict()), some_windows(2)[0]
    logits = model(tokens)
    tensors = {name: torch.tensor(order) for name, order in orders.items()}
    reorder_(model, tensors)
    assert torch.allclose(model(tokens), logits, atol=1e-4)
    reorder_(model, {name: order.argsort() for name, order in tensors.items()})
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


@settings(max_examples=10)
@given(st.sampled_from(get_args(Kind)), st.integers(0, 2**32), st.lists(st.sampled_from([0.0, 1e-30, 1e9]), max_size=8))
def test_every_order_is_a_permutation(kind: Kind, seed: int, factors: list[float]) -> None:
    model = random_model(dataclasses.replace(NESTED, intermediate_size=8))
    with torch.no_grad():
        for block in blocks(model):
            for neuron, factor in enumerate(factors):
                block.mlp.down_proj.weight[neuron] *= factor
    for order in orderings(model, kind, some_windows(2), seed).values():
        assert sorted(order.tolist()) == list(range(8))


@pytest.mark.parametrize("kind", ["activation", "fisher"])
def test_text_is_asked_for_where_it_is_needed(kind: Kind) -> None:
    with pytest.raises(ConfigError, match=f"by {kind} needs calibration text"):
        orderings(random_model(), kind)
    with pytest.raises(ConfigError, match="at least one window"):
        orderings(random_model(), kind, some_windows(0))


def test_an_unknown_ordering_is_refused() -> None:
    with pytest.raises(ConfigError, match="no ordering 'magic': choose one of norm, activation, fisher, random"):
        orderings(random_model(), "magic")  # type: ignore[arg-type]  # as from a command line


@pytest.mark.parametrize("kind", MEASURED)
def test_damaged_weights_are_refused(kind: Kind) -> None:
    model = random_model()
    with torch.no_grad():
        blocks(model)[1].mlp.up_proj.weight[7, 7] = torch.nan
    with pytest.raises(CheckpointError, match=rf"the {kind} of model\.layers\.\d\.mlp is not finite"):
        orderings(model, kind, some_windows())


def test_what_is_no_permutation_moves_nothing() -> None:
    model = random_model()
    before = copy.deepcopy(model.state_dict())
    orders = orderings(model, "random")
    orders["model.layers.1.mlp"][0] = orders["model.layers.1.mlp"][1]
    with pytest.raises(AssertionError, match=r"no permutation of 64 units for model\.layers\.1\.mlp"):
        reorder_(model, orders)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())


def markov_chain(length: int) -> npt.NDArray[np.uint8]:
    """Every byte has three successors, all equally likely: too many pairs for a small model to learn by heart."""
    dice = np.random.Generator(np.random.Philox(0))
    successors, picks = dice.integers(0, 256, (256, 3)), dice.integers(0, 3, length)
    text, state = np.empty(length, np.uint8), 0
    for place, pick in enumerate(picks):
        text[place] = state = successors[state, pick]
    return text


TEXT = markov_chain(60_000)
CORPUS = Corpus("a Markov chain", (TEXT[:50_000],), (TEXT[50_000:],))


def batches(purpose: bytes, batch: int = 8) -> Batches:
    return Batches(CORPUS, 0, purpose, 16, batch)


@pytest.fixture(scope="module")
def dense_model() -> GPT:
    """Trained at its whole width alone."""
    train = TrainSettings(objective=ObjectiveSettings(mode="fixed"), total_steps=60)
    trainer = Trainer(SMALL, 0, batches(b"dense"), train)
    for _ in range(train.total_steps):
        trainer.step()
    return trainer.model


def a_report(
    model: GPT, kinds: tuple[Kind, ...], steps: int, alphas: tuple[float, ...] = (), **options: Any
) -> ConversionReport:
    objective = ObjectiveSettings(mode="joint", alphas=alphas)
    return report(
        model,
        kinds,
        calibration=batches(b"calibration", 32).batch(0),
        windows=batches(b"evaluation").held_out(48),
        batches=batches(b"finetune"),
        settings=TrainSettings(objective=objective, total_steps=steps, warmup_steps=2),
        **options,
    )


def test_the_report_shows_that_sorting_pays_by_itself(dense_model: GPT) -> None:
    before, windows = copy.deepcopy(dense_model.state_dict()), batches(b"evaluation").held_out(48)
    found = a_report(dense_model, KINDS, steps=0)
    assert all(torch.equal(values, before[name]) for name, values in dense_model.state_dict().items())
    assert found.widths == (64, 32, 16, 8)
    assert found.dense == found.dense_continued == held_out_loss(dense_model, windows)
    assert found.orderings.keys() == set(KINDS)
    for kind, losses in found.orderings.items():
        assert losses.after == losses.before
        assert losses.before[0] == pytest.approx(found.dense, abs=1e-4)
        if kind in MEASURED:
            assert losses.before[1] < found.orderings["random"].before[1] - 0.02
    expected = tuple(held_out_loss(dense_model, windows, width) for width in (24, 8))
    assert a_report(dense_model, ("identity",), steps=0, widths=(24, 8)).orderings["identity"].before == expected


def test_the_report_shows_what_further_training_does(dense_model: GPT) -> None:
    found = a_report(dense_model, ("activation",), steps=10)
    losses = found.orderings["activation"]
    assert losses.before[0] == pytest.approx(found.dense, abs=1e-4)
    assert losses.after[3] < losses.before[3] - 0.05
    assert a_report(dense_model, ("activation",), steps=10) == found


def test_the_dense_model_goes_on_at_its_whole_width_alone(dense_model: GPT) -> None:
    jointly = a_report(dense_model, ("identity",), steps=5)
    whole_only = a_report(dense_model, ("identity",), steps=5, alphas=(1.0, 0.0, 0.0, 0.0))
    assert jointly.dense_continued == whole_only.dense_continued == whole_only.orderings["identity"].after[0]
    assert jointly.dense_continued not in (jointly.dense, jointly.orderings["identity"].after[0])
