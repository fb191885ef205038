"""Pairs that gossip: NoLoCo."""

from __future__ import annotations

import statistics

import numpy as np
import torch

from braniac.model.sources import Corpus
from outer.books import FLOAT32_BYTES
from outer.swarm import FlatSwarm, Peer, Plan, mean


class NoLoCo(FlatSwarm):
    """NoLoCo (Kolehmainen et al. 2025, arXiv 2506.10911): momentum and gossip in random pairs, without any all-reduce.

    Every H steps those present pair off. With anchor a_i, weights x_i and outer momentum m_i of a peer, and means over
    the pair:   m_i <- momentum m_i + rate mean(x - a) - pull (a_i - mean(a));   a_i <- a_i + m_i;   x_i <- a_i.
    One left over is its own pair; a peer that drops out trains on. Replicas never agree: the loss is the mean over
    the losses of all anchors. Sent: float32 weights and anchor, to the partner. The authors' repository has only the
    baseline that averages groups: rule and constants follow descriptions of the paper and were not checked against
    code. The inner optimizer is everybody's.
    """

    def __init__(
        self, plan: Plan, corpus: Corpus, *, rate: float = 0.7, momentum: float = 0.5, pull: float = 1.0
    ) -> None:
        super().__init__(plan, corpus)
        self.rate = rate * plan.outer_rate
        self.momentum = momentum
        self.pull = pull
        self.anchors = [self.read(peer) for peer in self.peers]
        self.momenta = [torch.zeros(self.size) for _ in self.peers]

    @property
    def slots_per_window(self) -> int:
        return 1

    def exchange(self, slot: int) -> None:
        present = self.present(slot)
        order = np.random.default_rng((self.plan.seed, slot, 1)).permutation(len(present))
        shuffled = [present[at] for at in order]
        for at in range(0, len(shuffled), 2):
            self._meet(slot, shuffled[at : at + 2])

    def _meet(self, slot: int, group: list[Peer]) -> None:
        anchor = mean([self.anchors[peer.number] for peer in group])
        moved = mean([self.read(peer) for peer in group]) - anchor
        for peer in group:
            own, momentum = self.anchors[peer.number], self.momenta[peer.number]
            momentum = self.momentum * momentum + self.rate * moved - self.pull * (own - anchor)
            self.momenta[peer.number], self.anchors[peer.number] = momentum, own + momentum
            self.load(peer, self.anchors[peer.number])
            for other in group:
                if other is not peer:
                    self.books.send(self.now(slot), peer.number, other.number, 2 * FLOAT32_BYTES * self.size)

    def loss(self) -> float:
        return statistics.mean(self.loss_of(anchor) for anchor in self.anchors)
