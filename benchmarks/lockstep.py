"""A swarm without a network, in one process and in step: real trainers, the real codec, the real merge and ledger.

In every slot each peer trains its share of a window's steps, offers its work on the fragment that is due, and takes the
merged update. outer.py, byzantine.py and absence.py run it; the latter two override what goes wrong. The same plan
gives the same figures on the same machine.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from braniac.model.config import ModelConfig
from braniac.model.data import Batches
from braniac.model.evaluate import held_out_loss
from braniac.model.fragments import Fragment, fragment_table, scatter_
from braniac.model.gpt import GPT
from braniac.model.sources import Corpus
from braniac.model.tiers import tier_width
from braniac.model.trainer import Trainer, TrainSettings
from braniac.node import bridge
from braniac.protocol import codec, ledger
from braniac.protocol.codec import CodecRules, Sparse, TileLayout
from braniac.protocol.errors import Refusal
from braniac.protocol.identity import Identity, PeerId
from braniac.protocol.manifest import Manifest, MergeRules
from braniac.protocol.merge import Contribution, Merged, merge

MICRO = ModelConfig(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=256, context=32, matformer_factor=4
)
"""82k parameters in 20 tiles of 64x64: what a benchmark of many runs can afford."""

TOKENS = 1000  # that an honest contribution says it was trained on: all train equally fast


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One swarm and how long it trains."""

    config: ModelConfig = MICRO
    tiers: tuple[int, ...] = (0,) * 8
    """One peer per entry."""
    windows: int = 12
    steps: int = 5
    """Inner steps per window."""
    batch: int = 4
    """Windows of text per step."""
    fragments: int = 5
    up: CodecRules = field(default_factory=lambda: CodecRules(256, 1))
    down: CodecRules = field(default_factory=lambda: CodecRules(1024, 2))
    merge: MergeRules = field(default_factory=MergeRules)
    evaluated: int = 512
    """Held-out windows of text that the loss is taken over."""
    seed: int = 0


@dataclass
class Peer:
    """One honest peer."""

    number: int
    tier: int
    id: PeerId
    trainer: Trainer


@dataclass(frozen=True)
class Offer:
    """What an honest peer offers to a slot, and what a receiver decodes from it."""

    contribution: Contribution
    sent: Sparse


