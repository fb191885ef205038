"""Methods that send every value: all-reduce at each step, averaging, DiLoCo."""

from __future__ import annotations

import torch
from torch import Tensor

from braniac.model.sources import Corpus
from outer.books import FLOAT32_BYTES
from outer.swarm import FlatSwarm, GradientSwarm, Peer, Plan, mean


class AllReduce(GradientSwarm):
    """Data parallelism (DDP): after every step the gradients' mean updates all replicas, which stay equal.

    Sent: float32 gradients in a ring all-reduce. Gradients of peers that drop out are missing from the mean; if all
    do, the step is lost. Returning peers get the same update.
    """

    def exchange(self, slot: int) -> None:
        present = self.present(slot)
        if not present:
            return
        gradient = mean([self.gradient(peer) for peer in present])
        self.books.all_reduce(self.now(slot), [peer.number for peer in present], FLOAT32_BYTES * self.size)
        for peer in self.peers:
            self.set_gradient(peer, gradient)
            peer.trainer.optimizer.update()
        self.weights = self.read(self.peers[0])


class Nesterov:
    """The outer optimizer of the DiLoCo family: m <- mu m + D, then a step of rate (D + mu m)."""

    def __init__(self, size: int, rate: float, momentum: float) -> None:
        self.rate = rate
        self.momentum = momentum
        self._memory = torch.zeros(size)

    def step(self, delta: Tensor) -> Tensor:
        """How far to move along a pseudo-gradient, float32 [size]."""
        self._memory = self.momentum * self._memory + delta
        return self.rate * (delta + self.momentum * self._memory)


class DiLoCo(FlatSwarm):
    """DiLoCo (Douillard et al. 2023, arXiv 2311.08105): every H steps the mean of anchor - weights is a gradient.

    An outer SGD with Nesterov momentum takes it (published: rate 0.7, momentum 0.9), and all peers go on from the
    result; inner optimizers keep their memory. Rate 1 without momentum is plain averaging of the weights.
    Sent: float32 differences in a ring all-reduce. A peer that drops out loses its H steps, the others' mean counts.
    With `all_or_nothing` one that drops out fails the all-reduce, and everybody goes back to the anchor, as torchft's
    `local_sgd.py` does. Departure: the published inner optimizer is AdamW, here all methods have the same one.
    """

    def __init__(
        self, plan: Plan, corpus: Corpus, *, rate: float = 0.7, momentum: float = 0.9, all_or_nothing: bool = False
    ) -> None:
        super().__init__(plan, corpus)
        self.outer = Nesterov(self.size, rate * plan.outer_rate, momentum)
        self.all_or_nothing = all_or_nothing

    @property
    def slots_per_window(self) -> int:
        return 1

    def exchange(self, slot: int) -> None:
        present = self.present(slot)
        if self.all_or_nothing and len(present) < len(self.peers):
            present = []
        if present:
            self.weights = self.weights - self.outer.step(self.reduce(slot, present))
        if present or self.all_or_nothing:
            for peer in self.peers:
                self.load(peer, self.weights)

    def reduce(self, slot: int, present: list[Peer]) -> Tensor:
        """The pseudo-gradient that comes of the all-reduce, float32 [size]."""
        self.books.all_reduce(self.now(slot), [peer.number for peer in present], FLOAT32_BYTES * self.size)
        return mean([self.weights - self.read(peer) for peer in present])
