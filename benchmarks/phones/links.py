"""Virtual time, access links with a queue in each direction, and the pace of what nodes send of slots."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

UPLINK_BITS_PER_S = 10e6
DOWNLINK_BITS_PER_S = 50e6
LATENCY_S = 0.05
REPLY_BYTES = 11  # the swarm time, which is all that most calls are answered with
SMALL_BYTES = 4096
"""So little takes less than a millisecond of a downlink, and is not queued there."""


class Time:
    """A heap of things to come."""

    def __init__(self, now: float) -> None:
        self.now = now
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when_s: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._heap, (when_s, next(self._order), action))

    def later(self, delay_s: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay_s, action)

    def run_until(self, end_s: float) -> None:
        while self._heap and self._heap[0][0] <= end_s:
            when_s, _, action = heapq.heappop(self._heap)
            self.now = max(self.now, when_s)
            action()
        self.now = end_s


@dataclass
class Link:
    """One device's access to the Internet."""

    time: Time
    free_up_s: float = 0.0
    """When the uplink has sent everything that was given to it."""
    free_down_s: float = 0.0
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes by kind."""
    received: Counter[str] = field(default_factory=Counter)

    def send(self, other: Link, size: int, kind: str, arrive: Callable[[], None]) -> None:
        """Send `size` bytes behind everything that was sent before; `arrive` is called when all have arrived."""
        self.sent[kind] += size
        self.free_up_s = max(self.time.now, self.free_up_s) + size * 8 / UPLINK_BITS_PER_S
        if size <= SMALL_BYTES:
            other.received[kind] += size
            return self.time.at(self.free_up_s + LATENCY_S, arrive)
        self.time.at(self.free_up_s + LATENCY_S, lambda: other._take(size, kind, arrive))

    def _take(self, size: int, kind: str, arrive: Callable[[], None]) -> None:
        self.received[kind] += size
        self.free_down_s = max(self.time.now, self.free_down_s) + size * 8 / DOWNLINK_BITS_PER_S
        self.time.at(self.free_down_s, arrive)


class Pace:
    """Contributions and updates of one device, evenly; contributions are ahead of updates."""

    def __init__(self, time: Time, bytes_per_s: float) -> None:
        """0 bounds nothing."""
        self._time = time
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0
        """When all that was given to it has left."""
        self._first_free_s = 0.0
        """When all of it has left that goes ahead."""

    def wait_s(self, size: int, *, first: bool) -> float:
        """How long from now `size` bytes take to leave."""
        if not self._bytes_per_s:
            return 0.0
        now, takes_s = self._time.now, size / self._bytes_per_s
        self._free_s = max(now, self._free_s) + takes_s
        if not first:
            return self._free_s - now
        self._first_free_s = max(now, self._first_free_s) + takes_s
        return self._first_free_s - now
