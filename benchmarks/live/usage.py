"""What processes on one machine use, and their ends."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import psutil

PEERS = 4
START_S = 120.0
"""Within which they must be there."""


class Failed(Exception):
    """A measurement that could not be made."""


class Usage:
    """What peers have used since it was made: seconds, bytes on loopback, CPU seconds."""

    def __init__(self, pids: list[int]) -> None:
        self._trees = [tree for pid in pids for tree in family(pid)]
        self._began_s, self._bytes, self._cpu_s = time.monotonic(), loopback_bytes(), self._total_cpu_s()

    def per_round(self, rounds: int, peers: int) -> dict[str, float]:
        return {
            "seconds": round((time.monotonic() - self._began_s) / rounds, 3),
            "bytes_per_peer": round((loopback_bytes() - self._bytes) / rounds / peers),
            "cpu_s_per_peer": round((self._total_cpu_s() - self._cpu_s) / rounds / peers, 3),
        }

    def _total_cpu_s(self) -> float:
        times = [process.cpu_times() for process in self._trees]
        return sum(each.user + each.system for each in times)


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def kill(pid: int) -> None:
    """A device that is gone: no process of it says goodbye."""
    for process in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def loopback_bytes() -> int:
    """Sent over the loopback device so far, with headers."""
    for line in Path("/proc/net/dev").read_text("ascii").splitlines():
        name, _, counters = line.strip().partition(":")
        if name == "lo":
            return int(counters.split()[8])
    raise Failed("there is no loopback device to count bytes on")
