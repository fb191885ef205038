"""Each method of the comparisons against a few independent lines of what was published, and its bytes.

Peers do not train here: they are moved by, or have gradients of, vectors drawn beforehand.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from braniac.model.config import ModelConfig
from braniac.model.data import Batches
from braniac.model.errors import ConfigError
from braniac.model.sources import Corpus
from braniac.model.trainer import Trainer, TrainSettings
from braniac.protocol import committee, limits
from braniac.protocol.codec import CodecRules
from braniac.protocol.merge import Merged
from outer.books import Books
from outer.braniac import Braniac, Offer
from outer.compress import dct_matrix, float4, quantise, top_k, transform
from outer.demo import DeMo, DisTrO
from outer.dense import AllReduce, DiLoCo
from outer.methods import FAILING, METHODS, chosen
from outer.muloco import MuLoCo
from outer.noloco import NoLoCo
from outer.sparseloco import SparseLoCo
from outer.streaming import StreamingDiLoCo
from outer.swarm import FlatSwarm, Peer, Plan, Swarm
from outer.uplinks import Uplinks

CONFIG = ModelConfig(
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=64,
    vocab_size=64,
    context=8,
    matformer_factor=1,
)
"""8 tiles of 64x64."""
SIZE = 8 * 4096
PLAN = Plan(config=CONFIG, tiers=(0, 0, 0), windows=3, steps=4, batch=2, fragments=2, evaluated=4)
ONE = replace(PLAN, tiers=(0,))


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    text = np.random.default_rng(0).integers(0, 64, 4000).astype(np.uint8)
    return Corpus("noise", (text[:3000],), (text[3000:],))


def vectors(rounds: int, peers: int, seed: int = 0) -> Tensor:
    """float32 [rounds, peers, SIZE], about as large as what a few steps do."""
    return 0.01 * torch.randn(rounds, peers, SIZE, generator=torch.Generator().manual_seed(seed))


def moved(swarm: FlatSwarm, moves: Tensor) -> None:
    """Run with given moves instead of training."""

    def train(self: FlatSwarm, slot: int) -> None:
        for peer in self.peers:
            self.load(peer, self.read(peer) + moves[slot, peer.number])

    swarm.train = MethodType(train, swarm)  # type: ignore[method-assign]
    swarm.run()


def driven(swarm: FlatSwarm, gradients: Tensor) -> None:
    """Run with given gradients instead of training."""
    at = {"slot": 0}
    swarm.train = MethodType(lambda self, slot: at.update(slot=slot), swarm)  # type: ignore[method-assign]
    swarm.gradient = lambda peer: gradients[at["slot"], peer.number]  # type: ignore[attr-defined]
    swarm.run()


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def plain(corpus: Corpus, swarm: Swarm) -> dict[str, Tensor]:
    """The weights after as many steps of the same peer by itself."""
    batches = Batches(corpus, 0, swarm.peers[0].id, CONFIG.context, PLAN.batch)
    trainer = Trainer(CONFIG, 0, batches, TrainSettings(seed=0, batch=PLAN.batch))
    for _ in range(PLAN.total_steps):
        trainer.step()
    return {name: p.detach() for name, p in trainer.params.items()}


def test_averaging_takes_the_mean_of_the_weights(corpus: Corpus) -> None:
    swarm, moves = METHODS["averaging"](PLAN, corpus), vectors(3, 3)
    assert isinstance(swarm, FlatSwarm)
    start = swarm.weights
    moved(swarm, moves)
    same(swarm.weights, start + moves.mean(1).sum(0))
    for peer in swarm.peers:
        same(swarm.read(peer), swarm.weights)


def test_diloco_takes_torchs_nesterov_step(corpus: Corpus) -> None:
    swarm, moves = DiLoCo(PLAN, corpus, rate=0.7, momentum=0.9), vectors(3, 3)
    expected = swarm.weights.clone().requires_grad_()
    sgd = torch.optim.SGD([expected], lr=0.7, momentum=0.9, nesterov=True)
    for move in moves:
        expected.grad = -move.mean(0)
        sgd.step()
    moved(swarm, moves)
    same(swarm.weights, expected.detach())


def test_all_reduce_updates_with_the_mean_gradient(corpus: Corpus) -> None:
    plan = replace(PLAN, windows=1, steps=1, tiers=(0, 0))
    swarm = AllReduce(plan, corpus)
    alone = [Trainer(CONFIG, 0, peer.trainer.batches, peer.trainer.settings) for peer in swarm.peers]
    for trainer in alone:
        trainer.model.loss(*trainer.batches.batch(0), None).backward()
    gradients = [[p.grad.clone() for p in trainer.params.values() if p.grad is not None] for trainer in alone]
    for p, a, b in zip(alone[0].params.values(), *gradients, strict=True):
        p.grad = (a + b) / 2
    alone[0].optimizer.step(alone[0].settings.lr_scale(0), [64])
    swarm.run()
    for peer in swarm.peers:
        for name, p in peer.trainer.params.items():
            torch.testing.assert_close(p, alone[0].params[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("delay", [0, 1])
def test_streaming_diloco_steps_each_fragment_late_and_mixes(corpus: Corpus, delay: int) -> None:
    swarm = StreamingDiLoCo(PLAN, corpus, rate=0.7, momentum=0.9, mixing=0.5, delay=delay, quantiser=lambda x: x)
    moves = vectors(6, 3)
    whole = np.concatenate([[t.tensor + str((t.row0, t.col0)) for t in f.tiles] for f in swarm.fragments])
    order = [t.tensor + str((t.row0, t.col0)) for t in swarm.whole.tiles]
    rows = torch.tensor([order.index(name) for name in whole])  # tiles, fragment after fragment
    theta = swarm.weights.view(8, 4096)[rows].view(2, 4 * 4096).clone()
    x = [theta.clone() for _ in range(3)]
    momentum, under_way = torch.zeros_like(theta), {}
    for slot in range(6):
        for r in range(3):
            x[r] += moves[slot, r].view(8, 4096)[rows].view(2, -1)
        f = slot % 2
        under_way[slot] = theta[f] - sum(own[f] for own in x) / 3
        if (then := slot - delay) >= 0:
            f, delta = then % 2, under_way[then]
            momentum[f] = 0.9 * momentum[f] + delta
            theta[f] -= 0.7 * (delta + 0.9 * momentum[f])
            for own in x:
                own[f] = 0.5 * own[f] + 0.5 * theta[f]
    moved(swarm, moves)
    for f in range(2):
        same(swarm.agreed[f], theta[f])
        for peer, own in zip(swarm.peers, x, strict=True):
            same(peer.trainer.read(swarm.fragments[f]), own[f])


def test_muloco_feeds_back_what_a_quantiser_leaves_out(corpus: Corpus) -> None:
    def coarse(x: Tensor) -> Tensor:
        return (x * 50).round() / 50

    swarm, moves = MuLoCo(PLAN, corpus, rate=0.8, momentum=0.9, decay=0.9, quantiser=coarse), vectors(3, 3)
    theta, u, errors = swarm.weights.clone(), torch.zeros(SIZE), torch.zeros(3, SIZE)
    for move in moves:
        errors = 0.9 * errors - move
        sent = coarse(errors)
        errors -= sent
        reduced = coarse(sent.mean(0))
        u = 0.9 * u + 0.8 * reduced
        theta = theta - 0.9 * u - 0.8 * reduced
    moved(swarm, moves)
    different = (swarm.weights - theta).abs() > 1e-5
    assert different.float().mean() < 1e-3  # a value halfway between two steps may be rounded either way


def test_sparseloco_is_what_templar_does(corpus: Corpus) -> None:
    swarm, moves = SparseLoCo(PLAN, corpus, rate=1.0, decay=0.95, per_tile=64, bins=0), vectors(3, 3)
    moves[:, 2] *= 5  # louder than the median
    tensors = np.array([tile.tensor for tile in swarm.whole.tiles])
    theta, errors = swarm.weights.numpy().astype(np.float64), np.zeros((3, SIZE))
    for move in moves.numpy():
        sent = np.zeros((3, 8, 4096))
        for r in range(3):
            errors[r] = 0.95 * errors[r] - move[r]
            for tile, values in enumerate(errors[r].reshape(8, 4096)):
                places = np.argsort(-np.abs(values))[:64]
                sent[r, tile, places] = values[places]
            errors[r] -= sent[r].ravel()
        contributors = (sent != 0).sum(0)
        for name in set(tensors):
            norms = np.sqrt((sent[:, tensors == name] ** 2).sum((1, 2)))
            sent[:, tensors == name] *= np.minimum(1, np.median(norms) / norms)[:, None, None]
        theta -= (sent.sum(0) / np.maximum(contributors, 1)).ravel()
    moved(swarm, moves)
    same(swarm.weights, torch.from_numpy(theta).float())


def cosines() -> np.ndarray[Any, np.dtype[np.float64]]:
    """Row k of [64, 64] is the textbook's k-th basis function of the DCT."""
    n = np.arange(64)
    return np.cos(np.pi * (2 * n[None] + 1) * n[:, None] / 128) * np.where(n == 0, 1, 2**0.5)[:, None] / 8


