"""Braniac without a network: the production codec, merge and ledger between real trainers.

In every slot each peer trains its share of a window's steps, offers its work on the fragment that is due, and takes the
merged update. Scripts about trouble (what hostile or absent peers cost) override what goes wrong.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from braniac.model.evaluate import held_out_loss
from braniac.model.fragments import Fragment, fragment_table, scatter_
from braniac.model.gpt import GPT
from braniac.model.sources import Corpus
from braniac.model.tiers import tier_width
from braniac.node import bridge
from braniac.node.pacing import paced_bytes_per_slot
from braniac.protocol import codec, committee, ledger, tree
from braniac.protocol.errors import Refusal
from braniac.protocol.identity import PeerId
from braniac.protocol.manifest import Manifest
from braniac.protocol.merge import Contribution, Merged, merge
from braniac.protocol.tiles import Sparse, TileLayout
from outer.swarm import Peer, Plan, Swarm, identity
from outer.uplinks import Uplinks

TOKENS = 1000  # that an honest contribution says it was trained on: all train equally fast


@dataclass(frozen=True)
class Offer:
    """What an honest peer offers to a slot, and what a receiver decodes from it."""

    contribution: Contribution
    sent: Sparse


class Braniac(Swarm):
    """The swarm. In slot s fragment s mod P is due, and training never waits.

    Sent: payloads as encoded, to all seats of the slot's committee, and the encoded update, which the seats have, down
    the tree to all who hold the fragment (uplinks.py). A peer that drops out offers nothing to
    the slot and keeps its work; it has the update as soon as the others. The weights of all change at once, and do
    not wait for what is on its way: delay.py asks what that costs. Subclasses override `train`, `offers`, `deliver`,
    `settle` and `change`.
    """

    pace = 0.0
    """Of uploads, in times of the average (`caps.upload_pace`); 0: at once."""

    def __init__(self, plan: Plan, corpus: Corpus) -> None:
        super().__init__(plan, corpus)
        self.fragments = fragment_table(plan.config, plan.fragments)
        self.manifest = manifest_of(plan)
        self.anchors = {f.index: bridge.initial_anchor(plan.config, f, plan.seed) for f in self.fragments}
        self.payload_bits_per_parameter = 0.0
        """Of all that was offered, for one peer."""
        self.left_out: Counter[int] = Counter()
        """How often a peer's contribution was not admitted, by number."""
        self.refused: Counter[Refusal] = Counter()
        """Contributions that were not admitted, of anybody."""
        self._missed: Counter[tuple[int, int]] = Counter()
        """Turns in a row without being admitted, by number of peer and fragment."""
        slots_per_step = self.slots_per_window / plan.steps
        paces = [paced_bytes_per_slot(self.manifest, tier, len(plan.tiers), self.pace) for tier in plan.tiers]
        self.uplinks = Uplinks(self.books, [each * slots_per_step for each in paces])

    @property
    def slots_per_window(self) -> int:
        return self.plan.fragments

    def run(self, watch: Callable[[int], None] = lambda slot: None) -> None:
        super().run(watch)
        self.uplinks.drain()

    def exchange(self, slot: int) -> None:
        offers = self.offers(slot)
        delivered = self.deliver(slot, offers)
        merged = merge(self.manifest, self.manifest.fragment_of(slot), delivered)
        self._count(slot, delivered, merged)
        if merged is not None:
            self.settle(slot, merged, offers)

    def _count(self, slot: int, delivered: Sequence[Contribution], merged: Merged | None) -> None:
        numbers = {peer.id: peer.number for peer in self.peers}
        seats = committee.committee(self.manifest.run_id, slot, numbers)
        sent = [
            (numbers[contribution.peer], numbers[seat], len(contribution.payload))
            for seat in seats
            for contribution in delivered
            if contribution.peer in numbers and contribution.peer != seat
        ]
        ways = [(numbers[parent], numbers[child]) for parent, child in self.ways(slot, seats)] if merged else []
        size = len(merged.update) if merged else 0
        self.uplinks.begin(self.now(slot), sent, size, map(numbers.__getitem__, seats), ways)

    def ways(self, slot: int, seats: Sequence[PeerId]) -> Iterator[tuple[PeerId, PeerId]]:
        """Who sends the update of a slot to whom."""
        holders = [peer.id for peer in self.holders(self.fragments[self.manifest.fragment_of(slot)])]
        for me in holders:
            if me not in seats:
                yield tree.ancestors(self.manifest.run_id, slot, seats, holders, me)[0], me

    def offers(self, slot: int) -> dict[int, Offer]:
        """What each peer offers that holds the fragment and does not drop out, by number of peer."""
        fragment = self.fragments[self.manifest.fragment_of(slot)]
        holders = {peer.number for peer in self.holders(fragment)}
        return {peer.number: self.offer(peer, fragment) for peer in self.present(slot) if peer.number in holders}

    def holders(self, fragment: Fragment) -> list[Peer]:
        return [peer for peer in self.peers if self.manifest.holds(peer.tier, fragment.index)]

    def offer(self, peer: Peer, fragment: Fragment) -> Offer:
        """A peer's uncommitted work on a fragment, compressed."""
        layout = self.layout(fragment.index)
        work = ledger.residual(bridge.to_fixed_point(peer.trainer.read(fragment)), self.anchors[fragment.index])
        turns = self.manifest.up.turns_after(self._missed[peer.number, fragment.index])
        payload, sent = codec.encode_topk(layout, self.manifest.up, work, turns)
        self.payload_bits_per_parameter += 8 * len(payload) / self.manifest.parameters(peer.tier) / len(self.peers)
        return Offer(Contribution(peer.id, TOKENS, payload), sent)

    def layout(self, fragment: int) -> TileLayout:
        return self.manifest.fragments[fragment].layout

    def deliver(self, slot: int, offers: Mapping[int, Offer]) -> list[Contribution]:
        """What reaches the owner of the slot."""
        return [offer.contribution for offer in offers.values()]

    def settle(self, slot: int, merged: Merged, offers: Mapping[int, Offer]) -> None:
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
            self.end_turn(peer, fragment, peer.id in admitted)
            sent = offered.sent if offered is not None and peer.id in admitted else None
            self.change(peer, fragment, bridge.weight_change(ledger.settle(update, sent), fragment.size))
        self.anchors[fragment.index] = ledger.move_anchor(self.anchors[fragment.index], ledger.settle(update, None))

    def end_turn(self, peer: Peer, fragment: Fragment, taken: bool) -> None:
        """A peer's work on a fragment was due, and is in the update or is not."""
        self._missed[peer.number, fragment.index] = 0 if taken else self._missed[peer.number, fragment.index] + 1

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
        windows = self.held_out()
        return {tier: held_out_loss(model, windows, tier_width(config, tier)) for tier in range(config.tiers)}

    def loss(self) -> float:
        return self.agreed_losses()[0]

    def own_loss(self, number: int) -> float:
        """Held-out loss of one peer's own weights, in nats per byte."""
        return held_out_loss(self.peers[number].trainer.model, self.held_out())


def manifest_of(plan: Plan) -> Manifest:
    """The manifest of a plan's run. Raises ManifestError for one that no run may have, such as too large a step."""
    return Manifest(
        name="benchmark",
        founder=identity(0).peer_id,
        epoch_ms=0,
        slot_ms=1000,
        seed=plan.seed,
        tiers=plan.config.tiers,
        model=plan.config.to_dict(),
        data={},
        layout_digest=bytes(32),
        fragments=bridge.fragment_specs(fragment_table(plan.config, plan.fragments)),
        up=plan.up,
        down=plan.down,
        merge=replace(plan.merge, step_q16=round(plan.merge.step_q16 * plan.outer_rate)),
    )


def percent_over(losses: Sequence[float], clean: Sequence[float]) -> float:
    """How much higher losses are than those of the same seeds without trouble: the mean of the ratios, in percent."""
    return 100 * (statistics.mean(a / b for a, b in zip(losses, clean, strict=True)) - 1)
