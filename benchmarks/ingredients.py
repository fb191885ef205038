"""What each ingredient of a nanogpt is worth: the same steps on the same text with and without it, some seeds each.

Held-out loss in nats per byte, at full width, after equally many steps. `difference` is the ingredient's loss less the
baseline's, mean over seeds, and `half_width` that of its 95% confidence interval (Student's t of the differences by
seed): an ingredient that the model has by default pays if leaving it out raises the loss, a new one if it lowers it.
`time` is the median step's processor time over the baseline's of the same seed, all variants taking turns. The JSON
object is the last line on stdout.

    python benchmarks/ingredients.py --preset tiny --steps 250 --seeds 3 --json
    python benchmarks/ingredients.py --preset tiny --layers 6 --steps 150 --only skip,value,unet,every,smear --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from candidates import Candidate, CandidateGPT, CandidateOptimizer

from braniac.model.config import PRESETS, ModelConfig
from braniac.model.data import Batches
from braniac.model.evaluate import held_out_loss
from braniac.model.gpt import GPT
from braniac.model.sources import Corpus
from braniac.model.trainer import TrainSettings
from braniac.node.text import default_text

BASELINE = "baseline"
_STUDENT_95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # by degrees of freedom


@dataclass(frozen=True, slots=True)
class Variant:
    """What is different from the baseline."""

    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    candidate: Candidate | None = None


VARIANTS = {
    BASELINE: Variant(),
    "no qk_norm": Variant({"qk_norm": False}),
    "no softcap": Variant({"logit_softcap": 0.0}),
    "no embedding_norm": Variant({"embedding_norm": False}),
    "random outputs": Variant({"zero_outputs": False}),
    "gelu": Variant({"activation": "gelu"}),
    "value embedding": Variant({"value_embeddings": 1}),
    "skip connections": Variant({"skip_connections": True}),
    "value and skip": Variant({"value_embeddings": 1, "skip_connections": True}),
    "unet": Variant(candidate=Candidate(unet=True)),
    "embedding everywhere": Variant(candidate=Candidate(embedding_everywhere=True)),
    "smear": Variant(candidate=Candidate(smear=True)),
    "head gates": Variant(candidate=Candidate(head_gates=True)),
    "attention scale 0.17": Variant(candidate=Candidate(attention_scale=0.17)),
    "window 32": Variant(candidate=Candidate(window=32)),
    "adam 0.003": Variant(candidate=Candidate(matrix_adam=0.003)),
    "adam 0.01": Variant(candidate=Candidate(matrix_adam=0.01)),
    "momentum warm-up": Variant(candidate=Candidate(momentum_warmup=50)),
    "decay 0.5": Variant(candidate=Candidate(matrix_decay=0.5)),
    "cautious decay 0.5": Variant(candidate=Candidate(matrix_decay=0.5, cautious=True)),
    "cooldown 0.2": Variant(settings={"cooldown_fraction": 0.2}),
    "cooldown 0.7": Variant(settings={"cooldown_fraction": 0.7}),
    "sqrt cooldown": Variant(candidate=Candidate(sqrt_cooldown=True)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=[name for name, c in PRESETS.items() if not c.gated])
    parser.add_argument("--layers", type=int, help="instead of the preset's")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3, help="2 to 10")
    parser.add_argument("--windows", type=int, default=128, help="of held-out text")
    parser.add_argument("--only", default="", help="parts of names of variants, separated by commas; empty: all")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = PRESETS[options.preset]
    config = dataclasses.replace(config, num_hidden_layers=options.layers or config.num_hidden_layers)
    asked = options.only.split(",")
    halves = {"value embeddings in all layers": Variant({"value_embeddings": config.num_hidden_layers // 2})}
    known = VARIANTS | (halves if config.num_hidden_layers > 3 else {})
    variants = {name: v for name, v in known.items() if name == BASELINE or any(part in name for part in asked)}
    corpus = default_text().load(config.vocab_size)
    losses: dict[str, list[float]] = {name: [] for name in variants}
    step_s: dict[str, list[float]] = {name: [] for name in variants}
    for seed in range(options.seeds):
        for name, variant in variants.items():
            loss, seconds = run(config, variant, corpus, seed, options)
            losses[name].append(loss)
            step_s[name].append(seconds)
            if not options.json:
                print(f"seed {seed}  {name:32}{loss:8.4f}{1000 * seconds:8.1f} ms per step", flush=True)
    found = {name: _compared(losses, step_s, name) for name in variants}
    if not options.json:
        for name, each in found.items():
            print(f"{name:32}{each['difference']:+9.4f} +- {each['half_width']:.4f}{each['time']:8.2f} of the time")
    print(json.dumps({"variants": found, "losses": losses, "options": vars(options)}))


def run(
    config: ModelConfig, variant: Variant, corpus: Corpus, seed: int, options: argparse.Namespace
) -> tuple[float, float]:
    """Train one model: its held-out loss, and the processor seconds of the median step."""
    config = dataclasses.replace(config, **variant.model)
    settings = TrainSettings(batch=options.batch, seed=seed, total_steps=options.steps, **variant.settings)
    candidate = variant.candidate or Candidate()
    model = CandidateGPT(config, candidate, seed) if variant.candidate else GPT(config)
    if variant.candidate is None:
        model.init_weights(seed)
    optimizer = CandidateOptimizer(model, settings, candidate)
    batches = Batches(corpus, seed, b"", config.context, settings.batch)
    seconds = []
    for step in range(options.steps):
        began = time.process_time()
        model.zero_grad()
        model.loss(*batches.batch(step)).backward()  # type: ignore[no-untyped-call]
        optimizer.step(lr_scale(settings, candidate, step), model.neurons)
        seconds.append(time.process_time() - began)
    return held_out_loss(model, batches.held_out(options.windows)), statistics.median(seconds)


def lr_scale(settings: TrainSettings, candidate: Candidate, step: int) -> float:
    """What a step multiplies the learning rates by."""
    straight = settings.lr_scale(step)
    if not candidate.sqrt_cooldown or step < settings.warmup_steps:
        return straight
    return 1 - math.sqrt(1 - straight)


def _compared(losses: dict[str, list[float]], step_s: dict[str, list[float]], name: str) -> dict[str, float]:
    differences = [mine - base for mine, base in zip(losses[name], losses[BASELINE], strict=True)]
    ratios = [mine / base for mine, base in zip(step_s[name], step_s[BASELINE], strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return {
        "loss": statistics.mean(losses[name]),
        "difference": statistics.mean(differences),
        "half_width": _STUDENT_95[len(differences) - 1] * error,
        "time": statistics.median(ratios),
    }


if __name__ == "__main__":
    main()
