"""The thread that trains: inner steps without end, with requests of the event loop served between two steps.

Everything that touches the model runs in this one thread, so nothing needs a lock: `call` hands in a function,
which runs between two steps and whose result comes back to the event loop.
"""

from __future__ import annotations

import asyncio
import math
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog
import torch

from braniac.model.errors import TrainingDiverged
from braniac.model.trainer import Trainer
from braniac.node.clock import Clock

log = structlog.get_logger(__name__)

_Result = TypeVar("_Result")
_DIVERGED_MAX = 16  # steps in a row without a finite loss, until the weights are given up
_JUMPED_MAX = 8  # the same for full-width steps whose loss lies far above the running mean
_JUMP_NATS = 1.0
_SMOOTHING = 0.05  # of a new step in the running loss and speed


@dataclass(frozen=True)
class Progress:
    """How training goes; replaced as a whole after every step, so it can be read from any thread."""

    steps: int = 0
    tokens: int = 0
    loss: float | None = None
    """Running mean over full-width steps, nats per token."""
    tokens_per_s: float = 0.0
    diverged: int = 0
    """Steps given up because the loss was not finite."""
    stalled: bool = False
    """Too many losses in a row were not finite, or far above the mean: no training until `start_over`."""


class TrainerThread:
    """Owns the trainer from `start` to `stop`."""

    def __init__(
        self,
        trainer: Trainer,
        clock: Clock,
        *,
        threads: int,
        nice: int,
        tokens: int = 0,
        duty_percent: float = 100.0,
        jobs: queue.SimpleQueue[Callable[[], None] | None] | None = None,
    ) -> None:
        """`tokens` is what earlier runs of this node have trained on; steps take `duty_percent` of the time at most.

        `jobs` is where requests wait; a test may give a queue that lets the clock's time pass.
        """
        self.progress = Progress(steps=trainer.step_count, tokens=tokens)
        self.throttled_s = 0.0
        """Time not spent on training for the sake of `duty_percent`."""
        self._trainer = trainer
        self._clock = clock
        self._torch_threads = threads
        self._nice = nice
        self._idle_per_busy = (100.0 - duty_percent) / duty_percent
        self._jobs = jobs or queue.SimpleQueue()
        self._training = threading.Event()
        self._diverged_in_a_row = 0
        self._jumped_in_a_row = 0
        self._died: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="trainer")

    def start(self) -> None:
        """Serve requests; training itself begins with `train`."""
        self._thread.start()

    def train(self) -> None:
        """Begin, or go on, training."""
        self._training.set()
        self._jobs.put(_nothing)  # it may be waiting for a request

    def pause(self) -> None:
        """Finish the step in hand, then only serve requests."""
        self._training.clear()

    async def call(self, job: Callable[[Trainer], _Result]) -> _Result:
        """Run `job` between two steps and return its result, or raise what it raised."""
        done: Future[_Result] = Future()

        def run() -> None:
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(job(self._trainer))
                except BaseException as error:
                    done.set_exception(error)

        self._jobs.put(run)
        return await asyncio.wrap_future(done)

    async def wait_failed(self) -> None:
        """Raise what stopped the thread, if anything ever does; returns when it was stopped on purpose."""
        await asyncio.shield(asyncio.wrap_future(self._died))

    def stop(self) -> None:
        """Finish the step in hand and end the thread."""
        self._jobs.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._lower_priority()
            torch.set_num_threads(self._torch_threads)
            self._loop()
        except BaseException as error:
            self._died.set_exception(error)
        else:
            self._died.set_result(None)

    def _lower_priority(self) -> None:
        if self._nice and hasattr(os, "setpriority"):
            # On Linux this sets the priority of this one thread; the event loop keeps its own.
            thread = threading.get_native_id()
            present = os.getpriority(os.PRIO_PROCESS, thread)  # only root may raise it, after `nice -n 19` say
            os.setpriority(os.PRIO_PROCESS, thread, max(present, self._nice))

    def _loop(self) -> None:
        step_at_s = -math.inf  # the next step must not begin before
        while True:
            now = self._clock.monotonic()
            try:
                job = self._next_job(step_at_s - now)
            except queue.Empty:
                began_s = self._clock.monotonic()
                self._step()
                ended_s = self._clock.monotonic()
                step_at_s = ended_s + (ended_s - began_s) * self._idle_per_busy
                continue
            if job is None:
                return
            job()

    def _next_job(self, idle_s: float) -> Callable[[], None] | None:
        """A request, waited for as long as there is nothing to train; queue.Empty when a step may begin."""
        if not self._training.is_set() or self.progress.stalled:
            return self._jobs.get()
        if idle_s <= 0:
            return self._jobs.get(block=False)
        began_s = self._clock.monotonic()
        try:
            return self._jobs.get(timeout=idle_s)
        finally:
            self.throttled_s += self._clock.monotonic() - began_s

    def _step(self) -> None:
        began = self._clock.monotonic()
        before = self.progress
        try:
            result = self._trainer.step()
        except TrainingDiverged as error:
            log.warning("skipped a batch", reason=str(error))
            self._trainer.step_count += 1  # the same batch would fail again
            self._diverged_in_a_row += 1
            stalled = self._diverged_in_a_row >= _DIVERGED_MAX
            self.progress = Progress(
                before.steps, before.tokens, before.loss, 0.0, before.diverged + 1, stalled=stalled
            )
            return
        self._diverged_in_a_row = 0
        speed = result.tokens / max(1e-9, (self._clock.monotonic() - began) * (1 + self._idle_per_busy))
        loss = before.loss
        if result.widths == self._trainer.model.neurons:
            jumped = loss is not None and result.loss > loss + _JUMP_NATS
            self._jumped_in_a_row = self._jumped_in_a_row + 1 if jumped else 0
            if not jumped:  # what may be a sign of ruin is not what to compare with
                loss = result.loss if loss is None else loss + _SMOOTHING * (result.loss - loss)
        self.progress = Progress(
            self._trainer.step_count,
            before.tokens + result.tokens,
            loss,
            speed if before.tokens_per_s == 0 else before.tokens_per_s + _SMOOTHING * (speed - before.tokens_per_s),
            before.diverged,
            stalled=self._jumped_in_a_row >= _JUMPED_MAX,
        )

    def start_over(self) -> None:
        """Good weights were loaded: train on, without what the optimizer remembers. Call it from a job."""
        self._trainer.optimizer.forget()
        self._diverged_in_a_row = 0
        self.progress = replace(self.progress, stalled=False)
        self.compare_anew()

    def compare_anew(self) -> None:
        """Other weights were loaded: earlier losses say nothing about the next ones. Call it from a job."""
        self._jumped_in_a_row = 0
        self.progress = replace(self.progress, loss=None)


def _nothing() -> None:
    """A request that only wakes the thread."""
