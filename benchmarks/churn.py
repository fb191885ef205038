"""Real daemons that come and go: every half to two seconds one is started or killed, and the rest must not care.

The schedule is that of PCCL's stress test: after U(0.5, 2) s somebody is started with probability 0.6, else somebody is
killed (SIGKILL), as long as more than two are alive. Whoever is started again has the disk it had. Some nodes are
spared, so that there is somebody to whom the others' deaths happen for the whole time. All is judged from outside: by
what the daemons say over their control sockets, and what the kernel says of them.

`kills_of_trainers` counts those that hit a daemon which trained; the others were still starting. `hash_splits` are
fragments of which live nodes showed different bytes after the same slot for longer than a window. Training time is lost
where a spared node finished no step for longer than a slot. The JSON object is the last line on stdout; the exit code
is 1 if a check fails.

    python benchmarks/churn.py --minutes 10 --json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from braniac.model.config import PRESETS
from braniac.node import swarm_report as report
from braniac.node.commands import parse_tiers
from braniac.node.errors import NodeError
from braniac.node.failures import explain
from braniac.node.faults import Fault
from braniac.node.splits import Splits
from braniac.node.swarm_host import until
from braniac.node.swarm_options import SwarmOptions
from braniac.node.swarm_processes import ProcessHost, ProcessPeer

_POLL_S = 0.5
_START_SHARE = 0.6
_ALIVE_MIN = 2
_SETTLED_S = 60.0
"""Before that a process's memory still grows because it has only just begun."""
_KILL = Fault("kill", 0.0, 0.0, ())


@dataclass
class Seen:
    """What was noted of the whole, beside what each daemon said."""

    kills: int = 0
    kills_of_trainers: int = 0
    starts: int = 0
    alive: list[int] = field(default_factory=list)
    rss_mib: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    """Of the spared nodes: (seconds since the beginning, resident memory)."""


class Churn:
    """Starts and kills daemons, and looks on."""

    def __init__(self, options: argparse.Namespace, root: Path) -> None:
        self._options = options
        swarm = SwarmOptions(
            nodes=options.nodes,
            tiers=parse_tiers(options.tiers),
            seconds=60.0 * options.minutes,
            seed=options.seed,
            preset=options.preset,
            slot_s=options.slot_s,
            sets=(),
            keep_dir=None,
            json=True,
        )
        self._host = ProcessHost(swarm, root)
        self._rng = random.Random(options.seed)
        self._training: set[int] = set()
        self._splits = Splits()
        self._seen = Seen()

    async def run(self) -> dict[str, Any]:
        """From the first start to the report. Raises NodeError."""
        loop = asyncio.get_running_loop()
        spared = self._host.peers[1 : 1 + self._options.spared]
        try:
            await self._host.start(self._host.peers[0])
            await until(lambda: self._trains(self._host.peers[0]))
            for peer in spared:
                await self._host.start(peer)
                await until(lambda peer=peer: self._trains(peer))
            began = loop.time()
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(self._watch(began, spared))
                await self._churn(began + 60.0 * self._options.minutes, spared)
                watching.cancel()
            there = [peer for peer in self._host.peers if peer.alive and peer.index in self._training]
            codes = await asyncio.gather(*map(self._host.leave, there))
        finally:
            await self._host.stop_all()
        return self._report(spared, began, codes)

    async def _trains(self, peer: ProcessPeer) -> bool | None:
        status = await self._host.ask(peer)
        return True if status is not None and status.state == "training" else None

    async def _churn(self, until_s: float, spared: list[ProcessPeer]) -> None:
        """One start or kill after the other."""
        loop, rng, seen = asyncio.get_running_loop(), self._rng, self._seen
        low_s, high_s = self._options.interval_s
        while loop.time() < until_s:
            await asyncio.sleep(rng.uniform(low_s, high_s))
            alive = [peer for peer in self._host.peers if peer.alive]
            dead = [peer for peer in self._host.peers if not peer.alive]
            victims = [peer for peer in alive if peer not in spared]
            if rng.random() < _START_SHARE:
                if dead:
                    seen.starts += 1
                    await self._host.start(rng.choice(dead))
            elif len(alive) > _ALIVE_MIN and victims:
                victim = rng.choice(victims)
                seen.kills += 1
                seen.kills_of_trainers += victim.index in self._training
                self._training.discard(victim.index)
                await self._host.begin(_KILL, [victim])
                victim.observations.interrupted(restarted=True)

    async def _watch(self, began: float, spared: list[ProcessPeer]) -> None:
        """Ask all that are alive, again and again."""
        loop, slot_s = asyncio.get_running_loop(), self._options.slot_s
        while True:
            alive = [peer for peer in self._host.peers if peer.alive]
            answers = []
            for peer, reply in zip(alive, await asyncio.gather(*map(self._host.ask, alive)), strict=True):
                if reply is not None and peer.alive:
                    answers.append(reply)
                    if reply.state in ("training", "degraded"):
                        self._training.add(peer.index)
            report.look_for_splits(self._splits, loop.time(), answers, slot_s)
            self._seen.alive.append(len(alive))
            for peer in spared:
                if peer.alive:
                    point = (loop.time() - began, peer.rss_mib())
                    self._seen.rss_mib.setdefault(peer.index, []).append(point)
            await asyncio.sleep(_POLL_S)

    # --- judging -----------------------------------------------------------------------------------------------------

    def _report(self, spared: list[ProcessPeer], began: float, codes: list[int]) -> dict[str, Any]:
        seen, slot_s = self._seen, self._options.slot_s
        everybody = [peer.observations for peer in self._host.peers]
        gap_s, certificates, slots = report.certificate_gap(everybody)
        lost = [lost_share(peer.observations, began, slot_s) for peer in spared]
        result: dict[str, Any] = {
            "kills": seen.kills,
            "kills_of_trainers": seen.kills_of_trainers,
            "starts": seen.starts,
            "alive_mean": round(statistics.fmean(seen.alive), 2),
            "certificates": certificates,
            "slots": slots,
            "certificate_gap_s_max": round(gap_s, 3),
            "hash_splits": self._splits.figures()["disagreements"],
            "splits": self._splits.figures(),
            "rss_slope_mib_per_h": round(max(map(slope_per_h, seen.rss_mib.values())), 2),
            "rss_mib": {str(index): round(points[-1][1], 1) for index, points in seen.rss_mib.items()},
            "training_time_lost_pct": round(100 * max(lost), 3),
            "steps_per_s": [round(steps_per_s(peer.observations, began), 3) for peer in spared],
            "exit_codes": codes,
            "options": {key: str(value) for key, value in vars(self._options).items()},
        }
        result["checks"] = {
            "certificate_gap_at_most_60_s": gap_s <= 60,
            "no_split_outlived_a_window": result["hash_splits"] == 0,
            "at_most_1_pct_of_training_time_lost": result["training_time_lost_pct"] <= 1,
            "all_left_cleanly": not any(codes),
        }
        result["ok"] = all(result["checks"].values())
        return result