def inverse(coefficients: Tensor) -> Tensor:
    """Of the two-dimensional DCT of each tile: float32 [SIZE]."""
    tiles = coefficients.view(8, 64, 64).double().numpy()
    return torch.from_numpy(cosines().T @ tiles @ cosines()).float().reshape(SIZE)


def forward(flat: Tensor) -> Tensor:
    """float32 [8, 4096]"""
    tiles = flat.view(8, 64, 64).double().numpy()
    return torch.from_numpy(cosines() @ tiles @ cosines().T).float().reshape(8, 4096)


def largest(rows: Tensor, k: int) -> Tensor:
    """Zeros but for the k largest of each row."""
    bound = rows.abs().sort(dim=1).values[:, -k, None]
    return torch.where(rows.abs() >= bound, rows, torch.zeros_like(rows))


def nearly_all_same(found: Tensor, expected: Tensor, step: float) -> None:
    """A sign may turn where a sum is zero but for rounding, so a few values may differ, by a few steps."""
    assert ((found - expected).abs() > 1e-6).float().mean() < 2e-3
    assert (found - expected).abs().max() <= 6 * step


def test_demo_is_its_published_loop(corpus: Corpus) -> None:
    plan = replace(PLAN, windows=1, steps=3)
    swarm, gradients = DeMo(plan, corpus, rate=1e-3, decay=0.999, per_tile=32), vectors(3, 3)
    theta, momenta = swarm.weights.clone(), torch.zeros(3, SIZE)
    for step, gradient in enumerate(gradients):
        lr = 1e-3 * (step + 1) / 20  # warming up
        momenta = 0.999 * momenta + lr * gradient
        sent = torch.stack([largest(forward(m), 32) for m in momenta])
        momenta -= torch.stack([inverse(s) for s in sent])
        theta -= lr * inverse(sent.sum(0) / (sent != 0).sum(0).clamp_min(1)).sign()
    driven(swarm, gradients)
    nearly_all_same(swarm.weights, theta, 1e-3 * 3 / 20)


