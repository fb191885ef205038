"""What lateness costs Braniac: updates that arrive some slots late, and a peer at a quarter of the others' speed.

Late: everybody hears of a slot's update only after more slots have gone by, and trains on meanwhile; what is under way
at the end still arrives. Slow: one of 8 peers trains in every fourth slot only and says so, its weight in a merge is
what production makes of that; compared with 8 equal peers, and with the other seven alone. Reported are held-out losses
of the agreed weights after equally many slots, by seed, and how much higher they are than those of the first row: mean
and standard deviation over seeds, in percent. Real trainers, codec, merge and ledger (outer/braniac.py). The JSON
object is the last line on stdout, progress goes to stderr.

    python benchmarks/delay.py --json --results benchmarks/results/delay
    python benchmarks/delay.py --quick --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from braniac.model.fragments import Fragment
from braniac.model.sources import Corpus
from braniac.node.text import default_text
from braniac.protocol.merge import Merged
from outer import command
from outer.braniac import Braniac, Offer
from outer.results import Results
from outer.swarm import Peer, Plan

DELAYS = (0, 1, 2, 4)
"""In slots."""
SLOWNESS = 4
PEERS = 8
_WINDOWS = 16  # more than Plan's: early in training every missing step shows


class Late(Braniac):
    """Updates take effect `delay` slots after the slot that they are of."""

    def __init__(self, plan: Plan, corpus: Corpus, delay: int) -> None:
        super().__init__(plan, corpus)
        self._delay = delay
        self._under_way: deque[tuple[int, Merged, Mapping[int, Offer]]] = deque()

    def run(self, watch: Callable[[int], None] = lambda slot: None) -> None:
        super().run(watch)
        self._arrive(self.slots + self._delay)

    def exchange(self, slot: int) -> None:
        super().exchange(slot)
        self._arrive(slot)

    def settle(self, slot: int, merged: Merged, offers: Mapping[int, Offer]) -> None:
        self._under_way.append((slot, merged, offers))

    def _arrive(self, slot: int) -> None:
        while self._under_way and self._under_way[0][0] + self._delay <= slot:
            super().settle(*self._under_way.popleft())


class Unequal(Braniac):
    """The last peers of a swarm are slow; everybody says truly how many tokens a contribution was trained on."""

    def __init__(self, plan: Plan, corpus: Corpus, slow: int) -> None:
        super().__init__(plan, corpus)
        self._slow = {peer.number for peer in self.peers[len(self.peers) - slow :]}
        self._offered: dict[tuple[int, int], int] = {}
        """Steps that a peer had done when it last offered a fragment."""

    def train_peer(self, peer: Peer, slot: int) -> None:
        if peer.number not in self._slow or slot % SLOWNESS == 0:
            super().train_peer(peer, slot)

    def offer(self, peer: Peer, fragment: Fragment) -> Offer:
        found, key = super().offer(peer, fragment), (peer.number, fragment.index)
        steps = peer.trainer.step_count - self._offered.get(key, 0)
        self._offered[key] = peer.trainer.step_count
        tokens = steps * self.plan.batch * self.plan.config.context
        return replace(found, contribution=replace(found.contribution, tokens=tokens))


def cases() -> dict[str, tuple[int, Callable[[Plan, Corpus], Braniac]]]:
    """What is compared with the first, by name: how many peers, and how they live."""
    late = {f"{delay} slots late": (PEERS, partial(Late, delay=delay)) for delay in DELAYS}
    return {
        **late,
        "one of 8 at a quarter of the speed": (PEERS, partial(Unequal, slow=1)),
        "the other 7 alone": (PEERS - 1, partial(Unequal, slow=0)),
    }


def measure(plan: Plan, corpus: Corpus, seeds: Sequence[int], results: Results | None) -> dict[str, Any]:
    """Final losses of each case, over those of the first."""
    first: list[float] = []
    report: dict[str, Any] = {}
    for name, (peers, method) in cases().items():
        losses = []
        for seed in seeds:
            swarm = method(replace(plan, seed=seed, tiers=(0,) * peers), corpus)
            swarm.run()
            losses.append(swarm.loss())
        first = first or losses
        over = [100 * (loss / clean - 1) for loss, clean in zip(losses, first, strict=True)]
        report[name] = {
            "loss": round(statistics.mean(losses), 5),
            "over_percent": round(statistics.mean(over), 2),
            "over_percent_deviation": round(statistics.stdev(over), 2) if len(over) > 1 else None,
            "by_seed_percent": [round(each, 2) for each in over],
        }
        sys.stderr.write(f"{name}: {report[name]}\n")
        if results is not None:
            results.add_rows(
                "delay",
                ("case", "seed", "loss", "over_percent"),
                [(name, *row) for row in zip(seeds, losses, over, strict=True)],
            )
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--windows", type=int, default=_WINDOWS)
    parser.add_argument("--quick", action="store_true", help="one seed, a quarter as long: under a minute")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    parser.add_argument("--results", type=Path, help="a new folder for CSV files, such as benchmarks/results/NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began_s = time.process_time()
    plan = Plan(windows=_WINDOWS // 4 if options.quick else options.windows)
    seeds = range(1 if options.quick else options.seeds)
    with command.one_sentence(parser):
        results = Results(options.results) if options.results else None
        if results is not None:
            results.write_about(plan, vars(options))
        corpus = default_text().load(plan.config.vocab_size)
    report = {"cases": measure(plan, corpus, seeds, results), "seeds": len(seeds), "windows": plan.windows}
    report["cpu_s"] = round(time.process_time() - began_s, 1)
    print(json.dumps(report, indent=None if options.json else 2, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
