"""Does one learning rate serve every tier? The same steps at each tier and each of a grid of learning rates.

Each tier is trained alone (its own narrow model, `objective.mode` fixed), for the same steps on the same text. Muon's
learning rate is what varies, by factors of two; Adam's, for embedding and head, whose shape no tier changes, stays.
Held-out loss in nats per byte at the tier's own width, mean over seeds. `best` is the grid's best learning rate per
tier, `spread_steps` how many grid steps lie between the best of any two tiers. The JSON object is the last line.

    python benchmarks/learning_rate.py --preset tiny --json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics

import torch

from braniac.model.config import PRESETS
from braniac.model.data import Batches
from braniac.model.evaluate import held_out_loss
from braniac.model.objective import ObjectiveSettings
from braniac.model.sources import Corpus
from braniac.model.tiers import tier_width
from braniac.model.trainer import Trainer, TrainSettings
from braniac.node.text import default_text


def loss_of(options: argparse.Namespace, corpus: Corpus, tier: int, learning_rate: float, seed: int) -> float:
    config = PRESETS[options.preset]
    settings = TrainSettings(
        batch=options.batch,
        seed=seed,
        total_steps=options.steps,
        learning_rate=learning_rate,
        objective=ObjectiveSettings(mode="fixed"),
    )
    trainer = Trainer(config, tier, Batches(corpus, seed, b"", config.context, options.batch), settings)
    for _ in range(options.steps):
        trainer.step()
    return held_out_loss(trainer.model, trainer.batches.held_out(options.windows), tier_width(config, tier))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--windows", type=int, default=128, help="of held-out text")
    parser.add_argument("--lowest", type=float, default=0.005, help="of the grid")
    parser.add_argument("--points", type=int, default=5, help="learning rates, each twice the one before")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = PRESETS[options.preset]
    corpus = default_text().load(config.vocab_size)
    grid = [options.lowest * 2**point for point in range(options.points)]
    losses: dict[int, list[float]] = {}
    for tier in range(config.tiers):
        losses[tier] = []
        for learning_rate in grid:
            runs = [loss_of(options, corpus, tier, learning_rate, seed) for seed in range(options.seeds)]
            losses[tier].append(statistics.mean(runs))
            if not options.json:
                print(f"tier {tier}  learning rate {learning_rate:<8g}{losses[tier][-1]:.4f}", flush=True)
    best = {tier: grid[row.index(min(row))] for tier, row in losses.items()}
    steps = [math.log2(rate / options.lowest) for rate in best.values()]
    result = {
        "learning_rates": grid,
        "losses": losses,
        "best": best,
        "spread_steps": round(max(steps) - min(steps)),
        "options": vars(options),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
