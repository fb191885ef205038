"""What absence costs: in every slot each of 8 peers is missing with some probability, half of the time by SIGKILL.

A peer that is merely out of reach trains on, offers nothing to the slot, and keeps its work. One that is killed trains
nothing in the slot and goes back to its last generation, which a node writes with every offer; then it applies the
certificates since, as a restarted node does. Reported is how much higher the final loss of the agreed weights is than
without absence after equally many slots, the mean over seeds. Real trainers, codec, merge and ledger
(outer/braniac.py). The JSON object is the last line on stdout, progress goes to stderr. Exit code 1 if a target is
missed.

    python benchmarks/absence.py --json
    python benchmarks/absence.py --quick --json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from braniac.model.fragments import Fragment
from braniac.model.sources import Corpus
from braniac.node.text import default_text
from outer.braniac import Braniac, Offer, percent_over
from outer.swarm import Peer, Plan

TARGETS_PERCENT = {10: 0.5, 25: 1.0, 50: 3.0}
"""By share of the peers that miss a slot, in percent."""
_WINDOWS = 120  # ten times Plan's: early in training every missing step shows


@dataclass
class Generation:
    """What a killed peer goes back to, and what it then applies again."""

    tensors: dict[str, torch.Tensor]
    counters: dict[str, int]
    since: list[tuple[Fragment, torch.Tensor]] = field(default_factory=list)
    """Changes by certificates."""


class Absence(Braniac):
    """A swarm whose peers are missing now and then."""

    def __init__(self, plan: Plan, corpus: Corpus, percent: int, killed: float) -> None:
        """`killed`: share of the absences that are kills."""
        super().__init__(plan, corpus)
        self._percent = percent
        self._killed = killed
        self._generations = [Generation(*peer.trainer.state()) for peer in self.peers]
        self._missing: set[int] = set()
        self._dead: set[int] = set()
        self.kills = 0
        self.steps_done = 0
        """By all peers, those included that kills have taken back."""

    def train(self, slot: int) -> None:
        chances = np.random.default_rng((self.plan.seed, slot)).random((len(self.peers), 2))
        self._missing = set(np.flatnonzero(100 * chances[:, 0] < self._percent).tolist())
        self._dead = {number for number in self._missing if chances[number, 1] < self._killed}
        for peer in self.peers:
            if peer.number in self._dead:
                self._restart(peer)
            else:
                before = peer.trainer.step_count
                self.train_peer(peer, slot)
                self.steps_done += peer.trainer.step_count - before

    def _restart(self, peer: Peer) -> None:
        self.kills += 1
        generation = self._generations[peer.number]
        peer.trainer.load_state(generation.tensors, generation.counters)
        for fragment, change in generation.since:
            peer.trainer.rebase(fragment, change)

    def offers(self, slot: int) -> dict[int, Offer]:
        found = {number: offer for number, offer in super().offers(slot).items() if number not in self._missing}
        for number in found:
            self._generations[number] = Generation(*self.peers[number].trainer.state())
        return found

    def end_turn(self, peer: Peer, fragment: Fragment, taken: bool) -> None:
        if peer.number not in self._dead:  # it offered nothing, and does not know of the turn
            super().end_turn(peer, fragment, taken)

    def change(self, peer: Peer, fragment: Fragment, change: torch.Tensor) -> None:
        super().change(peer, fragment, change)
        self._generations[peer.number].since.append((fragment, change))


def measure(plan: Plan, corpus: Corpus, seeds: Sequence[int], percents: Sequence[int], killed: float) -> dict[str, Any]:
    """Final losses at each share of absence, over those without."""
    clean = _losses(plan, corpus, seeds, 0, killed)[0]
    report: dict[str, Any] = {"loss_clean": clean, "absence": {}}
    for percent in percents:
        losses, swarms = _losses(plan, corpus, seeds, percent, killed)
        kept = sum(peer.trainer.step_count for swarm in swarms for peer in swarm.peers)
        full = len(seeds) * len(plan.tiers) * plan.windows * plan.steps
        report["absence"][str(percent)] = {
            "over_clean_percent": round(percent_over(losses, clean), 2),
            "by_seed_percent": [round(percent_over([a], [b]), 2) for a, b in zip(losses, clean, strict=True)],
            "kills": sum(swarm.kills for swarm in swarms),
            "steps_taken_back": sum(swarm.steps_done for swarm in swarms) - kept,
            "steps_kept_percent": round(100 * kept / full, 1),
        }
        sys.stderr.write(f"{percent}%: {report['absence'][str(percent)]}\n")
    return report


def _losses(
    plan: Plan, corpus: Corpus, seeds: Sequence[int], percent: int, killed: float
) -> tuple[list[float], list[Absence]]:
    swarms = [Absence(replace(plan, seed=seed), corpus, percent, killed) for seed in seeds]
    for swarm in swarms:
        swarm.run()
    return [swarm.agreed_losses()[0] for swarm in swarms], swarms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--windows", type=int, default=_WINDOWS)
    parser.add_argument("--killed", type=float, default=0.5, help="share of the absences that are kills")
    parser.add_argument("--quick", action="store_true", help="one seed, a fifteenth as long: under a minute")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began_s = time.process_time()
    plan = Plan(windows=_WINDOWS // 15 if options.quick else options.windows, cooldown=True)
    seeds = range(1 if options.quick else options.seeds)
    corpus = default_text().load(plan.config.vocab_size)
    report = measure(plan, corpus, seeds, list(TARGETS_PERCENT), options.killed)
    found = report["absence"].items()
    report["missed"] = [p for p, outcome in found if outcome["over_clean_percent"] > TARGETS_PERCENT[int(p)]]
    report |= {"seeds": len(seeds), "cpu_s": round(time.process_time() - began_s, 1)}
    print(json.dumps(report) if options.json else json.dumps(report, indent=2))
    return 1 if report["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
