"""Real daemons on loopback of which one is paused every minute and told to go on half a minute later.

At the end: do the anchors agree, was any work given up, and did memory, threads and file descriptors stay as they were?
The JSON object is the last line on stdout, the log goes to stderr. Exit code 1 if a check fails.

    python benchmarks/pauses.py --minutes 30 --json
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import structlog

from braniac.node.commands import json_text
from braniac.node.config import control_socket_path
from braniac.node.control_client import ControlClient
from braniac.node.errors import NodeError
from braniac.node.failures import explain
from braniac.node.swarm import Swarm
from braniac.node.swarm_host import until
from braniac.node.swarm_options import SwarmOptions
from braniac.node.swarm_processes import ProcessHost, ProcessPeer

log = structlog.get_logger(__name__)

_SETTLE_S = 3.0  # after a pause began, before its processor time is taken
_SLACK = {"rss_bytes": 24e6, "p2pd_rss_bytes": 12e6, "threads": 4, "fds": 12}  # above 10% of growth


@dataclass
class Use:
    """What the processes of one node used, seen from outside."""

    samples: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    paused_cpu: list[float] = field(default_factory=list)
    """Share of a core, once per pause."""
    resumed_s: list[float] = field(default_factory=list)
    """From resume to training."""

    def grown(self) -> dict[str, tuple[float, float]]:
        """What is larger in the last third than it was in the second: (then, now), the largest of each."""
        found = {}
        for name, values in self.samples.items():
            third = max(1, len(values) // 3)
            then, now = max(values[third : 2 * third] or values), max(values[-third:])
            if now > 1.1 * then + _SLACK[name]:
                found[name] = (then, now)
        return found


class Pauses(Swarm):
    """A swarm whose nodes are paused in turn."""

    def __init__(self, options: SwarmOptions, host: ProcessHost, pause_s: float, every_s: float) -> None:
        super().__init__(options, host)
        self.peers: Sequence[ProcessPeer] = host.peers
        self.use = [Use() for _ in self.peers]
        self.pauses = 0
        self._pause_s = pause_s
        self._every_s = every_s

    async def run(self) -> dict[str, Any]:
        """The whole life of the swarm: its report."""
        lived = await self.live()
        return self._report(lived.agreed, lived.exit_codes)

    async def _let_train(self, began: float) -> None:
        loop, end = asyncio.get_running_loop(), began + self.options.seconds
        while (due := began + (self.pauses + 1) * self._every_s - self._pause_s) + self._pause_s <= end + 0.5:
            await asyncio.sleep(max(0.0, due - loop.time()))
            for peer in self.peers:
                self._sample(peer)
            await self._pause_one(self.peers[self.pauses % len(self.peers)], due + self._pause_s)
            self.pauses += 1
        await asyncio.sleep(max(0.0, end - loop.time()))

    async def _pause_one(self, peer: ProcessPeer, end: float) -> None:
        loop, use = asyncio.get_running_loop(), self.use[peer.index]
        client = ControlClient(control_socket_path(peer.folder))
        await asyncio.to_thread(client.pause)
        await self._reach(peer, "paused")
        await asyncio.sleep(_SETTLE_S)
        before, at = _cpu_s(peer), loop.time()
        await asyncio.sleep(max(1.0, end - loop.time()))
        use.paused_cpu.append((_cpu_s(peer) - before) / (loop.time() - at))
        asked = loop.time()
        await asyncio.to_thread(client.resume)
        await self._reach(peer, "training")
        use.resumed_s.append(loop.time() - asked)
        log.info("paused and resumed", node=peer.index, paused_cpu=round(use.paused_cpu[-1], 4))

    async def _reach(self, peer: ProcessPeer, state: str) -> None:
        await until(partial(self._is, peer, state))

    def _sample(self, peer: ProcessPeer) -> None:
        main, children = _processes(peer)
        samples = self.use[peer.index].samples
        samples["rss_bytes"].append(main.memory_info().rss)
        samples["p2pd_rss_bytes"].append(sum(child.memory_info().rss for child in children))
        samples["threads"].append(main.num_threads())
        samples["fds"].append(main.num_fds())

    def _report(self, agreed: dict[int, dict[str, Any]], codes: list[int]) -> dict[str, Any]:
        last = [peer.observations.last for peer in self.peers]
        given_up = {
            str(i): {reason: count for reason, count in reply.forfeited.items() if reason != "clipped"}
            for i, reply in enumerate(last)
            if reply is not None
        }
        slots: dict[int, bool] = {}
        for peer in self.peers:
            for number, record in peer.observations.slots.items():
                slots[number] = slots.get(number, False) or record.outcome in ("merged", "missed")
        checks = {
            "anchors_agree": bool(agreed) and all(look["agree"] for look in agreed.values()),
            "no_work_given_up": len(given_up) == len(self.peers) and not any(given_up.values()),
            "all_contributed": all(reply is not None and reply.contributions_merged > 0 for reply in last),
            "nothing_grew": not any(use.grown() for use in self.use),
            "exit_codes": not any(codes),
        }
        return {
            "ok": all(checks.values()),
            "checks": checks,
            "nodes": len(self.peers),
            "seconds": self.options.seconds,
            "pauses": self.pauses,
            "slots": len(slots),
            "slots_with_certificate": sum(slots.values()),
            "given_up": given_up,
            "grown": {str(i): use.grown() for i, use in enumerate(self.use) if use.grown()},
            "first_and_last": {
                str(i): {name: (values[0], values[-1]) for name, values in use.samples.items()}
                for i, use in enumerate(self.use)
            },
            "paused_cpu_max": max((share for use in self.use for share in use.paused_cpu), default=None),
            "resume_to_training_s_max": max((s for use in self.use for s in use.resumed_s), default=None),
            "contributions_merged": [reply.contributions_merged if reply else None for reply in last],
        }


def _processes(peer: ProcessPeer) -> tuple[psutil.Process, list[psutil.Process]]:
    assert peer.process is not None
    main = psutil.Process(peer.process.pid)
    return main, main.children(recursive=True)


def _cpu_s(peer: ProcessPeer) -> float:
    main, children = _processes(peer)
    return float(sum(sum(process.cpu_times()[:2]) for process in (main, *children)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="how long to go on after the last node joined")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--every-s", type=float, default=60.0, help="time between two pauses")
    parser.add_argument("--pause-s", type=float, default=30.0, help="length of a pause")
    parser.add_argument("--slot-s", type=float, default=2.0, help="slot length in seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every daemon")
    parser.add_argument("--keep-dir", type=Path, help="keep states and logs here")
    parser.add_argument("--json", action="store_true", help="the default, for scripts that say so")
    arguments = parser.parse_args()
    options = SwarmOptions(
        nodes=arguments.nodes,
        tiers=(0, 0, 1),
        seconds=60 * arguments.minutes,
        seed=arguments.seed,
        preset="tiny",
        slot_s=arguments.slot_s,
        sets=tuple(arguments.set),
        keep_dir=arguments.keep_dir,
        json=True,
    )
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    root = arguments.keep_dir or Path(tempfile.mkdtemp(prefix="braniac-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        report = asyncio.run(Pauses(options, ProcessHost(options, root), arguments.pause_s, arguments.every_s).run())
    except NodeError as error:
        return explain(error)
    finally:
        if arguments.keep_dir is None:
            shutil.rmtree(root, ignore_errors=True)
    print(json_text(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
