"""The two clocks of a simulated machine: both wrong, each in its own way."""

from __future__ import annotations

import asyncio


class SimClock:
    """See `braniac.node.clock.Clock`. True time is the loop's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, wall_s: float, drift: float) -> None:
        """Boot now, with the wall clock at `wall_s`; a clock with a `drift` of 0.01 gains 1%."""
        self._loop = loop
        self._booted_s = loop.time()
        self._wall_s = wall_s
        self._rate = 1.0 + drift

    def monotonic(self) -> float:
        """Seconds since this machine booted, by its own crystal."""
        return (self._loop.time() - self._booted_s) * self._rate

    def wall(self) -> float:
        """What its owner believes the time to be."""
        return self._wall_s + self.monotonic()

    def jump(self, seconds: float) -> None:
        """Set the wall clock forward or back."""
        self._wall_s += seconds
