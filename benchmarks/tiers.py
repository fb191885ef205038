"""Do small devices help a large model? Agreed weights of mixed swarms against those of swarms of one tier.

Five swarms train on the same text with the production codec, merge and ledger (outer/braniac.py), each on several
seeds: 2 peers of the full model alone (`2_full`), the same two beside 6 peers that hold a quarter or half of every FFN
(`2_full_6_quarter`, `2_full_6_half`), 8 quarter-width peers alone (`8_quarter`), and 8 full ones (`8_full`), which is
what the help is measured against. All peers see equally many tokens, and none gets another's. Losses are held-out, in
nats per byte, of the agreed weights at the width named. A difference is the mean over seeds of the paired ratios, in
percent, with its 95% interval (Student's t); below zero is better. Exit code 1 if a target is missed:

* tier-0 loss of 2 full + 6 quarter over 2 full: at most -0.5%, and the interval excludes 0
* tier-0 loss of 2 full + 6 half over 2 full: at most -1.5%, likewise
* quarter-width loss of 2 full + 6 quarter over 8 quarter alone: at most +1%

The JSON object is the last line on stdout, progress goes to stderr.

    python benchmarks/tiers.py --json --results benchmarks/results/tiers
    python benchmarks/tiers.py --quick --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from braniac.model.sources import Corpus
from braniac.node.founding import TURNS
from braniac.protocol.codec import CodecRules
from braniac.protocol.manifest import MergeRules
from outer import command
from outer.braniac import Braniac
from outer.results import Results
from outer.swarm import MICRO, Plan

FULL, HALF, QUARTER = range(3)
"""Tiers of a model with matformer_factor 4."""

SWARMS = {
    "2_full": (FULL,) * 2,
    "2_full_6_quarter": (FULL,) * 2 + (QUARTER,) * 6,
    "8_quarter": (QUARTER,) * 8,
    "2_full_6_half": (FULL,) * 2 + (HALF,) * 6,
    "8_full": (FULL,) * 8,
}
LARGER = replace(command.MODEL, matformer_factor=4)
"""1,048,576 parameters, of which quarter-width peers hold half."""


@dataclass(frozen=True)
class Question:
    """A swarm against another, at one width."""

    swarm: str
    against: str
    tier: int
    most_percent: float | None = None
    """Target: how much higher its loss may be."""
    certain: bool = False
    """Whether the interval has to exclude 0."""


QUESTIONS = {
    "quarter_peers_help_full": Question("2_full_6_quarter", "2_full", FULL, -0.5, certain=True),
    "half_peers_help_full": Question("2_full_6_half", "2_full", FULL, -1.5, certain=True),
    "full_peers_help_full": Question("8_full", "2_full", FULL),
    "quarter_model_beside_full_peers": Question("2_full_6_quarter", "8_quarter", QUARTER, 1.0),
}


def answer(question: Question, losses: Mapping[str, Sequence[Mapping[int, float]]]) -> dict[str, Any]:
    """Mean and 95% interval of the paired differences in percent. `losses`: by swarm, seed and tier."""
    pairs = zip(losses[question.swarm], losses[question.against], strict=True)
    differences = [100 * (ours[question.tier] / theirs[question.tier] - 1) for ours, theirs in pairs]
    mean = statistics.mean(differences)
    found: dict[str, Any] = {"percent": round(mean, 3), "by_seed": [round(each, 3) for each in differences]}
    low = high = mean
    if len(differences) > 1:
        error = statistics.stdev(differences) / len(differences) ** 0.5
        half = float(stats.t.ppf(0.975, len(differences) - 1)) * error
        low, high = mean - half, mean + half
        found["interval"] = [round(low, 3), round(high, 3)]
    if question.most_percent is not None:
        found["target"] = question.most_percent
        found["met"] = mean <= question.most_percent and (not question.certain or not low <= 0 <= high)
    return found


def measure(plan: Plan, corpus: Corpus, seeds: Sequence[int], results: Results | None) -> dict[str, Any]:
    """Train all swarms with all seeds, and answer the questions."""
    losses: dict[str, list[dict[int, float]]] = {name: [] for name in SWARMS}
    for seed in seeds:
        for name, tiers in SWARMS.items():
            swarm = Braniac(replace(plan, tiers=tiers, seed=seed), corpus)
            swarm.run()
            found = swarm.agreed_losses()
            losses[name].append(found)
            sys.stderr.write(f"seed {seed}, {name}: {found}\n")
            if results is not None:
                rows = [(name, seed, tier, loss, swarm.books.bytes_per_peer) for tier, loss in found.items()]
                results.add_rows("tiers", ("swarm", "seed", "tier", "loss", "bytes_per_peer"), rows)
    means = {
        name: {tier: round(statistics.mean(each[tier] for each in by_seed), 5) for tier in by_seed[0]}
        for name, by_seed in losses.items()
    }
    return {"loss": means, **{name: answer(question, losses) for name, question in QUESTIONS.items()}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[], help="files, folders or hf:// (default: the standard library)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: 5)")
    parser.add_argument("--windows", type=int, default=120, help="of H steps")
    parser.add_argument("--steps", type=int, default=5, help="H, inner steps per window")
    parser.add_argument("--batch", type=int, default=4, help="windows of text per step")
    parser.add_argument("--fragments", type=int, default=5, help="parts of the model that are exchanged in turn")
    parser.add_argument("--up", type=int, default=64, help="values of 4096 that a peer sends")
    parser.add_argument("--down", type=int, default=512, help="values of 4096 in a merged update")
    parser.add_argument("--coverage", type=int, default=1, choices=(0, 1, 2), help="normaliser, see merge.py")
    parser.add_argument("--step", type=float, default=1.0, help="outer step size")
    parser.add_argument("--rate", type=float, default=1.0, help="factor on the inner learning rates")
    parser.add_argument("--larger", action="store_true", help="1M parameters instead of 82k")
    parser.add_argument("--quick", action="store_true", help="one seed, a tenth of the windows: under a minute")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    parser.add_argument("--results", type=Path, help="a new folder for CSV files, such as benchmarks/results/NAME")
    return parser


def main() -> int:
    parser = _parser()
    options = parser.parse_args()
    torch.set_num_threads(1)
    began_s = time.process_time()
    plan = Plan(
        config=LARGER if options.larger else MICRO,
        windows=options.windows // 10 if options.quick else options.windows,
        steps=options.steps,
        batch=options.batch,
        fragments=options.fragments,
        rate=options.rate,
        cooldown=True,
        up=CodecRules(options.up, 1, TURNS),
        down=CodecRules(options.down, 2),
        merge=MergeRules(step_q16=round(options.step * 65536), coverage_halves=options.coverage),
    )
    seeds = range(1 if options.quick else options.seeds)
    with command.one_sentence(parser):
        corpus = command.corpus_of(options, plan)
        results = Results(options.results) if options.results else None
        if results is not None:
            results.write_about(plan, vars(options))
        report = measure(plan, corpus, seeds, results)
    report["missed"] = [] if options.quick else [name for name in QUESTIONS if report[name].get("met") is False]
    report |= {"tokens_per_peer": plan.tokens_per_peer, "seeds": len(seeds), "text": corpus.name}
    report["cpu_s"] = round(time.process_time() - began_s, 1)
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))
    return 1 if report["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
