"""Many simulations of a whole swarm under faults, one per seed; or one of them again, with everything that nodes log.

Prints how many seeds broke an invariant or never recovered, each with the command that repeats exactly that run. The
JSON object is the last line on stdout, progress goes to stderr. Exit code 1 if a seed failed.

    python benchmarks/sim.py --seeds 2000 --json
    python benchmarks/sim.py --seed 17 --log
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # the simulator is part of the tests, which are not installed

from tests.sim.world import Outcome, Plan, simulate


def outcomes(seeds: Sequence[int], jobs: int) -> Iterator[Outcome]:
    """Run them, in order, in so many processes."""
    if jobs == 1:
        yield from map(simulate, seeds)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(simulate, seeds, chunksize=4)


def describe(outcome: Outcome) -> str:
    """One seed that failed, and how to see it again."""
    reasons = "; ".join(map(str, outcome.violations)) or f"never recovered: {outcome.stuck}"
    return f"seed {outcome.seed}: {reasons}\n    {replay(outcome.seed)}"


def replay(seed: int) -> str:
    """The command that repeats exactly that run."""
    return f"python benchmarks/sim.py --seed {seed} --log"


def report(found: Sequence[Outcome], real_s: float) -> dict[str, Any]:
    """All seeds in a few figures."""
    fired: Counter[str] = Counter()
    for outcome in found:
        fired.update(outcome.fired)
    good = [outcome for outcome in found if outcome.good]
    whole = sorted(outcome.whole_slots for outcome in good)
    flowing = sorted(outcome.flowing_slots for outcome in good)
    virtual_s, messages = sum(o.virtual_s for o in found), sum(o.messages for o in found)
    return {
        "seeds": len(found),
        "violations": sum(bool(outcome.violations) for outcome in found),
        "liveness_failures": sum(bool(outcome.stuck and not outcome.violations) for outcome in found),
        "failing": [{"seed": o.seed, "why": describe(o), "replay": replay(o.seed)} for o in found if not o.good],
        "trace": hashlib.blake2b("".join(o.trace for o in found).encode(), digest_size=16).hexdigest(),
        "messages": messages,
        "messages_per_s": round(messages / real_s),
        "virtual_s": round(virtual_s),
        "real_s": round(real_s, 1),
        "virtual_over_real_time": round(virtual_s / real_s, 1),
        "certificates": sum(o.certificates for o in found),
        "ledger_comparisons": sum(o.checked for o in found),
        "flowing_after_slots_median": statistics.median(flowing) if flowing else None,
        "flowing_after_slots_max": max(flowing, default=None),
        "whole_after_slots_median": statistics.median(whole) if whole else None,
        "whole_after_slots_max": max(whole, default=None),
        "faults": dict(sorted(fired.items())),
    }


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--log", action="store_true", help="with --seed: show what every node logs")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    options = parser.parse_args()
    began_s = time.perf_counter()
    found = []
    if options.seed is not None:
        sys.stderr.write(f"{Plan.draw(options.seed)}\n")
        found = [simulate(options.seed, show=options.log)]
    else:
        for outcome in outcomes(range(options.first, options.first + options.seeds), options.jobs):
            found.append(outcome)
            if not outcome.good:
                sys.stderr.write(f"{describe(outcome)}\n")
            if len(found) % 100 == 0:
                sys.stderr.write(f"{len(found)} seeds, {time.perf_counter() - began_s:.0f} s\n")
    result = report(found, time.perf_counter() - began_s)
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))
    return 0 if all(outcome.good for outcome in found) else 1


if __name__ == "__main__":
    sys.exit(main())
