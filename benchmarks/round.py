"""A round of averaging, live: our daemons against hivemind's averager, four peers on loopback, and one of them killed.

Both have the weights of the same preset and real libp2p daemons. hivemind averages all values of all peers in one
all-reduce (`DecentralizedAverager` with its default timeouts, float16 or 8 bits per value). Ours is the production
program: a window of slots, in which each fragment is due once and of each tile the largest values are merged; the rest
waits in the peers' own weights for later windows. So a round of ours moves fewer values; the figures per parameter say
what a round costs, not that both have done the same.

`seconds`: hivemind's averager has nothing else to do and runs as fast as it can; ours is paced, a window lasts as long
as its slots while training goes on (here: for 1% of the time). `bytes_per_peer`: uplink, as the kernel counted it on a
loopback device of the benchmark's own (a network namespace), with headers and all chatter. `cpu_s_per_peer`: all
processes of a peer.

Then one of four is killed with SIGKILL, all its processes, in the middle of a round. `lost_s`: of hivemind, how much
longer than usual the survivors' round took, or null if somebody had not ended at the deadline (`hung`); of ours, the
longest time for which there was no certificate although one was due. Nobody's training stops for that.
`agree_percent`: the share of the parameters on which the survivors agree afterwards; of hivemind up to a tenth of their
standard deviation, as its codecs round, of ours bit for bit.

The JSON object is the last line on stdout. Linux only. hivemind leaves shared memory behind when it is killed; it is
removed.

    python benchmarks/round.py --json --results benchmarks/results/round
    python benchmarks/round.py --quick --json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from hivemind_peer import CODECS

from braniac.model.config import PRESETS
from braniac.model.fragments import fragment_table
from braniac.node.errors import NodeError
from live.daemons import our_figures
from live.hivemind_group import hivemind_figures, hivemind_kill
from live.usage import PEERS, Failed
from outer import command
from outer.results import Results


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """The report; what could not be measured has an error in place of figures."""
    config = PRESETS[options.preset]
    parameters = sum(fragment.size for fragment in fragment_table(config, 4))
    report: dict[str, Any] = {"peers": PEERS, "preset": options.preset, "parameters": parameters}
    ours = partial(our_figures, options.preset, options.slot_s, options.fragments, options.windows)
    report["braniac"] = attempted(ours, parameters)
    for codec in options.codecs:
        figures = attempted(partial(hivemind_figures, options.preset, codec, options.rounds), parameters)
        report[f"hivemind_{codec}"] = figures
        if "error" not in figures:
            one = partial(hivemind_kill, options.preset, codec, figures["seconds"])
            figures["kills"] = [attempted(one) for _ in range(options.kills)]
    return report


def attempted(measure: Callable[[], dict[str, Any]], parameters: int = 0) -> dict[str, Any]:
    """Figures, also per parameter if its number is given; or the error."""
    try:
        figures = measure()
    except (Failed, NodeError, TimeoutError, psutil.Error) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    for key in ("seconds", "bytes_per_peer", "cpu_s_per_peer") if parameters else ():
        figures[f"{key}_per_parameter"] = float(f"{figures[key] / parameters:.4g}")
    sys.stderr.write(f"{figures}\n")
    return figures


def keep(results: Results, report: dict[str, Any]) -> None:
    """Write one row per system, and one per kill, into CSV files; what could not be measured is left out."""
    for system, figures in report.items():
        if not isinstance(figures, dict) or "error" in figures:
            continue
        columns = ("seconds", "bytes_per_peer", "cpu_s_per_peer", "rounds")
        row = (system, report["parameters"], *(figures[column] for column in columns))
        results.add_rows("round", ("system", "parameters", *columns), [row])
        kills = figures.get("kills", [figures.get("kill", {})])
        rows = [(system, k.get("hung", 0), k["lost_s"], k.get("agree_percent")) for k in kills if "lost_s" in k]
        results.add_rows("round_kills", ("system", "hung", "lost_s", "agree_percent"), rows)


def enter_namespace() -> None:
    """Start again with a loopback device of one's own; returns there. Raises SystemExit."""
    if os.environ.get("BRANIAC_ROUND_NAMESPACE"):
        return
    inside = f'ip link set lo up && exec "{sys.executable}" "$@"'
    command = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", inside, "sh", *sys.argv]
    environment = {**os.environ, "BRANIAC_ROUND_NAMESPACE": "1", "OMP_NUM_THREADS": "1"}
    try:
        probe = subprocess.run([*command[:6], "ip link set lo up"], capture_output=True, text=True)
    except OSError as error:
        raise SystemExit(f"round.py counts bytes in a network namespace, and needs unshare for it: {error}") from None
    if probe.returncode:
        sentence = probe.stderr.strip()
        raise SystemExit(f"round.py counts bytes in a network namespace, which this system does not allow: {sentence}")
    os.execvpe(command[0], command, environment)


def codecs(text: str) -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in CODECS:
            raise argparse.ArgumentTypeError(f"hivemind is not compared with {name!r}: choose from {', '.join(CODECS)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--codecs", type=codecs, default=list(CODECS), help="of hivemind, with commas")
    parser.add_argument("--rounds", type=int, default=5, help="of hivemind")
    parser.add_argument("--windows", type=int, default=2, help="of ours")
    parser.add_argument("--slot-s", type=float, default=2.0)
    parser.add_argument("--fragments", type=int, default=8)
    parser.add_argument("--kills", type=int, default=3, help="of hivemind, each in a new group")
    parser.add_argument("--quick", action="store_true", help="the smallest preset, one codec, one kill")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    parser.add_argument("--results", type=Path, help="a new folder for CSV files, such as benchmarks/results/NAME")
    options = parser.parse_args()
    if options.quick:
        quick = {"preset": "tiny", "codecs": ["float16"], "rounds": 2, "windows": 1, "slot_s": 0.5, "kills": 1}
        vars(options).update(quick)
    enter_namespace()
    with command.one_sentence(parser):
        results = Results(options.results) if options.results else None
    report = compare(options)
    if results is not None:
        results.write_about(None, vars(options))
        keep(results, report)
    print(json.dumps(report, indent=None if options.json else 2, allow_nan=False))
    return 1 if any("error" in each for each in report.values() if isinstance(each, dict)) else 0


if __name__ == "__main__":
    sys.exit(main())