class Lockstep:
    """The swarm. Subclasses override `train`, `offers`, `deliver` and `change`."""

    def __init__(self, plan: Plan, corpus: Corpus) -> None:
        self.plan = plan
        self.corpus = corpus
        self.fragments = fragment_table(plan.config, plan.fragments)
        identities = [Identity.from_seed(bytes([number]) * 32) for number in range(len(plan.tiers))]
        self.manifest = Manifest(
            name="lockstep",
            founder=identities[0].peer_id,
            epoch_ms=0,
            slot_ms=1000,
            seed=plan.seed,
            tiers=plan.config.tiers,
            model=plan.config.to_dict(),
            data={},
            layout_digest=bytes(32),
            fragments=bridge.fragment_specs(self.fragments),
            up=plan.up,
            down=plan.down,
            merge=plan.merge,
        )
        settings = TrainSettings(seed=plan.seed, batch=plan.batch)
        self.peers = [
            Peer(number, tier, i.peer_id, Trainer(plan.config, tier, self._batches(i.peer_id), settings))
            for number, (tier, i) in enumerate(zip(plan.tiers, identities, strict=True))
        ]
        self.anchors = {f.index: bridge.initial_anchor(plan.config, f, plan.seed) for f in self.fragments}
        self.payload_bits_per_parameter = 0.0
        """Of all that was offered, for one peer."""
        self.left_out: Counter[int] = Counter()
        """How often a peer's contribution was not admitted, by number."""
        self.refused: Counter[Refusal] = Counter()
        """Contributions that were not admitted, of anybody."""

    def _batches(self, peer: PeerId) -> Batches:
        return Batches(self.corpus, self.plan.seed, peer, self.plan.config.context, self.plan.batch)

    @property
    def slots(self) -> int:
        return self.plan.windows * self.plan.fragments

    def run(self) -> None:
        """Play all slots."""
        for slot in range(self.slots):
            self.train(slot)
            offers = self.offers(slot)
            fragment = self.manifest.fragment_of(slot)
            merged = merge(self.manifest, fragment, self.deliver(slot, offers))
            if merged is not None:
                self._settle(slot, merged, offers)

    def train(self, slot: int) -> None:
        """The inner steps that fall into a slot, by everybody."""
        for peer in self.peers:
            self.train_peer(peer, slot)

    def train_peer(self, peer: Peer, slot: int) -> None:
        steps, fragments = self.plan.steps, self.plan.fragments
        for _ in range((slot + 1) * steps // fragments - slot * steps // fragments):
            peer.trainer.step()

    def offers(self, slot: int) -> dict[int, Offer]:
        """What each peer that holds the fragment offers, by number of peer."""
        fragment = self.fragments[self.manifest.fragment_of(slot)]
        return {peer.number: self.offer(peer, fragment) for peer in self.holders(fragment)}

    def holders(self, fragment: Fragment) -> list[Peer]:
        return [peer for peer in self.peers if self.manifest.holds(peer.tier, fragment.index)]

    def offer(self, peer: Peer, fragment: Fragment) -> Offer:
        """A peer's uncommitted work on a fragment, compressed."""
        layout = self.layout(fragment.index)
        work = ledger.residual(bridge.to_fixed_point(peer.trainer.read(fragment)), self.anchors[fragment.index])
        payload, sent = codec.encode_topk(layout, self.manifest.up, work)
        self.payload_bits_per_parameter += 8 * len(payload) / self.manifest.parameters(peer.tier) / len(self.peers)
        return Offer(Contribution(peer.id, TOKENS, payload), sent)

    def layout(self, fragment: int) -> TileLayout:
        return self.manifest.fragments[fragment].layout

    def deliver(self, slot: int, offers: Mapping[int, Offer]) -> list[Contribution]:
        """What reaches the owner of the slot."""
        return [offer.contribution for offer in offers.values()]

    def _settle(self, slot: int, merged: Merged, offers: Mapping[int, Offer]) -> None:
        """The update moves the anchor and everybody's weights; admitted work is taken back."""
        fragment = self.fragments[self.manifest.fragment_of(slot)]
        layout = self.layout(fragment.index)
        update = codec.decode(layout, self.manifest.down, merged.update)
        admitted = {peer for peer, _ in merged.admitted}
        self.refused.update(refusal for _, refusal in merged.refused)
        for peer in self.holders(fragment):
            offered = offers.get(peer.number)
            if offered is not None and peer.id not in admitted:
                self.left_out[peer.number] += 1
            sent = offered.sent if offered is not None and peer.id in admitted else None
            self.change(peer, fragment, bridge.weight_change(ledger.settle(update, sent), fragment.size))
        self.anchors[fragment.index] = ledger.move_anchor(self.anchors[fragment.index], ledger.settle(update, None))

    def change(self, peer: Peer, fragment: Fragment, change: torch.Tensor) -> None:
        """What a certificate changes in one peer's weights."""
        peer.trainer.rebase(fragment, change)

    def agreed_losses(self) -> dict[int, float]:
        """Held-out loss of the anchors at the width of each tier, in nats per byte."""
        config = self.plan.config
        model = GPT(config, 0)
        parameters = dict(model.named_parameters())
        for fragment in self.fragments:
            scatter_(parameters, fragment, bridge.to_weights(self.anchors[fragment.index]))
        windows = self._held_out()
        return {tier: held_out_loss(model, windows, tier_width(config, tier)) for tier in range(config.tiers)}

    def own_loss(self, number: int) -> float:
        """Held-out loss of one peer's own weights, in nats per byte."""
        return held_out_loss(self.peers[number].trainer.model, self._held_out())

    def _held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        return Batches(self.corpus, self.plan.seed, b"evaluation", self.plan.config.context, 1).held_out(
            self.plan.evaluated
        )


def percent_over(losses: Sequence[float], clean: Sequence[float]) -> float:
    """How much higher losses are than those of the same seeds without trouble: the mean of the ratios, in percent."""
    return 100 * (statistics.mean(a / b for a, b in zip(losses, clean, strict=True)) - 1)
