"""DiLoCo with few values: SparseLoCo."""

from __future__ import annotations

import torch
from torch import Tensor

from braniac.model.sources import Corpus
from outer.compress import INDEX_BITS, Chosen, contributor_mean, quantise, top_k
from outer.swarm import TILE, FlatSwarm, Peer, Plan


class SparseLoCo(FlatSwarm):
    """SparseLoCo (Sarfi et al. 2025, arXiv 2508.15706) as its production code has it (github.com/tplr-ai/templar).

    Every H steps: e <- 0.95 e + rate (anchor - weights); the top 64 of 4096 values per tile, in four bins per tensor,
    are sent and taken from e; of each tensor, who is louder than the median is turned down to it; each value moves by
    the mean over those that sent it. (The paper divides by all peers.) No outer momentum; all go on from the result.
    Sent: 12 bits of index and 2 of code per value and four float32 bin means per tensor, uploaded once, to a store from
    which the others download. What a peer that drops out had sent is lost to it too. Departure: the inner optimizer is
    everybody's.
    """

    def __init__(
        self,
        plan: Plan,
        corpus: Corpus,
        *,
        rate: float = 1.0,
        decay: float = 0.95,
        per_tile: int = 64,
        bins: int = 4,
    ) -> None:
        """`bins` 0: values are not quantised, and take 32 bits."""
        super().__init__(plan, corpus)
        self.rate = rate * plan.outer_rate
        self.decay = decay
        self.per_tile = per_tile
        self.bins = bins
        self.errors = torch.zeros(len(self.peers), self.size)
        names = [tile.tensor for tile in self.whole.tiles]
        self.tensors = [torch.tensor([at for at, n in enumerate(names) if n == name]) for name in dict.fromkeys(names)]
        """Numbers of the tiles of each tensor."""

    @property
    def slots_per_window(self) -> int:
        return 1

    @property
    def payload_bytes(self) -> int:
        """Of one contribution."""
        code_bits = (self.bins - 1).bit_length() if self.bins else 32
        values = self.size // TILE * self.per_tile
        return -(-values * (INDEX_BITS + code_bits) // 8) + 4 * self.bins * len(self.tensors)

    def exchange(self, slot: int) -> None:
        present = self.present(slot)
        sent = {peer.number: self._offer(peer) for peer in self.peers}
        readers = [peer.number for peer in self.peers]
        for peer in present:
            self.books.publish(self.now(slot), peer.number, readers, self.payload_bytes)
        if not present:
            return
        self.weights = self.weights - self._clipped_mean([sent[peer.number] for peer in present])
        for peer in self.peers:
            self.load(peer, self.weights)

    def _offer(self, peer: Peer) -> Chosen:
        error = self.decay * self.errors[peer.number] + self.rate * (self.weights - self.read(peer))
        chosen = top_k(error.view(-1, TILE), self.per_tile)
        if self.bins:
            for tiles in self.tensors:
                values = chosen.values[tiles]
                chosen.values[tiles] = quantise(values.view(1, -1), self.bins).view_as(values)
        self.errors[peer.number] = error - chosen.dense(TILE).flatten()
        return chosen

    def _clipped_mean(self, contributions: list[Chosen]) -> Tensor:
        """float32 [size]."""
        norms = torch.stack([torch.stack([c.values[tiles].norm() for tiles in self.tensors]) for c in contributions])
        factors = (median(norms) / norms.clamp_min(1e-12)).clamp_max(1)
        for factor, chosen in zip(factors, contributions, strict=True):
            for tiles, of_tensor in zip(self.tensors, factor, strict=True):
                chosen.values[tiles] *= of_tensor
        return contributor_mean(TILE, contributions).flatten()


def median(rows: Tensor) -> Tensor:
    """Per column of [rows, columns]; of an even number of rows the lower of the middle two, as torch.median has it."""
    return rows.median(0).values
