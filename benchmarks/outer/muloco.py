"""DiLoCo with few bits: MuLoCo."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from braniac.model.sources import Corpus
from outer.compress import quantise
from outer.dense import DiLoCo
from outer.swarm import TILE, Peer, Plan, mean

TILE_BITS = 2 * TILE + 5 * 32
"""Two bits per value, and of each tile its mean and four bin means in float32."""


class MuLoCo(DiLoCo):
    """MuLoCo (Thérien et al. 2025, arXiv 2505.23725; github.com/facebookresearch/MuLoCo) with 2 bits per value.

    Muon inside, Nesterov outside (rate 0.8, momentum 0.9), and the quantised path of `quantized_outer_sgd.py`: each
    peer adds its difference to an error buffer that decays by 0.9, quantises it to four bins, and keeps the rest; what
    was reduced is quantised once more on its way back. As everybody here has Muon inside, the bits are what differs
    from DiLoCo. Sent: 2-bit codes and bin means, in a ring's volume. Departure: a quantiser's row is a 64x64 tile, not
    a row of a matrix, whose bin means would outweigh the codes in matrices as small as here.
    """

    def __init__(
        self,
        plan: Plan,
        corpus: Corpus,
        *,
        rate: float = 0.8,
        momentum: float = 0.9,
        decay: float = 0.9,
        quantiser: Callable[[Tensor], Tensor] = quantise,
    ) -> None:
        super().__init__(plan, corpus, rate=rate, momentum=momentum)
        self.decay = decay
        self.quantiser = quantiser
        self.errors = torch.zeros(len(self.peers), self.size)

    def reduce(self, slot: int, present: list[Peer]) -> Tensor:
        sent = []
        for peer in present:
            error = self.decay * self.errors[peer.number] + self.weights - self.read(peer)
            sent.append(self._quantised(error))
            self.errors[peer.number] = error - sent[-1]
        tiles = self.size // TILE
        self.books.all_reduce(self.now(slot), [peer.number for peer in present], tiles * TILE_BITS // 8)
        return self._quantised(mean(sent))

    def _quantised(self, flat: Tensor) -> Tensor:
        return self.quantiser(flat.view(-1, TILE)).flatten()
