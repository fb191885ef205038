"""Methods that send a few DCT coefficients after every step: DeMo and DisTrO."""

from __future__ import annotations

import torch
from torch import Tensor

from braniac.model.sources import Corpus
from outer.compress import INDEX_BITS, Chosen, contributor_mean, dct_matrix, top_k, transform
from outer.swarm import TILE, GradientSwarm, Peer, Plan


class DeMo(GradientSwarm):
    """DeMo (Peng et al. 2024, arXiv 2411.19870; github.com/bloc97/DeMo): decoupled momentum.

    After every step: m <- 0.999 m + lr g; the top 32 of 4096 DCT coefficients per tile are sent and taken from m; all
    move by lr times the sign of the contributors' mean. It is its own inner optimizer, so Muon has no part in it; the
    learning rate (published: 1e-3) is swept by the same factors and follows the same schedule. Sent: 12 bits of index
    and 16 of value per coefficient, uploaded once. (The reference code sends 64 and 32 bits, to everybody.) What a peer
    that drops out had sent is lost.
    """

    VALUE_BITS = 16

    def __init__(
        self, plan: Plan, corpus: Corpus, *, rate: float = 1e-3, decay: float = 0.999, per_tile: int = 32
    ) -> None:
        super().__init__(plan, corpus)
        self.rate = rate * plan.rate
        self.decay = decay
        self.per_tile = per_tile
        self.dct = dct_matrix()
        self.momenta = torch.zeros(len(self.peers), self.size)

    @property
    def payload_bytes(self) -> int:
        """Of one contribution."""
        return -(-self.size // TILE * self.per_tile * (INDEX_BITS + self.VALUE_BITS) // 8)

    def learning_rate(self, slot: int) -> float:
        return self.rate * self.peers[0].trainer.settings.lr_scale(slot)

    def exchange(self, slot: int) -> None:
        rate, present = self.learning_rate(slot), self.present(slot)
        sent = {peer.number: self.offer(peer, rate) for peer in self.peers}
        readers = [peer.number for peer in self.peers]
        for peer in present:
            self.books.publish(self.now(slot), peer.number, readers, self.payload_bytes)
        if present:
            average = contributor_mean(TILE, [sent[peer.number] for peer in present])
            self.weights = self.weights - rate * transform(average, self.dct.T).flatten().sign()
        for peer in self.peers:
            self.load(peer, self.start(peer, rate))

    def offer(self, peer: Peer, rate: float) -> Chosen:
        """What a peer sends after a step."""
        momentum = self.decay * self.momenta[peer.number] + rate * self.gradient(peer)
        chosen = top_k(transform(momentum, self.dct), self.per_tile)
        self.momenta[peer.number] = momentum - self.decoded(chosen)
        return chosen

    def decoded(self, chosen: Chosen) -> Tensor:
        """What coefficients stand for, float32 [size]."""
        return transform(chosen.dense(TILE), self.dct.T).flatten()

    def start(self, peer: Peer, rate: float) -> Tensor:
        """Where a peer takes its next gradient, float32 [size]."""
        return self.weights


class DisTrO(DeMo):
    """DisTrO as Psyche has it (github.com/PsycheFoundation/psyche, `distro.rs`), with one bit per value.

    DeMo with four changes: k is 4, the momentum decays by 0.995, of each coefficient only the sign is sent, and a
    step's gradient is taken where the peer's own momentum would lead it (look-ahead). What was sent is taken from the
    momentum, with its values and not only its signs, when the next contribution is made, as only then it is known to
    have been part of the round; if the peer dropped out, it stays. Sent: 12 + 1 bits per coefficient (Psyche: 16 + 1).
    Departures: results are applied after one step and not after two, and there are no witnesses.
    """

    VALUE_BITS = 1

    def __init__(
        self, plan: Plan, corpus: Corpus, *, rate: float = 1e-3, decay: float = 0.995, per_tile: int = 4
    ) -> None:
        super().__init__(plan, corpus, rate=rate, decay=decay, per_tile=per_tile)
        self._made: dict[int, Chosen] = {}
        self._part_of_round: dict[int, Chosen] = {}
        """By number of peer: its last contribution, if it was part of the round."""

    def exchange(self, slot: int) -> None:
        super().exchange(slot)
        self._part_of_round = {peer.number: self._made[peer.number] for peer in self.present(slot)}

    def offer(self, peer: Peer, rate: float) -> Chosen:
        momentum = self.momenta[peer.number]
        if peer.number in self._part_of_round:
            momentum = momentum - self.decoded(self._part_of_round[peer.number])
        momentum = self.decay * momentum + rate * self.gradient(peer)
        chosen = top_k(transform(momentum, self.dct), self.per_tile)
        self.momenta[peer.number] = momentum
        self._made[peer.number] = chosen
        return Chosen(chosen.places, torch.where(chosen.values < 0, -1.0, 1.0))  # 0 counts as positive there too

    def start(self, peer: Peer, rate: float) -> Tensor:
        return self.weights - rate * self.momenta[peer.number].sign()