def test_distro_is_psyches_loop(corpus: Corpus) -> None:
    plan = replace(PLAN, windows=1, steps=3)
    swarm, gradients = DisTrO(plan, corpus, rate=1e-3, decay=0.995, per_tile=4), vectors(3, 3)
    p, deltas, previous = swarm.weights.clone(), torch.zeros(3, SIZE), None
    lr = 0.0
    for step, gradient in enumerate(gradients):
        lr = 1e-3 * (step + 1) / 20
        if previous is not None:
            deltas -= torch.stack([inverse(s) for s in previous])
        deltas = 0.995 * deltas + lr * gradient
        previous = torch.stack([largest(forward(d), 4) for d in deltas])
        signs = previous.sign()
        p -= lr * inverse(signs.sum(0) / signs.abs().sum(0).clamp_min(1)).sign()
    driven(swarm, gradients)
    nearly_all_same(swarm.weights, p, 1e-3 * 3 / 20)
    for peer, delta in zip(swarm.peers, deltas, strict=True):
        nearly_all_same(swarm.read(peer), p - lr * delta.sign(), 1e-3 * 3 / 20)  # looking ahead


def test_noloco_gossips_in_pairs(corpus: Corpus) -> None:
    plan = replace(PLAN, tiers=(0,) * 5)
    swarm, moves = NoLoCo(plan, corpus, rate=0.7, momentum=0.5, pull=0.9), vectors(3, 5)
    phi, delta = torch.stack(swarm.anchors), torch.zeros(5, SIZE)
    for slot, move in enumerate(moves):
        order = np.random.default_rng((0, slot, 1)).permutation(5).tolist()
        new_phi, new_delta = phi.clone(), delta.clone()
        for group in (order[:2], order[2:4], order[4:]):
            for i in group:
                new_delta[i] = 0.5 * delta[i] + 0.7 * move[group].mean(0) - 0.9 * (phi[i] - phi[group].mean(0))
                new_phi[i] = phi[i] + new_delta[i]
        phi, delta = new_phi, new_delta
    moved(swarm, moves)
    same(torch.stack(swarm.anchors), phi)


