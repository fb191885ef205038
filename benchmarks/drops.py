"""What it costs when peers drop out in the middle of a transfer: loss at 0, 10, 25 and 50% of them, for every method.

In each exchange each peer drops out with that probability. What becomes of its work is what the method makes of it (see
outer/): DiLoCo's mean goes on without it, `diloco_torchft` throws everybody's last H steps away, SparseLoCo and DeMo
lose what it had sent, in Braniac it stays in the peer's weights. Methods that exchange more often have more exchanges
to drop out of. Reported: held-out loss, the mean over seeds, and how much higher it is than without drops, in percent.
Target: at most 1% at 25% for Braniac; a quick run is too short to judge. The JSON object is the last line on stdout.
Kills of whole processes are another matter: they cost what was trained since the last generation on disk.

    python benchmarks/drops.py --json --results benchmarks/results/drops
    python benchmarks/drops.py --quick --json
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from typing import Any

from outer import command
from outer.compare import run
from outer.methods import FAILING, METHODS

PERCENTS = (0, 10, 25, 50)
TARGETS_PERCENT = {25: 1.0}
"""How much higher Braniac's loss may be, by percentage of drops."""


def main() -> int:
    parser = command.parser(__doc__)
    options = parser.parse_args()
    with command.one_sentence(parser):
        setup = command.set_up(options, {**METHODS, **FAILING})
    methods: dict[str, dict[str, Any]] = {}
    for name, method in setup.methods.items():
        losses = {}
        for percent in PERCENTS:
            plans = [replace(setup.plan, seed=seed, missing_percent=percent) for seed in setup.seeds]
            outcomes = [run(name, method, plan, setup.corpus) for plan in plans]
            losses[percent] = statistics.mean(outcome.loss for outcome in outcomes)
            if setup.results is not None:
                setup.results.add_outcomes("drops", outcomes)
        over = {percent: round(100 * (loss / losses[0] - 1), 2) for percent, loss in losses.items()}
        methods[name] = {"loss": {percent: round(loss, 5) for percent, loss in losses.items()}, "over_percent": over}
        sys.stderr.write(f"{name}: {methods[name]}\n")
    over = methods.get("braniac", {}).get("over_percent", {})
    missed = [f"{percent}%" for percent, most in TARGETS_PERCENT.items() if over.get(percent, 0) > most]
    missed = [] if options.quick else missed
    command.show(options, setup, {"methods": methods, "missed": missed})
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
