"""Memory of training in real processes: the estimate behind `--tier auto`, growth, and the benchmark of a lean node."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from braniac.model.config import PRESETS
from braniac.model.tiers import parameter_count

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
    settings = TrainSettings(batch=batch, precision=sys.argv[3], kept_layers=int(sys.argv[4]))
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
@pytest.mark.parametrize(
    ("tier", "batch", "precision", "kept_layers"),
    [
        (0, 1, "fp32", 99),
        (0, 4, "fp32", 99),
        (0, 4, "fp32", 0),
        (3, 4, "fp32", 99),
        (0, 4, "lean", 0),
        (0, 4, "lean", 99),
    ],
)
def test_the_estimate_is_within_a_factor_of_two(tier: int, batch: int, precision: str, kept_layers: int) -> None:
    arguments = [sys.executable, "-c", MEASURE, str(tier), str(batch), precision, str(kept_layers)]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=100)
    assert 0.5 < float(run.stdout) < 2


GROW = """
import sys
import numpy as np
import torch
from braniac.model.config import PRESETS
from braniac.model.data import Batches
from braniac.model.sources import Corpus
from braniac.model.trainer import Trainer, TrainSettings

def resident_bytes():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) * 1024

torch.set_num_threads(1)
config = PRESETS["tiny"]
corpus = Corpus("noise", (np.random.default_rng(0).integers(0, 256, 10_000).astype(np.uint8),), ())
trainer = Trainer(config, 0, Batches(corpus, 0, b"", config.context, 2), TrainSettings(batch=2, precision="lean"))
resident = []
for step in range(120):
    trainer.step()
    resident.append(resident_bytes())
print(resident[-1] / resident[19])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_resident_memory_does_not_grow_with_the_steps() -> None:
    run = subprocess.run([sys.executable, "-c", GROW], capture_output=True, text=True, check=True, timeout=100)
    assert float(run.stdout) < 1.01


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_the_benchmark_says_what_a_lean_step_and_a_merge_take() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "memory.py"
    arguments = [sys.executable, str(script), "--preset", "small", "--precision", "lean", "--tier", "3", "--json"]
    run = subprocess.run(
        [*arguments, "--tokens", "256", "--steps", "1"], capture_output=True, text=True, check=True, timeout=100
    )
    result = json.loads(run.stdout)
    assert result["params"] == parameter_count(PRESETS["small"], 3)
    assert 0.1 < result["anonymous_gib"] <= result["peak_rss_gib"] < 1
    assert result["payload_bytes"] > 0
    assert {"tier", "tokens_per_s", "mfu", "gemm_gflops"} <= result.keys()
