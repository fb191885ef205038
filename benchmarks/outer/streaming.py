"""DiLoCo a fragment at a time: Streaming DiLoCo."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from torch import Tensor

from braniac.model.fragments import Fragment, fragment_table, gather, scatter_
from braniac.model.sources import Corpus
from outer.compress import float4
from outer.dense import Nesterov
from outer.swarm import TILE, FlatSwarm, Plan, mean

TILE_BITS = 4 * TILE + 32
"""Four bits per value and a float32 scale per tile."""


class StreamingDiLoCo(FlatSwarm):
    """Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512), as in torchft's `local_sgd.py`.

    Every H/P steps one of P fragments is due: its differences to the agreed weights are reduced in 4-bit floats (E3M0)
    while training goes on, and `delay` slots later the outer step (Nesterov, rate 0.7, momentum 0.9) is taken and mixed
    into each peer's weights: x <- mixing x + (1 - mixing) agreed. Sent: 4 bits per value in a ring's volume. Peers that
    drop out are missing from the mean. Departures: a fragment is every P-th tile, not every P-th layers, of which small
    models have few; scales are per tile; the inner optimizer is everybody's.
    """

    def __init__(
        self,
        plan: Plan,
        corpus: Corpus,
        *,
        rate: float = 0.7,
        momentum: float = 0.9,
        mixing: float = 0.5,
        delay: int = 1,
        quantiser: Callable[[Tensor], Tensor] = float4,
    ) -> None:
        super().__init__(plan, corpus)
        self.fragments = fragment_table(plan.config, plan.fragments)
        self.mixing = mixing
        self.delay = delay
        self.quantiser = quantiser
        first = self.peers[0].trainer.params
        self.agreed = [gather(first, fragment) for fragment in self.fragments]
        self.outer = [Nesterov(fragment.size, rate * plan.outer_rate, momentum) for fragment in self.fragments]
        self._under_way: deque[tuple[int, Fragment, Tensor]] = deque()

    @property
    def slots_per_window(self) -> int:
        return self.plan.fragments

    def exchange(self, slot: int) -> None:
        self._begin(slot)
        while self._under_way and self._under_way[0][0] + self.delay <= slot:
            _, fragment, delta = self._under_way.popleft()
            self._finish(fragment, delta)

    def _begin(self, slot: int) -> None:
        fragment, present = self.fragments[slot % len(self.fragments)], self.present(slot)
        if not present:
            return
        anchor = self.agreed[fragment.index]
        sent = [self._quantised(anchor - peer.trainer.read(fragment)) for peer in present]
        size = fragment.size // TILE * TILE_BITS // 8
        self.books.all_reduce(self.now(slot), [peer.number for peer in present], size)
        self._under_way.append((slot, fragment, mean(sent)))

    def _quantised(self, flat: Tensor) -> Tensor:
        return self.quantiser(flat.view(-1, TILE)).flatten()

    def _finish(self, fragment: Fragment, delta: Tensor) -> None:
        agreed = self.agreed[fragment.index] - self.outer[fragment.index].step(delta)
        self.agreed[fragment.index] = agreed
        for peer in self.peers:
            mixed = agreed + self.mixing * (peer.trainer.read(fragment) - agreed)
            peer.trainer.load_fragment(fragment, mixed)

    def loss(self) -> float:
        parameters = {name: p.detach().clone() for name, p in self.peers[0].trainer.params.items()}
        for fragment, agreed in zip(self.fragments, self.agreed, strict=True):
            scatter_(parameters, fragment, agreed)
        return self.loss_of(gather(parameters, self.whole))
