"""Lean training: its gradients are autograd's, it learns what float32 learns, and it resumes to the bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from braniac.model import lean_layer, lean_loss
from braniac.model.config import ModelConfig
from braniac.model.data import Batches
from braniac.model.errors import CheckpointError, ConfigError, TrainingDiverged
from braniac.model.evaluate import held_out_loss
from braniac.model.fragments import fragment_table, initial_fragment
from braniac.model.gpt import GPT
from braniac.model.lean import LeanStep, compute_type
from braniac.model.lean_optim import Direction, LeanOptimizer
from braniac.model.objective import Mode, ObjectiveSettings, Term, backward
from braniac.model.sources import Corpus
from braniac.model.tiers import is_gain
from braniac.model.trainer import Trainer, TrainSettings

NANO = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, context=16)
LLAMA = dataclasses.replace(NANO, family="llama", num_key_value_heads=2)
NESTED = dataclasses.replace(NANO, nested_heads=True, matformer_factor=4)
PLAIN = dataclasses.replace(NANO, qk_norm=False, embedding_norm=False, activation="gelu", logit_softcap=0.0)
RICH = dataclasses.replace(NANO, num_hidden_layers=5, value_embeddings=2, skip_connections=True)
TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 100, np.uint8)
CORPUS = Corpus("a fox", (TEXT[:4000],), (TEXT[4000:],))
LEAN = TrainSettings(batch=4, warmup_steps=5, precision="lean")


def trainer_of(config: ModelConfig = NANO, tier: int = 0, settings: TrainSettings = LEAN) -> Trainer:
    return Trainer(config, tier, Batches(CORPUS, settings.seed, b"peer", config.context, settings.batch), settings)


class Recorder(LeanOptimizer):
    """Keeps the gradients instead of following them."""

    def begin(self, lr_scale: float, seed: int) -> None:
        self.refused = []
        self.found: dict[str, torch.Tensor] = {name: torch.zeros(p.shape) for name, p in self.params.items()}

    def add_gradient(self, direction: Direction, start: int, gradient: torch.Tensor) -> None:
        self.found[direction.name][start : start + len(gradient)] += gradient

    def apply(self, direction: Direction) -> None:
        pass

    def update_rows(self, name: str, rows: slice | torch.Tensor, gradient: torch.Tensor) -> None:
        self.found[name][rows] += gradient

    def update_gains(self) -> None:
        for name, gain in self.gains.items():
            assert gain.grad is not None
            self.found[name] += gain.grad


def random_model(config: ModelConfig, tier: int) -> GPT:
    """A float32 model none of whose weights is zero."""
    model, dice = GPT(config, tier), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=dice) * 0.2 + (1 if is_gain(name) else 0))
    return model


@pytest.mark.parametrize("kept_layers", [0, 1, 2])
@pytest.mark.parametrize(
    ("config", "tier"), [(NANO, 0), (NANO, 2), (LLAMA, 0), (NESTED, 0), (PLAIN, 0), (RICH, 0), (RICH, 2)]
)
def test_its_gradients_are_those_of_autograd(
    config: ModelConfig, tier: int, kept_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lean_layer, "ROWS_AT_ONCE", 48)
    monkeypatch.setattr(lean_layer, "TOKENS_AT_ONCE", 40)
    monkeypatch.setattr(lean_loss, "ROWS_AT_ONCE", 100)
    monkeypatch.setattr(lean_loss, "TOKENS_AT_ONCE", 24)
    model = random_model(config, tier)
    narrow, whole = config.intermediate_size >> (config.tiers - 1), config.intermediate_size >> tier
    rest = config.num_hidden_layers - 1
    terms = [
        Term((first, *[last] * rest), w)
        for first, last, w in ((whole, whole, 0.6), (narrow, whole, 0.3), (narrow, narrow, 0.1))
    ]
    tokens, targets = Batches(CORPUS, 0, b"", config.context, 4).batch(0)
    expected_losses = backward(model, tokens, targets, terms, kl_weight=0.5)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    recorder = Recorder(
        dict(model.named_parameters()), config, learning_rate=0.1, adam_learning_rate=0.1, weight_decay=0.0
    )
    step = LeanStep(model, recorder, torch.float32, torch.float32, kept_layers)
    losses = step.run(tokens, targets, terms, 0.5, 1.0, 0)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert recorder.found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (recorder.found[name] - gradient).norm().item() < 1e-4 * gradient.norm().item(), name


@pytest.mark.parametrize("config", [NANO, LLAMA, RICH])
@pytest.mark.parametrize("mode", ["sampled", "joint", "layers"])
def test_it_learns_what_float32_learns(config: ModelConfig, mode: Mode) -> None:
    losses = {}
    for precision in ("lean", "fp32"):
        objective = ObjectiveSettings(mode=mode)
        trainer = trainer_of(config, settings=dataclasses.replace(LEAN, precision=precision, objective=objective))
        for _ in range(60):
            trainer.step()
        losses[precision] = held_out_loss(trainer.model, trainer.batches.held_out(8))
    assert losses["lean"] < 1.0
    assert losses["lean"] < losses["fp32"] + 0.3


def test_matrices_are_bfloat16_gains_float32_and_momentum_one_byte() -> None:
    trainer = trainer_of(LLAMA, tier=1)
    trainer.step()
    for name, p in trainer.params.items():
        assert p.dtype == (torch.float32 if is_gain(name) else torch.bfloat16), name
    assert isinstance(trainer.optimizer, LeanOptimizer)
    matrices = sum(p.numel() for name, p in trainer.params.items() if name in trainer.optimizer.momentum)
    kept = sum(tensor.nbytes for name, tensor in trainer.optimizer.state_tensors().items() if "momentum" in name)
    assert kept == matrices
    assert all(p.grad is None for p in trainer.params.values())


@pytest.mark.parametrize("config", [LLAMA, RICH])
def test_a_resumed_trainer_goes_on_to_the_bit(config: ModelConfig) -> None:
    straight, stopped = trainer_of(config), trainer_of(config)
    for _ in range(3):
        straight.step()
        stopped.step()
    tensors, counters = stopped.state()
    stopped.step()
    resumed = trainer_of(config)
    resumed.load_state(tensors, counters)
    for _ in range(3):
        assert straight.step() == resumed.step()
    assert all(torch.equal(p, resumed.params[name]) for name, p in straight.params.items())


def test_value_embeddings_move_only_where_they_were_looked_up() -> None:
    trainer = trainer_of(RICH)
    for _ in range(3):
        trainer.step()
    before, _ = trainer.state()
    tokens, _ = trainer.batches.batch(3)
    trainer.step()
    absent = torch.ones(256, dtype=torch.bool)
    absent[tokens.flatten()] = False
    for name in ("model.value_embeds.0.weight", "model.value_embeds.1.weight"):
        assert trainer.params[name].dtype == torch.bfloat16
        assert torch.equal(before[name][absent], trainer.params[name][absent])
        assert not torch.equal(before[name][~absent], trainer.params[name][~absent])
    assert trainer.params["model.skips.weight"].dtype == torch.float32
    assert not torch.equal(before["model.skips.weight"], trainer.params["model.skips.weight"])


def test_a_narrow_step_leaves_wider_rows_and_absent_tokens_alone() -> None:
    trainer = trainer_of()
    for _ in range(3):  # output projections start at zero, and no gradient passes them before they have moved
        trainer.step()
    before, _ = trainer.state()
    tokens, targets = trainer.batches.batch(7)
    assert trainer._lean_step is not None
    trainer._lean_step.run(tokens, targets, [Term((16, 32), 1.0)], 0.0, 1.0, 7)
    after, _ = trainer.state()
    for layer, width in enumerate((16, 32)):
        for kind in ("up", "down"):
            name = f"model.layers.{layer}.mlp.{kind}_proj.weight"
            for key in (name, f"optimizer.momentum.{name}"):
                assert torch.equal(before[key][width:], after[key][width:]), key
                assert not torch.equal(before[key][:width], after[key][:width]), key
    absent = torch.ones(256, dtype=torch.bool)
    absent[tokens.flatten()] = False
    table = "model.embed_tokens.weight"
    assert torch.equal(before[table][absent], after[table][absent])
    assert not torch.equal(before[table][~absent], after[table][~absent])


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    trainer = trainer_of()
    trainer.step()
    with torch.no_grad():
        trainer.params["model.layers.0.self_attn.v_proj.weight"][0, 0] = torch.inf
    broken, counters = trainer.state()
    with pytest.raises(TrainingDiverged, match="not finite"):
        trainer.step()
    after, after_counters = trainer.state()
    assert after_counters == counters
    assert all(torch.equal(tensor, broken[key]) for key, tensor in after.items())


def test_a_gradient_that_is_not_finite_goes_nowhere() -> None:
    trainer = trainer_of()
    trainer.step()
    optimizer = trainer.optimizer
    assert isinstance(optimizer, LeanOptimizer)
    before, _ = trainer.state()
    name = "model.layers.1.mlp.up_proj.weight"
    optimizer.begin(1.0, 0)
    direction = optimizer.direction(name, 128)
    optimizer.add_gradient(direction, 0, torch.full((64, 32), torch.nan))
    optimizer.add_gradient(direction, 64, torch.zeros(64, 32))
    optimizer.apply(direction)
    optimizer.update_rows("lm_head.weight", slice(0, 4), torch.full((4, 32), torch.inf))
    after, _ = trainer.state()
    assert optimizer.refused == [name, "lm_head.weight"]
    assert torch.equal(before[name], after[name])
    for key in ("lm_head.weight", *(f"optimizer.{kind}_second.lm_head.weight" for kind in ("row", "column"))):
        assert torch.equal(before[key], after[key]), key


def head_alone() -> tuple[LeanOptimizer, torch.Tensor]:
    """An optimizer of nothing but a head that is zero, and the head."""
    head = torch.zeros(256, 32, dtype=torch.bfloat16)
    params = {"lm_head.weight": head}
    return LeanOptimizer(params, NANO, learning_rate=0.1, adam_learning_rate=0.25, weight_decay=0.0), head


BLOCKS = [slice(start, start + 64) for start in range(0, 256, 64)]


@pytest.mark.parametrize("places", [[slice(0, 256)], BLOCKS, [torch.arange(0, 256, 5)]])
def test_tables_move_alike_where_rows_and_columns_differ_in_scale(
    places: list[slice] | list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("braniac.model.lean_optim.VALUES_AT_ONCE", 1000)
    dice = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (256, 32), generator=dice) * 2.0 - 1
    gradient = signs * torch.logspace(-5, 0, 256)[:, None] * torch.logspace(0, -2, 32)
    gradient[:, -1] = 0
    optimizer, table = head_alone()
    expected = torch.zeros(256, 32)
    for step in range(3):
        optimizer.begin(1.0, step)
        for rows in places:
            optimizer.update_rows("lm_head.weight", rows, gradient[rows].clone())
            expected[rows, :-1] -= 0.25 * signs[rows, :-1]
    assert torch.allclose(table.float(), expected, rtol=0.01)


def test_columns_remember_as_many_steps_whatever_the_blocks() -> None:
    gradient = torch.ones(256, 32)
    for places in ([slice(0, 256)], BLOCKS):
        optimizer, _ = head_alone()
        for step in range(14):
            optimizer.begin(1.0, step)
            for rows in places:
                optimizer.update_rows("lm_head.weight", rows, gradient[rows].clone())
        column = optimizer.column_second["lm_head.weight"]
        assert torch.allclose(column, torch.full((32,), 1 - 0.95**14), rtol=0.02)


def test_a_state_without_second_moments_of_columns_is_refused() -> None:
    trainer = trainer_of()
    tensors, counters = trainer.state()
    del tensors["optimizer.column_second.lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lacks tensor 'optimizer\.column_second\.lm_head\.weight'"):
        trainer_of().load_state(tensors, counters)


def test_a_tied_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        trainer_of(dataclasses.replace(NANO, tie_word_embeddings=True))


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.precision is 'int4': it must be one of fp32, lean"):
        TrainSettings(precision="int4")  # type: ignore[arg-type]


def test_fragments_are_read_loaded_and_rebased_without_bias() -> None:
    trainer = trainer_of()
    fragment = fragment_table(NANO, 6)[0]
    anchor = torch.from_numpy(initial_fragment(NANO, fragment, LEAN.seed) / 2.0**20).float()
    first = trainer.read(fragment)
    assert first.dtype == torch.float32
    assert torch.equal(first, anchor.bfloat16().float())
    trainer.rebase(fragment, torch.zeros(fragment.size))
    assert torch.equal(trainer.read(fragment), first)
    trainer.rebase(fragment, torch.full((fragment.size,), 2.0**-10))
    moved = trainer.read(fragment) - first
    large = first.abs() > 0.5  # the next bfloat16 is at least 2**-8 away
    assert large.sum().item() > 1000
    assert moved[large].mean().item() == pytest.approx(2.0**-10, rel=0.2)
    trainer.load_fragment(fragment, anchor)
    assert torch.equal(trainer.read(fragment), first)


def test_the_loss_of_a_lean_model_is_that_of_its_logits() -> None:
    trainer = trainer_of()
    for _ in range(3):
        trainer.step()
    tokens, targets = trainer.batches.batch(0)
    logits = trainer.model(tokens)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    with torch.no_grad():
        assert trainer.model.loss(tokens, targets).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("able", "dtype"),
    [
        ({"architecture": "x86_64", "avx2": True}, torch.float32),
        ({"architecture": "x86_64", "avx512_bw": True, "avx512_vnni": True, "avx512_bf16": False}, torch.float32),
        ({"architecture": "x86_64", "avx512_bw": True, "avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"architecture": "arm64", "neon": True, "bf16": False}, torch.float32),
        ({"architecture": "arm64", "neon": True, "bf16": True}, torch.bfloat16),
    ],
)
def test_it_multiplies_in_bfloat16_only_where_that_is_not_emulated(
    able: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert compute_type() == dtype
