"""Training on a GPU is the same code: these run where torch sees one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from braniac.model.config import ModelConfig, Precision
from braniac.model.data import Batches
from braniac.model.errors import ConfigError
from braniac.model.evaluate import held_out_loss
from braniac.model.fragments import fragment_table
from braniac.model.lean import compute_type
from braniac.model.objective import ObjectiveSettings
from braniac.model.sources import Corpus
from braniac.model.trainer import Trainer, TrainSettings, choose_device

CONFIG = ModelConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, context=32)
TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog. " * 100, np.uint8)
SETTINGS = TrainSettings(batch=4, warmup_steps=5, objective=ObjectiveSettings(mode="joint"))

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


def trainer_of(settings: TrainSettings) -> Trainer:
    corpus = Corpus("a fox", (TEXT[:4000],), (TEXT[4000:],))
    return Trainer(CONFIG, 0, Batches(corpus, 0, b"peer", CONFIG.context, settings.batch), settings)


def test_auto_takes_what_is_there() -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu").type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        trainer_of(dataclasses.replace(SETTINGS, device="cuda"))


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be one of auto, cpu, cuda"):
        TrainSettings(device="tpu")  # type: ignore[arg-type]


@gpu
@pytest.mark.parametrize("precision", ["fp32", "lean"])
def test_it_learns_there_and_goes_on_here(precision: Precision) -> None:
    settings = dataclasses.replace(SETTINGS, precision=precision, device="cuda")
    trainer = trainer_of(settings)
    first = held_out_loss(trainer.model, trainer.batches.held_out(8))
    for _ in range(60):
        trainer.step()
    found = held_out_loss(trainer.model, trainer.batches.held_out(8))
    assert found < 0.5 * first
    here = trainer_of(dataclasses.replace(settings, device="cpu"))
    here.load_state(*trainer.state())
    assert held_out_loss(here.model, here.batches.held_out(8)) == pytest.approx(found, rel=0.02)
    here.step()


@gpu
@pytest.mark.parametrize("precision", ["fp32", "lean"])
def test_fragments_are_read_and_rebased_there(precision: Precision) -> None:
    trainer = trainer_of(dataclasses.replace(SETTINGS, precision=precision, device="cuda"))
    fragment = fragment_table(CONFIG, 8)[0]
    before = trainer.read(fragment)
    assert before.device.type == "cpu"
    trainer.rebase(fragment, torch.full((fragment.size,), 0.5))
    change = trainer.read(fragment) - before
    assert change.mean().item() == pytest.approx(0.5, rel=1e-3)
    trainer.load_fragment(fragment, before)
    assert torch.equal(trainer.read(fragment), before)


@gpu
def test_lean_multiplies_in_bfloat16_there() -> None:
    assert compute_type(torch.device("cuda")) == torch.bfloat16
