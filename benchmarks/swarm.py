"""The whole system at once: real daemons on loopback, some of them killed, and one JSON object with the figures.

The same run and the same keys as `braniac-node swarm --json`; the JSON object is the last line on stdout, the log goes
to stderr. Exit code 1 if a check fails. Runs and what they gave are in RESULTS.md.

    python benchmarks/swarm.py --nodes 4 --tiers 0,1,2,3 --seconds 120 --kill 2
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from braniac.model.config import PRESETS
from braniac.node.commands import json_text, parse_tiers
from braniac.node.errors import NodeError
from braniac.node.failures import explain
from braniac.node.faults import Wish
from braniac.node.swarm import run_swarm
from braniac.node.swarm_options import SwarmOptions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--tiers", default="0,1,2,3", help="dealt out to the nodes in turn")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to train after the last node joined")
    parser.add_argument("--kill", type=int, default=2, help="how often to SIGKILL and restart a node")
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the kills")
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--slot-s", type=float, default=1.0, help="slot length in seconds")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every daemon")
    parser.add_argument("--keep-dir", type=Path, help="keep states and logs here")
    arguments = parser.parse_args()
    try:
        options = SwarmOptions(
            nodes=arguments.nodes,
            tiers=parse_tiers(arguments.tiers),
            seconds=arguments.seconds,
            faults=(Wish("kill"),) * arguments.kill,
            seed=arguments.seed,
            preset=arguments.preset,
            slot_s=arguments.slot_s,
            sets=tuple(arguments.set),
            keep_dir=arguments.keep_dir,
            json=True,
        )
        report = run_swarm(options)
    except NodeError as error:
        return explain(error)
    print(json_text(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
