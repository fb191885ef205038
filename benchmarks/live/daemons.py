"""Four of our daemons: their slots, and the death of one of them."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from braniac.node import swarm_report
from braniac.node.swarm_host import until
from braniac.node.swarm_options import SwarmOptions
from braniac.node.swarm_processes import ProcessHost
from live.usage import PEERS, START_S, Usage, kill

RECOVERY_SLOTS = 12
"""That survivors are watched for."""


class Ours:
    """Daemons, watched from outside."""

    def __init__(self, preset: str, slot_s: float, fragments: int, root: Path) -> None:
        self.slot_s, self.fragments = slot_s, fragments
        sets = (f"run.fragments={fragments}", "train.batch=1", "caps.duty_percent=1", "metrics.enabled=false")
        options = SwarmOptions(
            nodes=PEERS,
            tiers=(0,),
            seconds=0,
            seed=0,
            preset=preset,
            slot_s=slot_s,
            sets=sets,
            keep_dir=None,
            json=True,
        )
        self.host = ProcessHost(options, root)

    async def measure(self, windows: int) -> dict[str, Any]:
        """Undisturbed windows, then a kill. Raises Failed, NodeError, TimeoutError."""
        try:
            await self.host.start_all()
            await until(self._all_merge, START_S)
            pids = [peer.process.pid for peer in self.host.peers if peer.process is not None]
            first = await self._next_slot(0)
            usage = Usage(pids)
            await self._next_slot(first + windows * self.fragments - 1)
            figures = usage.per_round(windows, PEERS)
            slots = range(first, first + windows * self.fragments)
            await self._next_slot(slots.stop + 1)  # outcomes are known a slot later
            merged = sum(self._certified(slot) for slot in slots)
            return {
                **figures,
                "rounds": windows,
                "slot_s": self.slot_s,
                "fragments": self.fragments,
                "certified_percent": round(100 * merged / len(slots), 1),
                "kill": await self._kill(),
            }
        finally:
            await self.host.stop_all()

    async def _look(self) -> list[int]:
        """Ask everybody who lives: the slots that they are in."""
        replies = await asyncio.gather(*(self.host.ask(peer) for peer in self.host.peers if peer.alive))
        return [reply.slot for reply in replies if reply is not None]

    async def _all_merge(self) -> bool | None:
        """Whether everybody has trained, and a certificate holds work of all."""
        await self._look()
        seen = [peer.observations for peer in self.host.peers]
        if not all(each.last is not None and each.last.steps > 0 for each in seen):
            return None
        return any(record.contributors == PEERS for record in seen[0].slots.values()) or None

    async def _next_slot(self, after: int) -> int:
        """Wait for a slot beyond one to begin, in the eyes of the first node."""

        async def begun(after: int) -> int | None:
            slot = max(await self._look(), default=0)
            return slot if slot > after else None

        after = after or max(await self._look(), default=0)
        return await until(partial(begun, after), START_S + 4 * self.fragments * self.slot_s)

    def _certified(self, slot: int) -> bool:
        """Whether anybody alive saw a certificate for a slot."""
        records = [peer.observations.slots.get(slot) for peer in self.host.peers if peer.alive]
        return any(record is not None and record.certificate for record in records)

    async def _kill(self) -> dict[str, Any]:
        """SIGKILL one node in the middle of a slot; how the others go on."""
        victim = self.host.peers[-1]
        assert victim.process is not None
        slot = await self._next_slot(0)
        await asyncio.sleep(self.slot_s / 2)
        kill(victim.process.pid)
        await victim.process.wait()
        await self._next_slot(slot + RECOVERY_SLOTS)
        slots = range(slot, slot + RECOVERY_SLOTS)
        gaps = longest_gap([self._certified(each) for each in slots])
        survivors = [peer for peer in self.host.peers if peer.alive]
        seen: dict[int, dict[str, Any]] = {}
        deadline = asyncio.get_running_loop().time() + 2 * self.fragments * self.slot_s
        while asyncio.get_running_loop().time() < deadline and not (seen and all(x["agree"] for x in seen.values())):
            replies = [reply for peer in survivors if (reply := await self.host.ask(peer)) is not None]
            swarm_report.keep_agreement(seen, swarm_report.compare(replies))
            await asyncio.sleep(0.1 * self.slot_s)
        return {
            "lost_s": round(gaps * self.slot_s, 3),
            "slots_without_certificate": sum(not self._certified(each) for each in slots),
            "slots": RECOVERY_SLOTS,
            "agree_percent": round(100 * statistics.mean(look["agree"] for look in seen.values()), 2),
        }


def longest_gap(certified: list[bool]) -> int:
    """The most slots in a row without a certificate."""
    longest = run = 0
    for each in certified:
        run = 0 if each else run + 1
        longest = max(longest, run)
    return longest


def our_figures(preset: str, slot_s: float, fragments: int, windows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(Ours(preset, slot_s, fragments, Path(folder)).measure(windows))
