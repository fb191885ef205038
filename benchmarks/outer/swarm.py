"""The loop that all methods share: peers train in step, and between steps a method exchanges something.

Trainers, model, text and evaluation are the production ones. The same plan gives the same figures on the same machine.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from braniac.model.config import ModelConfig
from braniac.model.data import Batches
from braniac.model.errors import ConfigError
from braniac.model.evaluate import held_out_loss
from braniac.model.fragments import fragment_table, gather, scatter_
from braniac.model.gpt import GPT
from braniac.model.optim import Optimizer
from braniac.model.sources import Corpus
from braniac.model.trainer import Trainer, TrainSettings
from braniac.node.founding import TURNS
from braniac.protocol.codec import CodecRules
from braniac.protocol.identity import Identity, PeerId
from braniac.protocol.manifest import MergeRules
from outer.books import Books

MICRO = ModelConfig(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=256, context=32, matformer_factor=4
)
"""82k parameters in 20 tiles of 64x64: what a benchmark of many runs can afford."""

TILE = 64 * 64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One swarm and how long it trains: the same for every method."""

    config: ModelConfig = MICRO
    tiers: tuple[int, ...] = (0,) * 8
    """One peer per entry."""
    windows: int = 12
    """How often a method that communicates every `steps` steps does so."""
    steps: int = 5
    """Inner steps per window (H)."""
    batch: int = 4
    """Windows of text per step."""
    fragments: int = 5
    """Parts of the model that are exchanged one after another, by methods that do so."""
    rate: float = 1.0
    """Factor on the inner learning rates."""
    outer_rate: float = 1.0
    """Factor on the method's own outer step size."""
    cooldown: bool = False
    """Whether the learning rates fall to zero at the end."""
    missing_percent: int = 0
    """Chance that a peer drops out of an exchange; each exchange and each peer has its own lot."""
    up: CodecRules = field(default_factory=lambda: CodecRules(256, 1, TURNS))
    """Braniac: of contributions."""
    down: CodecRules = field(default_factory=lambda: CodecRules(1024, 2))
    """Braniac: of updates."""
    merge: MergeRules = field(default_factory=MergeRules)
    """Braniac; `outer_rate` comes on top of its step."""
    evaluated: int = 512
    """Held-out windows of text that the loss is taken over."""
    seed: int = 0

    @property
    def total_steps(self) -> int:
        return self.windows * self.steps

    @property
    def tokens_per_peer(self) -> int:
        return self.total_steps * self.batch * self.config.context


@dataclass
class Peer:
    """One honest peer."""

    number: int
    tier: int
    id: PeerId
    trainer: Trainer


def identity(number: int) -> Identity:
    """Of a peer, by its number below 256."""
    return Identity.from_seed(bytes([number]) * 32)


class Swarm(abc.ABC):
    """Peers and what they have in common. A method says how often and what they exchange, and what they agree on."""

    def __init__(self, plan: Plan, corpus: Corpus) -> None:
        self.plan = plan
        self.corpus = corpus
        settings = TrainSettings(
            learning_rate=TrainSettings().learning_rate * plan.rate,
            adam_learning_rate=TrainSettings().adam_learning_rate * plan.rate,
            total_steps=plan.total_steps if plan.cooldown else 0,
            seed=plan.seed,
            batch=plan.batch,
        )
        identities = [identity(number) for number in range(len(plan.tiers))]
        self.peers = [
            Peer(number, tier, i.peer_id, Trainer(plan.config, tier, self._batches(i.peer_id), settings))
            for number, (tier, i) in enumerate(zip(plan.tiers, identities, strict=True))
        ]
        self.books = Books(plan.total_steps, len(self.peers))

    def _batches(self, peer: PeerId) -> Batches:
        return Batches(self.corpus, self.plan.seed, peer, self.plan.config.context, self.plan.batch)

    @property
    @abc.abstractmethod
    def slots_per_window(self) -> int:
        """Exchanges in a window."""

    @abc.abstractmethod
    def exchange(self, slot: int) -> None:
        """What peers send and what comes of it, after the inner steps of a slot."""

    @abc.abstractmethod
    def loss(self) -> float:
        """Held-out loss of what the peers agree on, in nats per byte."""

    @property
    def slots(self) -> int:
        return self.plan.windows * self.slots_per_window

    def run(self, watch: Callable[[int], None] = lambda slot: None) -> None:
        """Play all slots; `watch` is called with the number of each after it."""
        for slot in range(self.slots):
            self.train(slot)
            self.exchange(slot)
            watch(slot)

    def train(self, slot: int) -> None:
        """The inner steps that fall into a slot, by everybody."""
        for peer in self.peers:
            self.train_peer(peer, slot)

    def train_peer(self, peer: Peer, slot: int) -> None:
        for _ in range(self.steps_until(slot + 1) - self.steps_until(slot)):
            peer.trainer.step()

    def steps_until(self, slot: int) -> int:
        """Inner steps before a slot begins."""
        return slot * self.plan.steps // self.slots_per_window

    def now(self, slot: int) -> int:
        """The step that what is sent in a slot is booked on."""
        return max(0, self.steps_until(slot + 1) - 1)

    def present(self, slot: int) -> list[Peer]:
        """Who does not drop out of this slot's exchange."""
        chances = np.random.default_rng((self.plan.seed, slot)).random(len(self.peers))
        return [peer for peer in self.peers if 100 * chances[peer.number] >= self.plan.missing_percent]

    def held_out(self) -> tuple[Tensor, Tensor]:
        """Evaluation windows, the same for all."""
        return Batches(self.corpus, self.plan.seed, b"evaluation", self.plan.config.context, 1).held_out(
            self.plan.evaluated
        )


