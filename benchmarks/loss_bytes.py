"""Loss against bytes: every way to learn together, on the same model, text, tokens, seeds and inner optimizer.

For each method (outer/methods.py; what each sends and where it departs from what was published is in its docstring):
held-out loss of the agreed weights in nats per byte, uplink and downlink bytes per peer, its largest message, and the
worst ratio of a step's uplink to the mean. Learning rates are swept with the first seed, and the best taken for all:
--rates are factors on the inner optimizer's (DeMo and DisTrO: on their own), tried with the first of the --outer-rates,
which are factors on the outer step and tried with the best of the others. Then Braniac is trained again with as short
windows and as many values as the uplink of DeMo, DisTrO and SparseLoCo allows (`braniac_at_demo`; swept likewise).

Targets: Braniac's loss is within 1% of DiLoCo's with 1/150 of its bytes, and below that of these three with no more
bytes than theirs. The JSON object is the last line on stdout, progress goes to stderr. Exit code 1 if a target is
missed; a quick run is too short to judge.

    python benchmarks/loss_bytes.py --json --results benchmarks/results/loss_bytes
    python benchmarks/loss_bytes.py --quick --json
    python benchmarks/loss_bytes.py --methods diloco,demo,braniac --rates 0.5,1,2 --rates demo=1,4,16 --outer-rates 1,2
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from outer import command
from outer.budget import within
from outer.compare import rates_for, sweep
from outer.methods import METHODS, Method
from outer.swarm import Plan

LOSS_MARGIN = 1.01
BYTES_RATIO = 150
BEATEN = ("demo", "distro", "sparseloco")
"""At their own bytes."""


def at(rival: str) -> str:
    """The name of Braniac with the bytes of a rival."""
    return f"braniac_at_{rival}"


def contests(setup: command.Setup, trained: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, Method, Plan]]:
    """What to train: a name, whose rates it takes, the method and the plan. The later ones depend on those before."""
    for name, method in setup.methods.items():
        yield name, name, method, setup.plan
    for rival in BEATEN if "braniac" in setup.methods else ():
        bytes_per_peer = trained.get(rival, {}).get("bytes_per_peer", 0)
        if (plan := within(setup.plan, bytes_per_peer)) is not None:
            yield at(rival), "braniac", setup.methods["braniac"], plan


def missed(methods: dict[str, dict[str, Any]]) -> list[str]:
    """Targets that were not reached, of those whose methods were run."""
    found = [f"{name} diverged" for name, figures in methods.items() if "diverged" in figures]
    if found:
        return found
    rivals = {"diloco": ("braniac", LOSS_MARGIN, BYTES_RATIO), **{name: (at(name), 1.0, 1) for name in BEATEN}}
    for name, (of_ours, margin, ratio) in rivals.items():
        if (other := methods.get(name)) is None or (ours := methods.get(of_ours)) is None:
            continue
        if ours["loss"] > margin * other["loss"]:
            found.append(f"loss of {name}")
        if ratio * ours["bytes_per_peer"] > other["bytes_per_peer"]:
            found.append(f"bytes of {name}")
    return found


def main() -> int:
    parser = command.parser(__doc__)
    parser.add_argument("--rates", action="append", default=[], help="factors, for all or as METHOD=LIST; repeatable")
    parser.add_argument("--outer-rates", action="append", default=[], help="likewise")
    options = parser.parse_args()
    with command.one_sentence(parser):
        known = list(METHODS)
        rates, outer_rates = rates_for(options.rates, known), rates_for(options.outer_rates, known)
        setup = command.set_up(options, METHODS, outer_rates["braniac"])
    methods: dict[str, dict[str, Any]] = {}
    for name, base, method, plan in contests(setup, methods):
        runs = sweep(name, method, plan, setup.corpus, setup.seeds, rates[base], outer_rates[base])
        methods[name] = runs.summary()
        if base == "braniac":
            methods[name] |= {"steps": plan.steps, "values_up": plan.up.per_tile, "values_down": plan.down.per_tile}
        sys.stderr.write(f"{name}: {methods[name]}\n")
        if setup.results is not None:
            setup.results.add_outcomes("loss_bytes", runs.best)
            setup.results.add_outcomes("sweep", runs.tried)
    targets_missed = [] if options.quick else missed(methods)
    command.show(options, setup, {"methods": methods, "missed": targets_missed})
    return 1 if targets_missed else 0


if __name__ == "__main__":
    sys.exit(main())
