"""How bursty each method is: the uplink of each peer in buckets of one second, at one inner step per second.

Reported per method: the worst peer's peak over its mean, peak and mean in bytes per second, the largest message to one
receiver, and how long a slow uplink would be busy with the worst second. A rival's message counts in the second in
which it is due; nodes with `caps.upload_pace` spread theirs (`braniac_paced`, outer/uplinks.py). Target: peak over mean
of at most 2 for Braniac. The JSON object is the last line on stdout. Exit code 1 if the target is missed.

    python benchmarks/burst.py --json --results benchmarks/results/burst
    python benchmarks/burst.py --quick --json
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from outer import command
from outer.books import Books
from outer.braniac import Braniac
from outer.methods import METHODS

TARGET = 2.0
SLOW_BYTES_PER_S = 1_250_000
"""10 Mbit/s, the uplink of many homes and phones."""


class Paced(Braniac):
    """All nodes send evenly."""

    pace = 1.5


def figures(books: Books) -> dict[str, Any]:
    """Of one run."""
    worst = int(books.uplink.max(0).argmax())
    return {
        "peak_to_mean": round(books.peak_to_mean(), 3),
        "peak_bytes_per_s": int(books.uplink[:, worst].max()),
        "mean_bytes_per_s": round(float(books.uplink[:, worst].mean()), 1),
        "largest_message_bytes": books.largest_message,
        "slow_uplink_busy_s": float(books.uplink.max() / SLOW_BYTES_PER_S),
    }


def rows(name: str, books: Books) -> Iterator[tuple[object, ...]]:
    """The course of the uplink, for a picture."""
    for second, of_peers in enumerate(books.uplink):
        yield name, second, round(float(of_peers.mean()), 1), int(of_peers.max())


def main() -> int:
    parser = command.parser(__doc__)
    options = parser.parse_args()
    with command.one_sentence(parser):
        setup = command.set_up(options, {**METHODS, "braniac_paced": Paced})
    methods: dict[str, dict[str, Any]] = {}
    for name, method in setup.methods.items():
        swarm = method(setup.plan, setup.corpus)
        swarm.run()
        methods[name] = figures(swarm.books)
        sys.stderr.write(f"{name}: {methods[name]}\n")
        if setup.results is not None:
            header = ("method", "second", "mean_bytes", "busiest_bytes")
            setup.results.add_rows("burst", header, rows(name, swarm.books))
    missed = ["braniac"] if methods.get("braniac", {"peak_to_mean": 0})["peak_to_mean"] > TARGET else []
    command.show(options, setup, {"methods": methods, "missed": missed})
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
