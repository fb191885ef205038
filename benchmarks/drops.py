"""What it costs when peers drop out in the middle of a transfer: loss at 0, 10, 25 and 50% of them, for every method.

In each exchange each peer drops out with that probability. What becomes of its work is what the method makes of it (see
outer/): DiLoCo's mean goes on without it, `diloco_torchft` throws everybody's last H steps away, SparseLoCo and DeMo
lose what it had sent, in Braniac it stays in the peer's weights. Methods that exchange more often have more exchanges
to drop out of. Reported: held-out loss, the mean over seeds, and how much higher it is than without drops, in percent;
null where a training diverged, and then the method has `diverged: true`.
Target: at most 1% at 25% for Braniac; a quick run is too short to judge. The JSON object is the last line on stdout.
Kills of whole processes are another matter: they cost what was trained since the last generation on disk.

    python benchmarks/drops.py --json --results benchmarks/results/drops
    python benchmarks/drops.py --quick --json
"""

from __future__ import annotations

import math
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


def figures(losses: dict[int, float]) -> dict[str, Any]:
    """Of one method, in a form for JSON, from its mean losses by percentage of drops; infinite ones are of no use."""
    clean = losses[0] if math.isfinite(losses[0]) else math.nan  # nothing compares with a run that diverged
    over = {percent: 100 * (loss / clean - 1) for percent, loss in losses.items()}
    found = {"loss": _finite(losses, 5), "over_percent": _finite(over, 2)}
    return found if all(map(math.isfinite, losses.values())) else {**found, "diverged": True}


def _finite(values: dict[int, float], digits: int) -> dict[int, float | None]:
    return {percent: round(value, digits) if math.isfinite(value) else None for percent, value in values.items()}


def missed(methods: dict[str, dict[str, Any]]) -> list[str]:
    """Targets that Braniac did not reach, if it was run."""
    if "braniac" not in methods:
        return []
    over = methods["braniac"]["over_percent"]
    return [f"{percent}%" for percent, most in TARGETS_PERCENT.items() if over[percent] is None or over[percent] > most]


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
        methods[name] = figures(losses)
        sys.stderr.write(f"{name}: {methods[name]}\n")
    targets_missed = [] if options.quick else missed(methods)
    command.show(options, setup, {"methods": methods, "missed": targets_missed})
    return 1 if targets_missed else 0


if __name__ == "__main__":
    sys.exit(main())
