"""The stand-in for training: a real trainer of a very small model that takes random steps instead of learning.

Everything else of it is real: its weights are tensors, cut into the real fragments, read, rebased, saved and loaded by
the production code. A step adds whole units of the protocol's fixed point, and the weights stay below 16, so that all
sums in float32 are exact and the ledger can be checked to the bit.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from braniac.model.config import ModelConfig
from braniac.model.data import Batches, keyed_bits
from braniac.model.fragments import Fragment, fragment_table, scatter_add_
from braniac.model.sources import Corpus
from braniac.model.tiers import rings_of
from braniac.model.trainer import StepResult, Trainer, TrainSettings
from braniac.node.trainer_thread import TrainerThread
from braniac.protocol import limits
from braniac.protocol.bitpack import Int64Array

MODEL = ModelConfig(
    hidden_size=4,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    vocab_size=32,
    context=4,
    matformer_factor=4,
)
FRAGMENTS = 5
FRAGMENT_TABLE = fragment_table(MODEL, FRAGMENTS)
STEP_UNITS = 1 << 13
"""Largest change of a value in one step, in units of the fixed point."""

_ONE = float(1 << limits.FRACTION_BITS)
_STEP_S = 0.5
_STEPS_AT_ONCE_MAX = 4
_JOB_S = 0.003
_TEXT = np.arange(256, dtype=np.uint8) % MODEL.vocab_size
_CORPUS = Corpus("a simulation", (_TEXT,), (_TEXT,))

_Result = TypeVar("_Result")


class Watcher(Protocol):
    """Told of all that touches weights."""

    def stepped(self, fragment: int, change: Int64Array) -> None:
        """A local step added this, in units."""

    def seen(self, fragment: int, weights: Tensor) -> None:
        """The node has read these weights, maybe to save them."""

    def loaded(self, fragment: int) -> None:
        """The weights were set to an anchor."""


class Walker(Trainer):
    """One peer's weights on their random walk."""

    def __init__(self, tier: int, seed: int, peer: bytes) -> None:
        settings = TrainSettings(batch=1, seed=seed)
        super().__init__(MODEL, tier, Batches(_CORPUS, seed, peer, MODEL.context, 1), settings)
        self.watcher: Watcher | None = None
        self.held = [fragment for fragment in FRAGMENT_TABLE if fragment.ring in rings_of(MODEL, tier)]
        self._seed = seed

    def step(self) -> StepResult:
        """Add a random vector that only seed, peer and step decide."""
        bits = keyed_bits("walk", self._seed, self.batches.peer, self.step_count, sum(f.size for f in self.held))
        units = (bits % np.uint64(2 * STEP_UNITS + 1)).astype(np.int64) - STEP_UNITS
        start = 0
        for fragment in self.held:
            change = units[start : start + fragment.size]
            start += fragment.size
            scatter_add_(self.params, fragment, torch.from_numpy((change / _ONE).astype(np.float32)))
            if self.watcher is not None:
                self.watcher.stepped(fragment.index, change)
        self.step_count += 1
        return StepResult(1.0, MODEL.context, self.model.neurons, (1.0,))

    def read(self, fragment: Fragment) -> Tensor:
        """See Trainer."""
        weights = self.peek(fragment)
        if self.watcher is not None:
            self.watcher.seen(fragment.index, weights)
        return weights

    def peek(self, fragment: Fragment) -> Tensor:
        """The fragment's weights for a checker, which must not count as read by the node."""
        return super().read(fragment)

    def load_fragment(self, fragment: Fragment, values: Tensor) -> None:
        """See Trainer."""
        super().load_fragment(fragment, values)
        if self.watcher is not None:
            self.watcher.loaded(fragment.index)

    def state(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """See Trainer."""
        if self.watcher is not None:
            for fragment in self.held:
                self.watcher.seen(fragment.index, self.peek(fragment))
        return super().state()


class InlineThread(TrainerThread):
    """The trainer thread of a simulated process: its requests take their turn in the event loop.

    Steps are taken just before a request is served, as many as fit into the time since the last one.
    """

    _stepped_until_s = 0.0

    def start(self) -> None:
        """See TrainerThread."""
        self._turn = asyncio.Lock()

    def train(self) -> None:
        """See TrainerThread."""
        self._stepped_until_s = self._clock.monotonic()
        self._training.set()

    def stop(self) -> None:
        """See TrainerThread."""

    async def wait_failed(self) -> None:
        """See TrainerThread: it does not fail."""

    async def call(self, job: Callable[[Trainer], _Result]) -> _Result:
        """See TrainerThread."""
        async with self._turn:
            await asyncio.sleep(_JOB_S)
            self._catch_up()
            return job(self._trainer)

    def _catch_up(self) -> None:
        if not self._training.is_set():
            return
        now_s = self._clock.monotonic()
        due = int((now_s - self._stepped_until_s) / _STEP_S)
        self._stepped_until_s += due * _STEP_S
        for _ in range(min(due, _STEPS_AT_ONCE_MAX)):
            self._step()