def uncompressed(method: str) -> Callable[[Plan, Corpus], Swarm]:
    """A method with all that it does to differences between peers taken away."""

    def same_again(rows: Tensor) -> Tensor:
        return rows

    made: dict[str, Callable[[Plan, Corpus], Swarm]] = {
        "ddp": AllReduce,
        "averaging": METHODS["averaging"],
        "streaming": lambda p, c: StreamingDiLoCo(p, c, rate=1, momentum=0, delay=0, quantiser=same_again),
        "muloco": lambda p, c: MuLoCo(p, c, rate=1, momentum=0, quantiser=same_again),
        "sparseloco": lambda p, c: SparseLoCo(p, c, per_tile=4096, bins=0),
        "noloco": lambda p, c: NoLoCo(p, c, rate=1, momentum=0),
        "braniac": Braniac,
    }
    return made[method]


@pytest.mark.parametrize("method", ["ddp", "averaging", "streaming", "muloco", "sparseloco", "noloco", "braniac"])
def test_a_swarm_of_one_trains_as_if_alone(corpus: Corpus, method: str) -> None:
    swarm = uncompressed(method)(ONE, corpus)
    expected = plain(corpus, swarm)
    swarm.run()
    assert swarm.books.bytes_per_peer == 0 or method == "sparseloco"  # which has a store
    for name, p in swarm.peers[0].trainer.params.items():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-3, atol=1e-4)


def test_who_drops_out_sends_the_values_of_the_missed_turn_later(corpus: Corpus) -> None:
    class Flaky(Braniac):
        def present(self, slot: int) -> list[Peer]:
            return self.peers if slot >= self.slots_per_window else self.peers[1:]

        def offers(self, slot: int) -> dict[int, Offer]:
            found = super().offers(slot)
            values.append({number: len(offer.sent) for number, offer in found.items()})
            return found

    values: list[dict[int, int]] = []
    swarm = Flaky(replace(PLAN, up=CodecRules(64, 1, 4)), corpus)
    swarm.run()
    window = swarm.slots_per_window
    assert all(set(sent) == {1, 2} for sent in values[:window])
    assert all(sent[0] == 2 * sent[1] for sent in values[window : 2 * window])
    assert all(sent[0] == sent[1] for sent in values[2 * window :])


def test_braniacs_lone_peer_has_its_work_in_the_anchors(corpus: Corpus) -> None:
    everything = CodecRules(4096, limits.MAGNITUDE_BITS_MAX)
    swarm = Braniac(replace(ONE, up=everything, down=everything), corpus)
    start = swarm.loss()
    swarm.run()
    assert abs(swarm.loss() - swarm.own_loss(0)) < 0.1 * abs(swarm.own_loss(0) - start)


def test_a_signed_step_needs_no_other_peers(corpus: Corpus) -> None:
    swarm = DeMo(replace(ONE, windows=1, steps=1), corpus, per_tile=4096)
    start, gradients = swarm.weights, vectors(1, 1)
    driven(swarm, gradients)
    nearly_all_same(swarm.weights, start - 1e-3 / 20 * gradients[0, 0].sign(), 1e-3 / 20)


RING = 2 * 2  # passes of a third of the data in a ring of three