def lost_share(observed: report.Observations, began: float, slot_s: float) -> float:
    """Share of the time in which no step was finished for longer than a slot."""
    steps = [(at, done) for at, done in observed.steps if at >= began]
    lost, (since, done) = 0.0, steps[0]
    for at, now_done in steps:
        if now_done > done:
            lost += max(0.0, at - since - slot_s - _POLL_S)
            since, done = at, now_done
    return lost / (steps[-1][0] - steps[0][0])


def steps_per_s(observed: report.Observations, began: float) -> float:
    """Inner steps of a node that was never killed."""
    steps = [(at, done) for at, done in observed.steps if at >= began]
    return (steps[-1][1] - steps[0][1]) / (steps[-1][0] - steps[0][0])


def slope_per_h(points: list[tuple[float, float]]) -> float:
    """Least-squares slope of memory over time, MiB per hour; 0 if it was not watched for long enough."""
    settled = [point for point in points if point[0] >= _SETTLED_S]
    if len(settled) < 2:
        return 0.0
    times_s, sizes = zip(*settled, strict=True)
    return 3600 * statistics.linear_regression(times_s, sizes).slope


def _interval(text: str) -> tuple[float, float]:
    low, high = map(float, text.split(","))
    return low, high


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--tiers", default="0,1,2,3", help="dealt out to the nodes in turn")
    parser.add_argument("--spared", type=int, default=2, help="nodes that are never killed; the founder is not one")
    parser.add_argument("--interval-s", type=_interval, default=(0.5, 2.0), metavar="LOW,HIGH", help="between events")
    parser.add_argument("--slot-s", type=float, default=2.0, help="slot length in seconds")
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep-dir", type=Path, help="keep states and logs here")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args()
    root = options.keep_dir or Path(tempfile.mkdtemp(prefix="braniac-churn-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        result = asyncio.run(Churn(options, root).run())
    except NodeError as error:
        return explain(error)
    finally:
        if options.keep_dir is None:
            shutil.rmtree(root, ignore_errors=True)
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
