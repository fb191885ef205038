"""Loss against bytes: every way to learn together, on the same model, text, tokens, seeds and inner optimizer.

For each method (outer/methods.py; what each sends and where it departs from what was published is in its docstring):
held-out loss of the agreed weights in nats per byte, uplink and downlink bytes per peer, its largest message, and the
worst ratio of a step's uplink to the mean. Learning rates are swept with the first seed, and the best taken for all:
--rates are factors on the inner optimizer's (DeMo and DisTrO: on their own), --outer-rates on the outer step. Targets:
Braniac's loss is within 1% of DiLoCo's with 1/150 of its bytes, and below that of DeMo, DisTrO and SparseLoCo with no
more bytes than theirs. The JSON object is the last line on stdout, progress goes to stderr. Exit code 1 if a target is
missed; a quick run is too short to judge.

    python benchmarks/loss_bytes.py --json --results benchmarks/results/loss_bytes
    python benchmarks/loss_bytes.py --quick --json
    python benchmarks/loss_bytes.py --methods diloco,demo,braniac --rates 0.5,1,2 --rates demo=1,4,16 --outer-rates 1,2
"""

from __future__ import annotations

import sys
from typing import Any

from outer import command
from outer.compare import rates_for, sweep
from outer.methods import METHODS

LOSS_MARGIN = 1.01
BYTES_RATIO = 150
BEATEN = ("demo", "distro", "sparseloco")
"""At their own bytes."""


def missed(methods: dict[str, dict[str, Any]]) -> list[str]:
    """Targets that were not reached, of those whose methods were run."""
    found = [f"{name} diverged" for name, figures in methods.items() if "diverged" in figures]
    if found or "braniac" not in methods:
        return found
    ours = methods["braniac"]
    margins = {"diloco": (LOSS_MARGIN, BYTES_RATIO), **dict.fromkeys(BEATEN, (1.0, 1))}
    for name, (margin, ratio) in margins.items():
        if (other := methods.get(name)) is None:
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
    for name, method in setup.methods.items():
        runs = sweep(name, method, setup.plan, setup.corpus, setup.seeds, rates[name], outer_rates[name])
        methods[name] = runs.summary()
        sys.stderr.write(f"{name}: {methods[name]}\n")
        if setup.results is not None:
            setup.results.add_outcomes("loss_bytes", runs.best)
            setup.results.add_outcomes("sweep", runs.tried)
    targets_missed = [] if options.quick else missed(methods)
    command.show(options, setup, {"methods": methods, "missed": targets_missed})
    return 1 if targets_missed else 0


if __name__ == "__main__":
    sys.exit(main())