def bytes_of(method: str) -> float:
    """What a run of PLAN should cost one of three peers, by hand."""
    steps, windows, tensors = 12, 3, 8
    return {
        "ddp": steps * RING * -(-4 * SIZE // 3),
        "averaging": windows * RING * -(-4 * SIZE // 3),
        "diloco": windows * RING * -(-4 * SIZE // 3),
        "streaming_diloco": windows * 2 * RING * -(-4 * (2048 + 4) // 3),  # 4 tiles a time, half a byte and a scale
        "muloco": windows * RING * -(-8 * (1024 + 20) // 3),
        "sparseloco": windows * (8 * 64 * 14 // 8 + tensors * 16),
        "demo": steps * 8 * 32 * 28 // 8,
        "distro": steps * 8 * 4 * 13 // 8,
        "noloco": windows * 8 * SIZE * 2 / 3,  # one of three has no partner
    }[method]


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"braniac"}))
def test_bytes_are_those_of_the_formula(corpus: Corpus, method: str) -> None:
    swarm = METHODS[method](PLAN, corpus)
    swarm.run()
    assert swarm.books.bytes_per_peer == bytes_of(method)
    assert swarm.loss() > 0


@pytest.mark.parametrize("peers", [3, 8])
def test_braniacs_bytes_are_its_payloads_and_its_updates(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, peers: int
) -> None:
    """Payloads go to all seats, and updates to all that have no seat."""
    plan = replace(PLAN, tiers=(0,) * peers)
    swarm = Braniac(plan, corpus)
    payloads: list[int] = []
    updates: list[int] = []
    deliver, settle = swarm.deliver, swarm.settle

    def noting(slot: int, offers: Any) -> Any:
        found = deliver(slot, offers)
        payloads.extend(len(contribution.payload) for contribution in found)
        return found

    def noting_update(slot: int, merged: Merged, offers: Any) -> None:
        updates.append(len(merged.update))
        settle(slot, merged, offers)

    monkeypatch.setattr(swarm, "deliver", noting)
    monkeypatch.setattr(swarm, "settle", noting_update)
    swarm.run()
    assert len(payloads) == peers * PLAN.windows * PLAN.fragments
    # Three seats get every payload but their own.
    sent = swarm.books.uplink.sum() - (peers - 3) * sum(updates)
    assert sent == pytest.approx((3 - 3 / peers) * sum(payloads), rel=0.01)
    assert swarm.books.uplink.sum() == swarm.books.downlink.sum()


def test_no_peer_of_braniac_sends_an_update_more_than_twice(corpus: Corpus) -> None:
    swarm = Braniac(replace(PLAN, tiers=(0,) * 12), corpus)
    for slot in range(8):
        seats = committee.committee(swarm.manifest.run_id, slot, [peer.id for peer in swarm.peers])
        parents = {child: parent for parent, child in swarm.ways(slot, seats)}
        assert parents.keys() | set(seats) == {peer.id for peer in swarm.peers}
        assert not parents.keys() & set(seats)
        assert max(Counter(parents.values()).values()) <= 2
        for child in parents:
            above = [child]
            while above[-1] in parents:
                above.append(parents[above[-1]])
            assert len(set(above)) == len(above)
            assert above[-1] in seats
    assert swarm.books.largest_message < 4 * 4096  # a fragment of four tiles, well below a byte per value


@pytest.mark.parametrize("method", [*METHODS, *FAILING])
def test_with_everybody_missing_nothing_is_agreed(corpus: Corpus, method: str) -> None:
    swarm = {**METHODS, **FAILING}[method](replace(PLAN, missing_percent=100), corpus)
    before = swarm.loss()
    swarm.run()
    assert swarm.books.bytes_per_peer == 0
    assert swarm.loss() == before


def test_torchft_goes_back_when_one_is_missing_and_the_mean_does_not(corpus: Corpus) -> None:
    plan = replace(PLAN, missing_percent=40, windows=4)
    tolerant, failing = DiLoCo(plan, corpus, rate=1, momentum=0), DiLoCo(plan, corpus, all_or_nothing=True)
    counts = [len(tolerant.present(slot)) for slot in range(4)]
    assert 0 < min(counts) < 3, "the seed gives no case"
    moves, start = vectors(4, 3), tolerant.weights
    moved(tolerant, moves)
    present = [[peer.number for peer in tolerant.present(slot)] for slot in range(4)]
    same(tolerant.weights, start + sum(moves[slot, who].mean(0) for slot, who in enumerate(present)))
    moved(failing, moves)
    assert torch.equal(failing.weights, start) == (3 not in counts)


@pytest.mark.parametrize("method", list(METHODS))
def test_the_same_plan_gives_the_same_figures(corpus: Corpus, method: str) -> None:
    plan = replace(PLAN, windows=1, missing_percent=30)
    first, second = (METHODS[method](plan, corpus) for _ in range(2))
    first.run()
    second.run()
    assert first.loss() == second.loss()
    assert np.array_equal(first.books.uplink, second.books.uplink)


def test_methods_that_know_no_tiers_say_so(corpus: Corpus) -> None:
    for plan in (Plan(tiers=(0, 0)), replace(PLAN, config=replace(CONFIG, intermediate_size=96))):
        with pytest.raises(ConfigError, match="this method"):
            DiLoCo(plan, corpus)


def test_an_unknown_method_is_refused_with_a_guess() -> None:
    assert chosen("ddp, braniac", list(METHODS)) == ["ddp", "braniac"]
    with pytest.raises(ValueError, match="did you mean diloco"):
        chosen("ddp,dilocco", list(METHODS))


def test_bins_are_those_of_the_published_quantiser() -> None:
    values = [0.0, 0.1, -0.1, 3.0, -3.0, 0.5, -0.5, 10.0]
    shift = float(np.mean(values))
    scale = 6 * np.std(values, ddof=1) / 4
    codes = [int(np.clip(round((v - shift) / scale + 2), 0, 3)) for v in values]
    bins = {code: np.mean([v for v, c in zip(values, codes, strict=True) if c == code]) for code in codes}
    same(quantise(torch.tensor([values])), torch.tensor([[bins[code] for code in codes]], dtype=torch.float32))
    assert torch.equal(quantise(torch.zeros(2, 5)), torch.zeros(2, 5))


def test_four_bit_floats_are_the_nearest_powers_of_two() -> None:
    legal = 8.0 * np.array([0, *(2.0**-e for e in range(7))])
    values = np.linspace(-8, 8, 401)
    values = values[[min(abs(abs(v) - (a + b) / 2) for a, b in pairwise(sorted(legal))) > 1e-6 for v in values]]
    nearest = [np.sign(v) * legal[np.abs(legal - abs(v)).argmin()] for v in values]
    same(float4(torch.tensor(values, dtype=torch.float32)[None])[0], torch.tensor(nearest, dtype=torch.float32))
    assert torch.equal(float4(torch.zeros(1, 4)), torch.zeros(1, 4))


def test_the_dct_is_orthonormal_and_compacts() -> None:
    flat = vectors(1, 1)[0, 0]
    same(transform(flat, dct_matrix()), forward(flat))
    same(transform(transform(flat, dct_matrix()), dct_matrix().T).flatten(), flat)
    constant = top_k(transform(torch.ones(4096), dct_matrix()), 1)
    assert constant.places.item() == 0
    assert constant.values.item() == pytest.approx(64)


def test_a_paced_uplink_sends_contributions_first_and_updates_when_they_are_there() -> None:
    books = Books(steps=6, peers=4)
    uplinks = Uplinks(books, [100.0, 100.0, 50.5, 100.0])
    # 0 and 1 have seats; 2 passes the update on to 3.
    uplinks.begin(0, [(2, 0, 101), (3, 0, 20), (3, 1, 20)], 80, (0, 1), [(0, 2), (2, 3)])
    uplinks.begin(1, [(2, 0, 10)], 30, (0, 1), [(0, 3)])
    uplinks.drain()
    assert books.uplink[:, 3].tolist() == [40, 0, 0, 0, 0, 0]
    # The whole first contribution is there after two seconds, and its update leaves in the third, with the second one.
    assert books.uplink[:, 2].tolist() == [50, 51, 10, 51, 29, 0]
    assert books.uplink[:, 0].tolist() == [0, 0, 80, 30, 0, 0]
    assert books.downlink[:, 3].sum() == 80 + 30
    assert (books.largest_message, books.bytes_per_peer) == (101, (101 + 40 + 80 + 80 + 10 + 30) / 4)


def test_what_is_under_way_at_the_end_is_still_sent() -> None:
    books = Books(steps=2, peers=2)
    uplinks = Uplinks(books, [10.0, 10.0])
    uplinks.begin(1, [(1, 0, 35)], 0, (0,), [])
    uplinks.drain()
    assert books.uplink[:, 1].tolist() == [0, 10, 10, 10, 5]
    assert books.downlink[:, 0].tolist() == [0, 10, 10, 10, 5]


def test_books_know_bursts() -> None:
    books = Books(steps=4, peers=2)
    books.send(3, 0, 1, 100)
    for step in range(4):
        books.send(step, 1, 0, 10)
    assert (books.peak_to_mean(), books.peak_to_mean(2), books.largest_message) == (4, 2, 100)
    assert books.bytes_per_peer == 70
    assert Books(4, 2).peak_to_mean() == 0
