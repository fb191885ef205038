"""I1, bitwise: whatever happens to certificates, x - anchor is my own work less what the applied ones took from me."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braniac.protocol import codec, ledger, limits, screen
from braniac.protocol.bitpack import Int32Array, Int64Array
from braniac.protocol.codec import CodecRules
from braniac.protocol.errors import WireError
from braniac.protocol.manifest import MergeRules
from braniac.protocol.merge import Contribution, Merged, merge
from braniac.protocol.tiles import EMPTY, Sparse, TileLayout
from tests.unit.swarm_harness import identity, make_manifest

LAYOUT = TileLayout(((16, 2), (5, 1)))
MANIFEST = make_manifest(
    rings=(0,), layout=LAYOUT, up=CodecRules(1024, 2), down=CodecRules(1024, 1), merge=MergeRules(step_q16=5 << 15)
)
PEERS = [identity(n).peer_id for n in range(3)]


def sparse(positions: list[int], values: list[int]) -> Sparse:
    return Sparse(np.asarray(positions, np.int64), np.asarray(values, np.int32))


@dataclass
class Replica:
    """One peer's fragment, with an account that is kept without `ledger`."""

    anchor: Int32Array
    weights: Int64Array
    steps: Int64Array
    taken: dict[int, tuple[Sparse, Sparse | None]] = field(default_factory=dict)
    """certificate number -> (update, my contribution if it is in)."""

    @classmethod
    def new(cls) -> Replica:
        anchor = np.arange(LAYOUT.size, dtype=np.int32) * 1000
        return cls(anchor, anchor.astype(np.int64), np.zeros(LAYOUT.size, np.int64))

    def train(self, step: Int64Array) -> None:
        self.weights = self.weights + step
        self.steps = self.steps + step

    def apply(self, number: int, update: Sparse, sent: Sparse | None, *, undo: bool = False) -> None:
        settlement = ledger.settle(update, sent, undo=undo)
        self.anchor = ledger.move_anchor(self.anchor, settlement)
        self.weights = self.weights.copy()
        self.weights[settlement.positions] += settlement.weights
        if undo:
            del self.taken[number]
        else:
            self.taken[number] = (update, sent)

    def check(self) -> None:
        owed = self.steps.copy()
        for update, sent in self.taken.values():
            mine = sent.dense(LAYOUT.size) if sent else np.zeros(LAYOUT.size, np.int64)
            listed = np.zeros(LAYOUT.size, bool)
            listed[update.positions] = True
            owed -= np.where(listed, mine, 0)
        assert np.array_equal(ledger.residual(self.weights, self.anchor), owed)


@dataclass
class Issued:
    """A certificate on its way to the replicas."""

    slot: int
    merged: Merged
    sent: dict[int, Sparse]

    @property
    def update(self) -> Sparse:
        return codec.decode(LAYOUT, MANIFEST.down, self.merged.update)

    def of(self, peer: int) -> Sparse | None:
        return self.sent.get(peer) if any(p == PEERS[peer] for p, _ in self.merged.admitted) else None


def issue(slot: int, replicas: list[Replica], who: list[int], loud: int) -> Issued | None:
    """Peers `who` offer their residual; the loudest is clipped, a damaged one is refused."""
    given, sent = [], {}
    for peer in who:
        z = ledger.residual(replicas[peer].weights, replicas[peer].anchor)
        payload, sent[peer] = codec.encode_topk(LAYOUT, MANIFEST.up, z * (50 if peer == loud else 1))
        if loud == peer + 10:
            payload = payload[:-1]
        given.append(Contribution(PEERS[peer], 100 + peer, payload))
    merged = merge(MANIFEST, 0, given)
    return Issued(slot, merged, sent) if merged else None


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["train", "issue", "issue", "replace", "deliver", "deliver", "deliver", "deliver late", "undo"]
        ),
        st.integers(0, 2),
        st.lists(st.integers(0, 2), min_size=1, unique=True),
        st.integers(0, 20),
    ),
    max_size=40,
)


