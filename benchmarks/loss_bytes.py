"""Loss against bytes: every way to learn together, on the same model, text, tokens, seeds and inner optimizer.

For each method (outer/methods.py; what each sends and where it departs from what was published is in its docstring):
held-out loss of the agreed weights in nats per byte, uplink and downlink bytes per peer, its largest message, and the
worst ratio of a step's uplink to the mean. Learning rates are swept with the first seed, and the best taken for all:
--rates are factors on the inner optimizer's (DeMo and DisTrO: on their own), tried with the first of the --outer-rates,
which are factors on the outer step and tried with the best of the others.

Then Braniac is trained again with a 150th of DiLoCo's traffic (`braniac_at_diloco`), and with that of DeMo, DisTrO and
SparseLoCo: as many windows and values as fill it, a few such plans tried with the first seed. Traffic is what a peer
sends and receives together. What it sends alone would not do: some upload once, to a store that serves the downloads of
all, and a swarm without a server has none. Both figures are in the report.

Targets: Braniac's loss is within 1% of DiLoCo's with 1/150 of its traffic, and below that of these three with no more
than theirs. The JSON object is the last line on stdout, progress goes to stderr. Exit code 1 if a target is missed; a
quick run is too short to judge.

    python benchmarks/loss_bytes.py --json --results benchmarks/results/loss_bytes
    python benchmarks/loss_bytes.py --quick --json
    python benchmarks/loss_bytes.py --methods diloco,demo,braniac --rates 0.5,1,2 --rates demo=1,4,16 --outer-rates 1,2
    python benchmarks/loss_bytes.py --model 82k --windows 600 --steps 5 --batch 4 --fragments 5 --jobs 8 --json
"""

from __future__ import annotations

import sys
from typing import Any

from outer import command
from outer.budget import within
from outer.compare import Contest, rates_for, sweeps, workers
from outer.methods import METHODS

RIVALS = {"diloco": (1.01, 150), "demo": (1.0, 1), "distro": (1.0, 1), "sparseloco": (1.0, 1)}
"""Braniac's loss over theirs, at most, with such a part of their traffic."""


def at(rival: str) -> str:
    """The name of Braniac with the traffic of a rival."""
    return f"braniac_at_{rival}"


def missed(methods: dict[str, dict[str, Any]]) -> list[str]:
    """Targets that were not reached, of those whose methods were run."""
    found = [f"{name} diverged" for name, figures in methods.items() if "diverged" in figures]
    if found:
        return found
    for name, (margin, ratio) in RIVALS.items():
        if (other := methods.get(name)) is None or (ours := methods.get(at(name))) is None:
            continue
        if ours["loss"] > margin * other["loss"]:
            found.append(f"loss of {name}")
        if ratio * ours["traffic_per_peer"] > other["traffic_per_peer"]:
            found.append(f"bytes of {name}")
    return found


def main() -> int:
    parser = command.parser(__doc__)
    parser.add_argument("--rates", action="append", default=[], help="factors, for all or as METHOD=LIST; repeatable")
    parser.add_argument("--outer-rates", action="append", default=[], help="likewise")
    parser.add_argument("--jobs", type=command.positive, default=1, help="processes to run in (default: 1)")
    options = parser.parse_args()
    with command.one_sentence(parser):
        known = list(METHODS)
        rates, outer_rates = rates_for(options.rates, known), rates_for(options.outer_rates, known)
        setup = command.set_up(options, METHODS, outer_rates["braniac"])
    methods: dict[str, dict[str, Any]] = {}

    def hold(contests: list[Contest]) -> None:
        for contest, runs in zip(contests, sweeps(contests, setup.corpus, setup.seeds, do), strict=True):
            methods[contest.name] = runs.summary()
            if contest.method is METHODS["braniac"]:
                plan = runs.plan
                methods[contest.name] |= {"steps": plan.steps, "up": plan.up.per_tile, "down": plan.down.per_tile}
            sys.stderr.write(f"{contest.name}: {methods[contest.name]}\n")
            if setup.results is not None:
                setup.results.add_outcomes("loss_bytes", runs.best)
                setup.results.add_outcomes("sweep", runs.tried)

    with workers(options.jobs) as do:
        hold([Contest(n, method, [setup.plan], rates[n], outer_rates[n]) for n, method in setup.methods.items()])
        if ours := methods.get("braniac"):
            swept = [ours["rate"]], [ours["outer_rate"]]
            traffic = {rival: methods.get(rival, {}).get("traffic_per_peer", 0) for rival in RIVALS}
            plans = {rival: within(setup.plan, traffic[rival] / ratio) for rival, (_, ratio) in RIVALS.items()}
            hold([Contest(at(rival), METHODS["braniac"], of, *swept) for rival, of in plans.items() if of])
    targets_missed = [] if options.quick else missed(methods)
    command.show(options, setup, {"methods": methods, "missed": targets_missed})
    return 1 if targets_missed else 0


if __name__ == "__main__":
    sys.exit(main())
