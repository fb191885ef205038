"""What lean training costs in loss: the same steps on the same text in both precisions, some seeds each.

Held-out loss in nats per byte, at the full width and at the smallest tier's. `relative` is lean over fp32, less one, of
the means over seeds. The JSON object is the last line on stdout.

    python benchmarks/precision.py --preset small --steps 500 --seeds 3 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import get_args

import torch

from braniac.model.config import PRESETS, Precision
from braniac.model.data import Batches
from braniac.model.evaluate import held_out_loss
from braniac.model.tiers import tier_widths
from braniac.model.trainer import Trainer, TrainSettings
from braniac.node.text import default_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=64, help="of held-out text")
    parser.add_argument("--learning-rate", type=float, default=TrainSettings().learning_rate)
    parser.add_argument("--adam-learning-rate", type=float, default=TrainSettings().adam_learning_rate)
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config, corpus = PRESETS[options.preset], default_text().load(PRESETS[options.preset].vocab_size)
    losses: dict[str, dict[str, list[float]]] = {name: {"whole": [], "smallest": []} for name in get_args(Precision)}
    seconds = dict.fromkeys(losses, 0.0)
    for seed in range(options.seeds):
        for precision in get_args(Precision):
            settings = TrainSettings(
                batch=options.batch,
                seed=seed,
                precision=precision,
                total_steps=options.steps,
                learning_rate=options.learning_rate,
                adam_learning_rate=options.adam_learning_rate,
            )
            trainer = Trainer(config, 0, Batches(corpus, seed, b"", config.context, settings.batch), settings)
            began = time.process_time()
            for _ in range(options.steps):
                trainer.step()
            seconds[precision] += time.process_time() - began
            windows = trainer.batches.held_out(options.windows)
            for name, width in (("whole", tier_widths(config)[0]), ("smallest", tier_widths(config)[-1])):
                losses[precision][name].append(held_out_loss(trainer.model, windows, width))
            if not options.json:
                found = {name: round(values[-1], 4) for name, values in losses[precision].items()}
                print(f"seed {seed}  {precision:6}{found}", flush=True)
    relative = {
        name: statistics.mean(losses["lean"][name]) / statistics.mean(losses["fp32"][name]) - 1
        for name in ("whole", "smallest")
    }
    tokens = options.seeds * options.steps * options.batch * config.context
    rates = {name: tokens / spent for name, spent in seconds.items()}
    print(json.dumps({"relative": relative, "losses": losses, "tokens_per_cpu_s": rates, "options": vars(options)}))


if __name__ == "__main__":
    main()
