"""The trainer: it learns, resumes to the bit, reads and rebases fragments, survives a non-finite loss."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from braniac.model.config import ModelConfig
from braniac.model.data import Batches
from braniac.model.errors import CheckpointError, TrainingDiverged
from braniac.model.evaluate import held_out_loss
from braniac.model.fragments import fragment_table, initial_fragment
from braniac.model.objective import ObjectiveSettings
from braniac.model.sources import Corpus
from braniac.model.trainer import Trainer, TrainSettings

CONFIG = ModelConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128, context=16)
SETTINGS = TrainSettings(batch=4, warmup_steps=5, check_gradients=True)
TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 100, np.uint8)
CORPUS = Corpus("a fox", (TEXT[:4000],), (TEXT[4000:],))


def trainer_of(tier: int = 0, peer: bytes = b"peer", settings: TrainSettings = SETTINGS) -> Trainer:
    return Trainer(CONFIG, tier, Batches(CORPUS, settings.seed, peer, CONFIG.context, settings.batch), settings)


@pytest.mark.parametrize("precision", ["fp32", "lean"])
def test_the_first_step_imports_no_computer_algebra(precision: str) -> None:
    """Some calls of torch do, and no other thread of a daemon gets anywhere meanwhile."""
    trainer = f"t.trainer_of(settings=t.TrainSettings(batch=4, precision={precision!r}))"
    program = f"import sys\nimport test_model_trainer as t\n{trainer}.step()\nprint('sympy' in sys.modules)"
    folder = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize("tier", [0, 3])
def test_it_learns(tier: int) -> None:
    trainer = trainer_of(tier)
    windows = trainer.batches.held_out(8)
    before = held_out_loss(trainer.model, windows)
    for _ in range(60):
        result = trainer.step()
    assert result.tokens == 64
    assert before == pytest.approx(5.545, abs=0.01)
    assert held_out_loss(trainer.model, windows) < 1.0


def test_narrow_steps_keep_the_small_tiers_good() -> None:
    trainer = trainer_of()
    widths = [max(trainer.step().widths) for _ in range(60)]
    assert {16, 32, 64, 128} == set(widths)
    assert 0.6 < widths.count(128) / 60 < 0.9
    windows = trainer.batches.held_out(8)
    assert all(held_out_loss(trainer.model, windows, width) < 1.5 for width in (16, 32, 64, 128))


def test_the_smallest_tier_and_a_fraction_of_zero_always_use_all_they_hold() -> None:
    smallest, whole = (
        trainer_of(3),
        trainer_of(settings=dataclasses.replace(SETTINGS, objective=ObjectiveSettings(mode="fixed"))),
    )
    assert {smallest.step().widths for _ in range(12)} == {(16,)}
    assert {whole.step().widths for _ in range(12)} == {(128,)}


def test_all_tiers_start_from_the_same_anchors() -> None:
    for tier in range(4):
        trainer = trainer_of(tier)
        for fragment in fragment_table(CONFIG, 6):
            if fragment.ring < 4 - tier:
                anchor = initial_fragment(CONFIG, fragment, SETTINGS.seed)
                assert np.array_equal(trainer.read(fragment).numpy() * 2**20, anchor)


def test_a_resumed_trainer_goes_on_to_the_bit() -> None:
    straight, stopped = trainer_of(), trainer_of()
    for _ in range(4):
        straight.step()
        stopped.step()
    tensors, counters = stopped.state()
    stopped.step()  # the state is a copy: training on does not change it
    resumed = trainer_of()
    resumed.load_state(tensors, counters)
    for _ in range(4):
        assert straight.step() == resumed.step()
    assert all(torch.equal(p, resumed.params[name]) for name, p in straight.params.items())


def test_rebase_adds_load_overwrites_and_read_copies() -> None:
    trainer = trainer_of()
    fragment = fragment_table(CONFIG, 6)[0]
    before = trainer.read(fragment)
    kept = before.clone()
    trainer.rebase(fragment, torch.full((fragment.size,), 0.25))
    assert torch.equal(before, kept)
    assert torch.equal(trainer.read(fragment), before + 0.25)
    trainer.load_fragment(fragment, before)
    assert torch.equal(trainer.read(fragment), before)


def test_a_fragment_of_a_ring_that_is_not_held_or_that_is_not_finite_is_our_bug() -> None:
    trainer = trainer_of(tier=1)
    table = fragment_table(CONFIG, 6)
    outer = next(fragment for fragment in table if fragment.ring == 3)
    core = next(fragment for fragment in table if fragment.ring == 0)
    with pytest.raises(AssertionError, match="does not hold ring 3"):
        trainer.read(outer)
    with pytest.raises(AssertionError, match="non-finite"):
        trainer.rebase(core, torch.full((core.size,), torch.nan))


def test_a_loss_that_is_not_finite_changes_nothing() -> None:
    trainer = trainer_of()
    trainer.step()
    healthy, counters = trainer.state()
    name = "model.layers.0.self_attn.v_proj.weight"
    with torch.no_grad():
        trainer.params[name][0, 0] = torch.inf
    broken, _ = trainer.state()
    with pytest.raises(TrainingDiverged, match="not finite at step 1"):
        trainer.step()
    after, after_counters = trainer.state()
    assert after_counters == counters
    assert all(torch.equal(tensor, broken[key]) for key, tensor in after.items())
    trainer.load_state(healthy, counters)
    trainer.step()


def test_a_state_of_another_tier_or_with_odd_counters_is_refused() -> None:
    trainer = trainer_of()
    tensors, counters = trainer_of(tier=1).state()
    with pytest.raises(CheckpointError, match="this model and tier need"):
        trainer.load_state(tensors, counters)
    tensors, _ = trainer.state()
    for odd in ({}, {"step": -1}, {"step": 1, "x": 2}):
        with pytest.raises(CheckpointError, match="exactly one step count"):
            trainer.load_state(tensors, odd)
    assert trainer.step_count == 0


def test_peers_read_different_text() -> None:
    one, two = trainer_of(peer=b"one"), trainer_of(peer=b"two")
    one.step(), two.step()
    assert one.step().loss != two.step().loss
