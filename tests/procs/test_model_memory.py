"""The memory estimate behind `--tier auto`, against the resident memory of a real process."""

from __future__ import annotations

import subprocess
import sys

import pytest

MEASURE = """
import sys
import numpy as np
import torch
from braniac.model.config import PRESETS, ModelConfig
from braniac.model.data import Batches
from braniac.model.sources import Corpus
from braniac.model.trainer import Trainer, TrainSettings, memory_bytes_needed

def peak_bytes():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024

def train(config, tier, batch):
    settings = TrainSettings(batch=batch)
    corpus = Corpus("zeros", (np.zeros(10_000, np.uint8),), ())
    trainer = Trainer(config, tier, Batches(corpus, 0, b"", config.context, batch), settings)
    trainer.step(), trainer.step()
    return memory_bytes_needed(config, tier, settings)

torch.set_num_threads(1)
train(ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64, context=16), 0, 2)
before = peak_bytes()
estimate = train(PRESETS["small"], int(sys.argv[1]), int(sys.argv[2]))
print(estimate / (peak_bytes() - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize(("tier", "batch"), [(0, 1), (0, 4), (3, 4)])
def test_the_estimate_is_within_a_factor_of_two(tier: int, batch: int) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tier), str(batch)], capture_output=True, text=True, check=True, timeout=100
    )
    assert 0.5 < float(run.stdout) < 2