class FlatSwarm(Swarm):
    """Peers of one size, for methods that see a model as one vector of 64x64 tiles."""

    def __init__(self, plan: Plan, corpus: Corpus) -> None:
        super().__init__(plan, corpus)
        if plan.config.tiers > 1 or any(plan.tiers):
            raise ConfigError("this method knows no tiers: give model.matformer_factor 1 and peers of tier 0.")
        self.whole = fragment_table(plan.config, 1)[0]
        if any(size != TILE for size, _ in self.whole.groups):
            raise ConfigError("this method needs a model of whole 64x64 tiles: make its sizes multiples of 64.")
        self.weights = self.read(self.peers[0])
        """What all agree on, float32 [size]; before the first exchange the initial weights."""

    @property
    def size(self) -> int:
        """Parameters."""
        return self.whole.size

    def read(self, peer: Peer) -> Tensor:
        """A copy of a peer's weights, float32 [size]."""
        return peer.trainer.read(self.whole)

    def load(self, peer: Peer, weights: Tensor) -> None:
        peer.trainer.load_fragment(self.whole, weights)

    def loss(self) -> float:
        return self.loss_of(self.weights)

    def loss_of(self, weights: Tensor) -> float:
        """Held-out loss of some weights, float32 [size], in nats per byte."""
        model = GPT(self.plan.config, 0)
        scatter_(dict(model.named_parameters()), self.whole, weights)
        return held_out_loss(model, self.held_out())


class GradientSwarm(FlatSwarm):
    """For methods that exchange something after every step: trainers stop short of the update."""

    def __init__(self, plan: Plan, corpus: Corpus) -> None:
        super().__init__(plan, corpus)
        for peer in self.peers:
            peer.trainer.optimizer = Deferred.of(peer.trainer)

    @property
    def slots_per_window(self) -> int:
        return self.plan.steps

    def gradient(self, peer: Peer) -> Tensor:
        """Of the last step, float32 [size]."""
        return gather(_gradients(peer.trainer), self.whole)

    def set_gradient(self, peer: Peer, gradient: Tensor) -> None:
        scatter_(_gradients(peer.trainer), self.whole, gradient)


class Deferred(Optimizer):
    """The inner optimizer, which updates only when it is told to."""

    @classmethod
    def of(cls, trainer: Trainer) -> Deferred:
        """A new one for a trainer that has not trained yet."""
        settings = trainer.settings
        return cls(
            trainer.params,
            trainer.config,
            learning_rate=settings.learning_rate,
            adam_learning_rate=settings.adam_learning_rate,
            weight_decay=settings.weight_decay,
        )

    def step(self, lr_scale: float, widths: tuple[int, ...]) -> None:
        self._due = lr_scale, widths

    def update(self) -> None:
        """The step that is due, from the gradients as they are now."""
        super().step(*self._due)


def _gradients(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in trainer.params.items() if parameter.grad is not None}


def mean(vectors: list[Tensor]) -> Tensor:
    """Elementwise."""
    return torch.stack(vectors).mean(0)
