"""Whether this node works or rests: what its owner said, and what the policy says, made known to the daemon.

A node rests while any reason to rest holds, and all of them are told. What the owner says by hand and what the policy
finds are apart: `resume` ends the first and cannot end the second.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Protocol

from braniac.node import control_pb2 as pb
from braniac.node.clock import Clock
from braniac.node.metrics import Metrics
from braniac.node.policy import Policy, Reason
from braniac.node.sensors import Sample, Sensors

MANUAL = "manual"


class Worker(Protocol):
    """What can be told to rest."""

    async def rest(self, *, finish: bool) -> None:
        """Stop working; with `finish`, after what is in hand."""

    async def wake(self) -> None:
        """Go on."""


class Governor:
    """Looks at the sensors every few seconds and at the owner's word at once."""

    def __init__(
        self, policy: Policy, sensors: Sensors, clock: Clock, sample_s: float, metrics: Metrics | None = None
    ) -> None:
        self.sample = Sample()
        """The last look at the sensors."""
        self.resting = False
        """Whether the worker was told to rest."""
        self.reasons: tuple[Reason, ...] = ()
        """All that hold, the owner's own first."""
        self._policy = policy
        self._sensors = sensors
        self._clock = clock
        self._sample_s = sample_s
        self._metrics = metrics
        self._manual: Reason | None = None
        self._finish = False
        self._told = asyncio.Event()

    def pause(self, seconds: float, finish: bool) -> None:
        """Rest for so long, 0 being until `resume`; with `finish`, after the slot in hand."""
        now = self._clock.monotonic()
        sentence = "paused by hand, until 'braniac-node resume'" if not seconds else "paused by hand for a while"
        self._manual = Reason(MANUAL, sentence, since_s=now, until_s=now + seconds if seconds else None)
        self._finish = finish
        self._told.set()

    def resume(self) -> tuple[Reason, ...]:
        """End what `pause` began: the reasons that hold nevertheless."""
        self._manual = None
        self._told.set()
        return tuple(reason for reason in self.reasons if reason.code != MANUAL)

    async def run(self, worker: Worker, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Tell the worker to rest and to go on, for ever."""
        while True:
            await self._review(worker)
            self._told.clear()
            await self._wait(sleep)

    async def _review(self, worker: Worker) -> None:
        now = self._clock.monotonic()
        if self._manual is not None and self._manual.until_s is not None and now >= self._manual.until_s:
            self._manual = None
        self.sample = await asyncio.to_thread(self._sensors.sample)
        found = self._policy.decide(self.sample, now)
        self.reasons = ((self._manual,) if self._manual else ()) + found
        if self._metrics is not None:
            self._metrics.set_paused(reason.code for reason in self.reasons)
        if self.reasons and not self.resting:
            self.resting = True
            await worker.rest(finish=self._finish and not found)
        elif self.resting and not self.reasons:
            self.resting = False
            await worker.wake()

    async def _wait(self, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Until the next look at the sensors, the end of a pause, or the owner's word."""
        seconds = self._sample_s
        if self._manual is not None and self._manual.until_s is not None:
            seconds = min(seconds, max(0.0, self._manual.until_s - self._clock.monotonic()))
        pause, told = asyncio.ensure_future(sleep(seconds)), asyncio.create_task(self._told.wait())
        try:
            await asyncio.wait({pause, told}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pause, told):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    def messages(self) -> list[pb.Reason]:
        """The reasons as the control API tells them."""
        now = self._clock.monotonic()
        return [
            pb.Reason(
                code=reason.code,
                sentence=reason.sentence,
                since_s=now - reason.since_s,
                until_s=None if reason.until_s is None else max(0.0, reason.until_s - now),
            )
            for reason in self.reasons
        ]
