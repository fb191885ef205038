"""How fast the trainer is, against a plain PyTorch loop and against what matrix products reach here, in one run.

The plain loop is the same model in float32 with `torch.optim.AdamW`: forward, backward, step, nothing else. Both train
the whole width on the same tokens, by turns, one thread pool for both; between them come products of the model's own
FFN shape. Medians count. `mfu` is the share of the best product's speed that our step reaches, counting 6 FLOPs per
token and parameter that is multiplied, and attention; neither recomputation nor the optimizer, whose time it includes.
`forward_backward_mfu` leaves out the optimizer's time. `sampled_tokens_s` is our speed with the objective nodes have by
default, a quarter of whose steps train a narrower tier. With `--kept-layers` there is another trainer of ours, whose
figures begin with `kept_`: it keeps what so many layers compute instead of computing it twice. The JSON object is the
last line on stdout.

    python benchmarks/throughput.py --preset small --json
    python benchmarks/throughput.py --preset nano-1b --layers 4 --kept-layers 4 --batch 1 --skip-plain --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from memory import LEAN_METHODS, Stopwatch, flops_per_token

from braniac.model.config import PRESETS, ModelConfig
from braniac.model.data import Batches
from braniac.model.gpt import GPT
from braniac.model.lean import compute_type
from braniac.model.objective import Mode, ObjectiveSettings
from braniac.model.sources import Corpus
from braniac.model.trainer import Trainer, TrainSettings, default_precision


def seconds_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def gemm_gflops(config: ModelConfig, dtype: torch.dtype) -> float:
    """The best of some products of the FFN's shape, in 10^9 FLOPs per second of all threads."""
    rows, cols = config.hidden_size, config.intermediate_size
    # Processors without bfloat16 are a hundred times slower with it: a few rows must do.
    tokens, rounds = (1024, 8) if dtype == compute_type() else (64, 1)
    a, b = torch.randn(tokens, rows).to(dtype), torch.randn(rows, cols).to(dtype)
    return max(2 * tokens * rows * cols / seconds_of(lambda: torch.mm(a, b)) / 1e9 for _ in range(rounds))


class PlainLoop:
    """What one would write first."""

    def __init__(self, config: ModelConfig, batches: Batches) -> None:
        self.batches = batches
        self.model = GPT(config)
        self.model.init_weights(0)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.step_count = 0

    def step(self) -> None:
        tokens, targets = self.batches.batch(self.step_count)
        loss = self.model.loss(tokens, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_count += 1


def trainer_of(config: ModelConfig, batches: Batches, mode: Mode, kept_layers: int | None = None) -> Trainer:
    settings = TrainSettings(
        batch=batches.batch_size,
        precision=default_precision(config),
        objective=ObjectiveSettings(mode=mode),
        kept_layers=kept_layers,
    )
    return Trainer(config, 0, batches, settings)


def run(options: argparse.Namespace) -> dict[str, object]:
    config = PRESETS[options.preset]
    if options.layers:
        config = dataclasses.replace(config, num_hidden_layers=options.layers)
    noise = np.random.default_rng(0).integers(0, config.vocab_size, 1 << 20).astype(np.uint16)
    batches = Batches(Corpus("noise", (noise,), ()), 0, b"", config.context, options.batch)
    trainers = {"ours": trainer_of(config, batches, "fixed")}
    if options.kept_layers is not None:
        trainers["kept"] = trainer_of(config, batches, "fixed", options.kept_layers)
    precision = trainers["ours"].settings.precision
    methods = LEAN_METHODS if precision == "lean" else ("step",)
    optimizers = {name: Stopwatch(each.optimizer, methods, time.perf_counter) for name, each in trainers.items()}
    if not options.skip_sampled:
        trainers["sampled"] = trainer_of(config, batches, "sampled")
    steps: dict[str, Callable[[], object]] = {name: each.step for name, each in trainers.items()}
    if not options.skip_plain:
        steps["plain"] = PlainLoop(config, batches).step
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    optimizer_s: dict[str, list[float]] = {name: [] for name in optimizers}
    gflops = {name: [0.0] for name in ("float32", "bfloat16")}
    for number in range(options.rounds + 1):  # the first round warms up
        for name, step in steps.items():
            before_s = optimizers[name].seconds if name in optimizers else 0.0
            spent_s = seconds_of(step)
            if number:
                seconds[name].append(spent_s)
                gflops["float32"].append(gemm_gflops(config, torch.float32))
                if name in optimizers:
                    optimizer_s[name].append(optimizers[name].seconds - before_s)
        gflops["bfloat16"].append(gemm_gflops(config, torch.bfloat16))
        if not options.json:
            print({name: round(spent[-1], 2) for name, spent in seconds.items() if spent}, flush=True)
    tokens = options.batch * config.context
    median = {name: statistics.median(spent) for name, spent in seconds.items()}
    rate = {f"{name}_tokens_s": tokens / spent_s for name, spent_s in median.items()}
    work, peak = tokens * flops_per_token(config, 0, config.context) / 1e9, max(map(max, gflops.values()))
    result: dict[str, object] = dict(rate)
    for name, spent in optimizer_s.items():
        key, optimizing_s = "" if name == "ours" else f"{name}_", statistics.median(spent)
        if "plain" in median:
            turns = [plain / ours for plain, ours in zip(seconds["plain"], seconds[name], strict=True)]
            result[f"{key}ratio"] = statistics.median(turns)
        result[f"{key}mfu"] = work / median[name] / peak
        result[f"{key}forward_backward_mfu"] = work / (median[name] - optimizing_s) / peak
        result[f"{key}optimizer_share"] = optimizing_s / median[name]
    return result | {
        "gemm_gflops": {name: max(found) for name, found in gflops.items()},
        "preset": options.preset,
        "layers": config.num_hidden_layers,
        "kept_layers": options.kept_layers,
        "precision": precision,
        "tokens_per_step": tokens,
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the preset has, to save time")
    parser.add_argument("--kept-layers", type=int, help="also with so many layers kept for the backward pass")
    parser.add_argument("--batch", type=int, default=TrainSettings().batch, help="windows per step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip-plain", action="store_true", help="leave out the plain loop")
    parser.add_argument("--skip-sampled", action="store_true", help="leave out the default objective")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(run(options)))


if __name__ == "__main__":
    main()