@given(actions=ACTIONS, seed=st.integers(0, 1 << 20))
@settings(max_examples=70)
def test_any_history(actions: list[tuple[str, int, list[int], int]], seed: int) -> None:
    """Lost, late, duplicated, undone and replaced certificates; clipped and refused contributions."""
    rng = np.random.default_rng(seed)
    replicas = [Replica.new() for _ in PEERS]
    issued: list[Issued] = []
    for slot, (action, peer, who, pick) in enumerate(actions):
        replica = replicas[peer]
        match action:
            case "train":
                replica.train(rng.integers(-5000, 5000, LAYOUT.size))
            case "issue" | "replace":
                same_slot = issued[-1].slot if action == "replace" and issued else slot
                if (certificate := issue(same_slot, replicas, who, pick)) is not None:
                    issued.append(certificate)
            case "deliver" | "deliver late" if issued:
                number = len(issued) - 1 if action == "deliver" else pick % len(issued)
                deliver(replica, peer, issued, number)
            case "undo" if replica.taken:
                number = sorted(replica.taken)[pick % len(replica.taken)]
                replica.apply(number, *replica.taken[number], undo=True)
        for each in replicas:
            each.check()
    for peer, replica in enumerate(replicas):
        for number in list(replica.taken):
            replica.apply(number, *replica.taken[number], undo=True)
        replica.check()
        assert np.array_equal(replica.anchor, Replica.new().anchor), f"undoing everything left a trace at {peer}"
        assert np.array_equal(replica.weights, Replica.new().weights + replica.steps)


def deliver(replica: Replica, peer: int, issued: list[Issued], number: int) -> None:
    """Apply certificate `number` as the engine would: once, and in place of another one of its slot."""
    rivals = [n for n in replica.taken if issued[n].slot == issued[number].slot]
    if number in rivals:
        return
    for rival in rivals:
        replica.apply(rival, *replica.taken[rival], undo=True)
    replica.apply(number, issued[number].update, issued[number].of(peer))


def test_the_order_of_certificates_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    replicas = [Replica.new() for _ in PEERS]
    issued = []
    for slot in range(4):
        for replica in replicas:
            replica.train(rng.integers(-9000, 9000, LAYOUT.size))
        certificate = issue(slot, replicas, [0, 1, 2], loud=slot)
        assert certificate is not None
        issued.append(certificate)
    first, second = replicas[0], Replica(replicas[0].anchor, replicas[0].weights, replicas[0].steps)
    for number in (0, 1, 2, 3):
        deliver(first, 0, issued, number)
    for number in (3, 1, 0, 2):
        deliver(second, 0, issued, number)
    assert np.array_equal(first.anchor, second.anchor)
    assert np.array_equal(first.weights, second.weights)


def test_what_the_update_left_out_stays_with_its_sender() -> None:
    settlement = ledger.settle(sparse([1, 4], [10, -20]), sparse([0, 1, 7], [5, 6, 7]))
    assert settlement.positions.tolist() == [1, 4]
    assert settlement.anchor.tolist() == [10, -20]
    assert settlement.weights.tolist() == [10 - 6, -20]


def test_whoever_is_not_in_the_certificate_just_follows() -> None:
    for nothing in (None, EMPTY):
        settlement = ledger.settle(sparse([2], [9]), nothing)
        assert settlement.anchor.tolist() == settlement.weights.tolist() == [9]


def test_a_swarm_of_one_gives_everything_away() -> None:
    """After each certificate the residual is what the codec left out, and nothing else."""
    replica = Replica.new()
    rng = np.random.default_rng(9)
    alone = make_manifest(rings=(0,), layout=LAYOUT)
    for _ in range(10):
        replica.train(rng.integers(-9000, 9000, LAYOUT.size))
        before = ledger.residual(replica.weights, replica.anchor)
        payload, sent = codec.encode_topk(LAYOUT, alone.up, before)
        merged = merge(alone, 0, [Contribution(PEERS[0], 5, payload)])
        assert merged is not None
        update = codec.decode(LAYOUT, alone.down, merged.update)
        x = replica.weights.copy()
        replica.apply(0, update, sent)
        del replica.taken[0]
        replica.steps = ledger.residual(replica.weights, replica.anchor)
        assert np.array_equal(replica.weights, x), "a peer that is alone keeps its weights"
        assert np.array_equal(replica.steps, before - sent.dense(LAYOUT.size))


def test_a_clipped_contribution_is_taken_whole() -> None:
    """What clipping removed is forfeited (clipped): it does not come back for ever, louder each time."""
    loud = sparse([0], [1 << 20])
    assert screen.clip(loud, limits.CLIP_ONE // 4).tolist() == [1 << 18]
    settlement = ledger.settle(sparse([0], [1 << 18]), loud)
    assert settlement.weights.tolist() == [(1 << 18) - (1 << 20)]


def test_an_anchor_that_would_leave_its_range_is_refused() -> None:
    anchor = np.array([limits.ANCHOR_MAX - 1, 0], np.int32)
    ledger.move_anchor(anchor, ledger.settle(sparse([0], [1]), None))
    for values in ([2, 0], [limits.LEVEL_MAX, 1]):
        with pytest.raises(WireError):
            ledger.move_anchor(anchor, ledger.settle(sparse([0, 1], values), None))
    assert anchor.tolist() == [limits.ANCHOR_MAX - 1, 0]
