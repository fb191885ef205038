"""A swarm in one process and in virtual time: real engines, toy weights, a network that misbehaves on command.

Each `Peer` answers the engine's events the way the daemon does, with int64 vectors in place of tensors and a dict in
place of the disk. `Swarm` owns the clock and a heap of things to come; all randomness comes from one seed, so a run
repeats exactly. Latencies are tens of milliseconds and a slot is a second, as on a real network at its fastest.

Every peer keeps books beside the ledger (`Books`): what its local steps added and what certificates took, so that I1
can be checked in integers after every event.
"""

from __future__ import annotations

import copy
import hashlib
import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from braniac.protocol import codec, events, ledger
from braniac.protocol.bitpack import Int32Array, Int64Array
from braniac.protocol.codec import CodecRules
from braniac.protocol.engine import Engine
from braniac.protocol.errors import WireError
from braniac.protocol.history import History
from braniac.protocol.identity import Identity, PeerId
from braniac.protocol.manifest import FragmentSpec, Manifest, MergeRules
from braniac.protocol.merge import Contribution, Merged, merge
from braniac.protocol.messages import FragmentState
from braniac.protocol.spans import Spans
from braniac.protocol.tiles import Sparse, TileLayout

EPOCH_S = 1_700_000_000.123
SLOT_S = 1.0


def identity(number: int) -> Identity:
    """The same peer for the same number, in every test."""
    return Identity.from_seed(hashlib.sha256(b"test peer %d" % number).digest())


def make_manifest(
    *, rings: Iterable[int] = (0, 0, 0), layout: TileLayout | None = None, slot_s: float = SLOT_S, **changes: Any
) -> Manifest:
    """A small run founded by peer 0: one fragment per entry of `rings`, each of 3 tiles unless told otherwise."""
    table = tuple(rings)
    spec = layout or TileLayout(((64, 2), (16, 1)))
    values: dict[str, Any] = {
        "name": "test",
        "founder": identity(0).peer_id,
        "epoch_ms": round(EPOCH_S * 1000),
        "slot_ms": round(slot_s * 1000),
        "seed": 7,
        "tiers": max(table) + 1,
        "model": {"width": 8},
        "data": {"tokenizer": "bytes"},
        "layout_digest": hashlib.sha256(b"layout").digest(),
        "fragments": tuple(FragmentSpec(ring, spec) for ring in table),
        "up": CodecRules(per_tile=1024, magnitude_bits=2),
        "down": CodecRules(per_tile=2048, magnitude_bits=2),
        "merge": MergeRules(),
    }
    return Manifest(**values | changes)


def anchor_digest(anchor: Int32Array) -> bytes:
    return hashlib.sha256(anchor.astype("<i4").tobytes()).digest()


@dataclass
class Books:
    """One fragment's independent account: x - anchor must equal `steps` less what the applied certificates took."""

    steps: Int64Array
    gone: Int64Array
    """Sum of what they took."""
    taken: dict[int, tuple[bytes, Int64Array]] = field(default_factory=dict)
    """slot -> (verdict digest, what its certificate took from this peer), to be given back if it is undone."""

    def owed(self) -> Int64Array:
        return self.steps - self.gone

    def take(self, slot: int, digest: bytes, vector: Int64Array) -> None:
        assert slot not in self.taken, "two certificates of one slot applied at once"
        self.taken[slot] = (digest, vector)
        self.gone += vector

    def give_back(self, slot: int, digest: bytes) -> None:
        taken, vector = self.taken.pop(slot)
        assert taken == digest, "undid a certificate that was not applied"
        self.gone -= vector

    def copy(self) -> Books:
        return Books(self.steps.copy(), self.gone.copy(), dict(self.taken))


@dataclass
class Disk:
    """What survives a kill: one consistent moment."""

    weights: dict[int, Int64Array]
    anchors: dict[int, Int32Array]
    states: dict[int, FragmentState]
    books: dict[int, Books]
    protocol: dict[str, Any]
    blobs: dict[bytes, bytes]


class Peer:
    """One node: an engine, and a daemon's answers to its events."""

    def __init__(self, swarm: Swarm, number: int, tier: int) -> None:
        self.swarm = swarm
        self.number = number
        self.tier = tier
        self.identity = identity(number)
        self.id = self.identity.peer_id
        self.held = swarm.manifest.held(tier)
        self.incarnation = 0
        self.alive = self.awake = False
        self.trains = True
        self.signed = Spans()
        """What the disk says of earlier lives when it starts."""
        self.resting = self.catching_up = False
        """The latter: back from a rest, and not yet where the others are."""
        self.weights: dict[int, Int64Array] = {}
        self.anchors: dict[int, Int32Array] = {}
        self.states: dict[int, FragmentState] = {}
        self.books: dict[int, Books] = {}
        self.blobs: dict[bytes, bytes] = {}
        self.served: Counter[bytes] = Counter()
        """How often it has sent each blob."""
        self.fetching: set[bytes] = set()
        self.disk: Disk | None = None
        self.settled: dict[int, events.SlotSettled] = {}
        self.log: list[events.Event] = []
        self.undone = 0
        self.offered: dict[int, bytes] = {}
        """Every payload this identity ever announced, to check that none is forgotten or counted twice."""
        self.engine: Engine

    # --- life --------------------------------------------------------------------------------------------------------

    def found(self) -> None:
        """Start as the founder: initial weights, no history."""
        history = History(self.swarm.manifest)
        history.begin(self.held)
        for f in self.held:
            self._set_fragment(f, self.swarm.initial(f), -1)
        self._start(history)
        self.engine.set_ready()
        self.snapshot()
        self.pump()

    def join(self) -> None:
        """Start with nothing."""
        self._start(History(self.swarm.manifest))
        self.pump()

    def kill(self) -> None:
        """Stop without a word; everything since the last snapshot is lost."""
        self.alive = self.awake = False
        self.incarnation += 1

    def restart(self) -> None:
        """Start from the last snapshot, or join anew if there is none."""
        self.weights, self.anchors, self.states, self.books, self.blobs = {}, {}, {}, {}, {}
        self.fetching, self.resting, self.catching_up = set(), False, False
        if self.disk is None:
            return self.join()
        disk = copy.deepcopy(self.disk)  # it may be needed again
        self.weights, self.anchors, self.states = disk.weights, disk.anchors, disk.states
        self.books, self.blobs = disk.books, disk.blobs
        self._start(History.from_json(self.swarm.manifest, disk.protocol))
        self._ready_when_complete()
        self.pump()

    def pause(self) -> None:
        """Sleep like a phone: no time, no messages, but nothing is forgotten."""
        self.awake = False

    def resume(self) -> None:
        self.awake = True
        self.engine.handle_timer(self.swarm.now)
        self.pump()

    def rest(self) -> None:
        """As the daemon does: no new seats, the slots in hand end, goodbye, silence. Nothing is forgotten."""
        self.resting, self.catching_up = True, False
        self.engine.retire()
        patience_s = self.swarm.now + 3 * self.swarm.manifest.slot_s

        def wind_down() -> None:
            if not self.resting:
                return  # woken again
            if self.engine.busy and self.swarm.now < patience_s:
                return self.swarm.later(self, self.swarm.manifest.slot_s / 16, wind_down)
            self.snapshot()
            self.engine.goodbye()
            self.pump()
            self.awake = False

        self.swarm.later(self, 0.0, wind_down)
        self.pump()

    def wake(self) -> None:
        """As the daemon does: listen first, take part when caught up."""
        self.awake = self.catching_up = True
        self.resting = False
        self.fetching = set()
        self.engine.rejoin(self.swarm.now)
        for other in self.swarm.peers:
            if other is not self and other.alive:
                self.engine.introduce(other.id)
        self.pump()

    def _start(self, history: History) -> None:
        self.alive = self.awake = True
        self.engine = Engine(
            self.swarm.manifest,
            self.identity,
            self.tier,
            incarnation=self.incarnation,
            now=self.swarm.now,
            history=history,
            signed=self.signed,
        )
        self.engine.may_sign(Spans(((0, 1 << 40),)))
        for f in history.last:
            self.engine.anchor_known(self.states[f])
        for other in self.swarm.peers:
            if other is not self and other.alive:
                self.engine.introduce(other.id)

    def _ready_when_complete(self) -> None:
        if (
            not self.resting
            and not self.catching_up
            and not self.engine.ready
            and len(self.engine.anchors()) == len(self.held)
        ):
            self.engine.set_ready()

    def _set_fragment(self, f: int, anchor: Int32Array, slot: int) -> None:
        self.anchors[f] = anchor
        self.weights[f] = anchor.astype(np.int64)
        self.books[f] = Books(np.zeros(len(anchor), np.int64), np.zeros(len(anchor), np.int64))
        self._note_state(f, slot)

    def _note_state(self, f: int, slot: int) -> FragmentState:
        data = self.anchors[f].astype("<i4").tobytes()
        state = FragmentState(f, slot, hashlib.sha256(data).digest())
        self.blobs[state.digest] = data
        self.states[f] = state
        return state

    def snapshot(self, offered: tuple[int, bytes] | None = None) -> None:
        """Commit a generation: weights, anchors and the protocol's state of this moment."""
        self.disk = Disk(
            {f: weights.copy() for f, weights in self.weights.items()},
            dict(self.anchors),
            dict(self.states),
            {f: books.copy() for f, books in self.books.items()},
            self.engine.state(offered),
            dict(self.blobs),
        )

    # --- the daemon's part -------------------------------------------------------------------------------------------

    def train(self) -> None:
        """One local step on every fragment that is here."""
        rng = np.random.default_rng([self.number, self.engine.slot + (1 << 20)])
        for f in self.weights:
            step = rng.integers(-(1 << 14), 1 << 14, len(self.weights[f]))
            self.weights[f] += step
            self.books[f].steps += step

    def receive(self, data: bytes) -> None:
        """Give the engine a message, however bad."""
        try:
            self.engine.receive(data, self.swarm.now)
        except WireError as error:
            self.swarm.refusals.append((self.number, error))
        self.pump()

    def pump(self) -> None:
        """Handle events and send messages until nothing is left."""
        while True:
            while (event := self.engine.next_event()) is not None:
                self.log.append(event)
                self._handle(event)
                self.check_books()
            messages = self.engine.messages_to_send()
            for peer, data in messages:
                self.swarm.send(self, peer, data)
            if self.catching_up and self.engine.caught_up:
                self.catching_up = False
                self.engine.set_ready()
                continue
            if not messages:
                return

    def _handle(self, event: events.Event) -> None:
        match event:
            case events.SlotBegan():
                if self.trains and not self.resting and not self.catching_up:
                    self.train()
            case events.FragmentDue(slot, fragment):
                self._offer(slot, fragment)
            case events.BlobWanted():
                self._fetch(event)
            case events.MergeDue():
                self.swarm.later(self, 0.02, lambda: self._merge(event))
            case events.CheckDue():
                self.swarm.later(self, 0.02, lambda: self._check(event))
            case events.UpdateDue():
                self._apply(event)
            case events.FragmentLost():
                self.swarm.later(self, self.swarm.download_s, lambda: self._restore(event))
            case events.PeerMentioned(peer):
                self.engine.introduce(peer)
            case events.SlotSettled(slot):
                assert slot not in self.settled or self.incarnation, "a slot was settled twice"
                self.settled[slot] = event

    def _offer(self, slot: int, fragment: int) -> None:
        z = ledger.residual(self.weights[fragment], self.anchors[fragment])
        manifest = self.swarm.manifest
        payload, sent = codec.encode_topk(manifest.fragments[fragment].layout, manifest.up, z)
        assert len(payload) <= manifest.contribution_bytes_max(fragment)
        digest = self._put(payload)
        self.snapshot((slot, digest))
        assert slot not in self.offered, "offered twice for one slot"
        self.offered[slot] = digest
        self.swarm.sent[digest] = sent
        self.engine.offer(slot, digest, len(payload), weight=self.swarm.tokens(self.number))

    def _put(self, data: bytes) -> bytes:
        digest = hashlib.sha256(data).digest()
        self.blobs[digest] = data
        if self.disk is not None:
            self.disk.blobs[digest] = data  # a blob is a file of its own, durable before anything names it
        return digest

    def _fetch(self, wanted: events.BlobWanted) -> None:
        if wanted.digest in self.blobs:
            return self.engine.blob_fetched(wanted.digest, True, self.swarm.now)
        if wanted.digest in self.fetching:
            return
        self.fetching.add(wanted.digest)

        def arrive() -> None:
            self.fetching.discard(wanted.digest)
            data = self._pull(wanted.digest, wanted.holders, patient=wanted.patient)
            ok = data is not None and len(data) == wanted.size
            if ok and data is not None:
                self._put(data)
            self.engine.blob_fetched(wanted.digest, ok, self.swarm.now)

        self.swarm.later(self, self.swarm.rng.uniform(*self.swarm.latency_s), arrive)

    def _pull(self, digest: bytes, holders: Iterable[PeerId], *, patient: bool = False) -> bytes | None:
        """The blob from the first holder that can be reached both ways and has it; see BlobWanted for `patient`."""
        for holder in map(self.swarm.by_id.get, holders):
            if holder is None or not holder.awake or not self.swarm.linked(holder, self):
                continue
            data = holder.blobs.get(digest)
            if data is not None and hashlib.sha256(data).digest() == digest:
                holder.served[digest] += 1
                return data
            if data is None and patient:
                return None
        return None

    def _merge(self, due: events.MergeDue) -> None:
        self.engine.merged(due.slot, self._merge_now(due))

    def _check(self, due: events.CheckDue) -> None:
        self.engine.checked(due.slot, self._merge_now(due))

    def _merge_now(self, due: events.MergeDue | events.CheckDue) -> Merged | None:
        contributions = [Contribution(peer, tokens, self.blobs[digest]) for peer, tokens, digest in due.contributions]
        merged = merge(self.swarm.manifest, due.fragment, contributions)
        if merged is not None:
            self._put(merged.update)
        return merged

    def _apply(self, due: events.UpdateDue) -> None:
        verdict = due.certificate.verdict
        f, manifest = verdict.fragment, self.swarm.manifest
        layout = manifest.fragments[f].layout
        update = codec.decode(layout, manifest.down, self.blobs[verdict.update_digest])
        own = due.acknowledged
        sent = codec.decode(layout, manifest.up, self.blobs[own]) if own else None
        settlement = ledger.settle(update, sent, undo=due.undo)
        self.anchors[f] = ledger.move_anchor(self.anchors[f], settlement)
        self.weights[f][settlement.positions] += settlement.weights
        self._keep_books(due, update)
        state = self._note_state(f, max(self.states[f].slot, verdict.slot))
        self.engine.anchor_moved(due, state)

    def _keep_books(self, due: events.UpdateDue, update: Sparse) -> None:
        """From the definitions, not through `ledger`: what this certificate took from this peer."""
        verdict = due.certificate.verdict
        books = self.books[verdict.fragment]
        if due.undo:
            self.undone += 1
            return books.give_back(verdict.slot, verdict.digest)
        taken = np.zeros(len(books.steps), np.int64)
        if due.acknowledged is not None:
            mine = self.swarm.sent[due.acknowledged].dense(len(taken))
            taken[update.positions] = mine[update.positions]
        books.take(verdict.slot, verdict.digest, taken)

    def _restore(self, lost: events.FragmentLost) -> None:
        data = self._pull(lost.state.digest, lost.holders)
        if data is None:
            return  # the engine asks again after a window
        self._set_fragment(lost.state.fragment, np.frombuffer(data, "<i4").astype(np.int32), lost.state.slot)
        self.engine.fragment_restored(lost.state)
        self._ready_when_complete()

    def check_books(self) -> None:
        """I1: x - anchor is my steps less what certificates took, to the bit."""
        for f, books in self.books.items():
            assert np.array_equal(ledger.residual(self.weights[f], self.anchors[f]), books.owed())

    def applied(self, f: int) -> dict[int, bytes]:
        """slot -> digest of the verdicts in this peer's anchor since it was last downloaded."""
        return {slot: digest for slot, (digest, _) in self.books[f].taken.items()}


class Swarm:
    """Peers, a virtual clock, and the network between them."""

    def __init__(self, tiers: Iterable[int] = (0,), *, seed: int = 0, **manifest: Any) -> None:
        """One peer per entry of `tiers`; they are added, not yet started."""
        self.manifest = make_manifest(**manifest)
        self.rng = random.Random(seed)
        self.now = self.manifest.slot_start(0) + 0.25
        self.latency_s = (0.01, 0.04)
        self.download_s = 0.1
        self.loss = self.duplication = 0.0
        self.cuts: set[tuple[int, int]] = set()
        """(from, to): messages that are swallowed, one way."""
        self.refusals: list[tuple[int, WireError]] = []
        self.sent: dict[bytes, Sparse] = {}
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.peers: list[Peer] = []
        self.by_id: dict[PeerId, Peer] = {}
        for tier in tiers:
            self.add(tier)

    @classmethod
    def running(cls, tiers: Iterable[int] = (0,), *, slots: int = 0, **options: Any) -> Self:
        """A swarm whose peers have all joined and sit in committees, then run for `slots` more."""
        swarm = cls(tiers, **options)
        swarm.peers[0].found()
        for peer in swarm.peers[1:]:
            peer.join()
        swarm.run(6 + slots)
        assert all(peer.engine.ready for peer in swarm.peers)
        return swarm

    def add(self, tier: int = 0) -> Peer:
        peer = Peer(self, len(self.peers), tier)
        self.peers.append(peer)
        self.by_id[peer.id] = peer
        return peer

    def initial(self, f: int) -> Int32Array:
        rng = np.random.default_rng([self.manifest.seed, f])
        return rng.integers(-(1 << 20), 1 << 20, self.manifest.fragments[f].layout.size).astype(np.int32)

    def tokens(self, number: int) -> int:
        return 1000 + 100 * number

    @property
    def slot(self) -> int:
        return self.manifest.slot_at(self.now)

    @property
    def live(self) -> list[Peer]:
        return [peer for peer in self.peers if peer.awake]

    # --- network -----------------------------------------------------------------------------------------------------

    def linked(self, source: Peer, target: Peer) -> bool:
        return (source.number, target.number) not in self.cuts

    def cut(self, group: Iterable[int], rest: Iterable[int]) -> None:
        """Split the network between two groups, both ways."""
        for a, b in itertools.product(group, rest):
            self.cuts |= {(a, b), (b, a)}

    def send(self, source: Peer, peer: PeerId, data: bytes) -> None:
        target = self.by_id.get(peer)
        if target is None or not self.linked(source, target):
            return
        for _ in range(2 if self.rng.random() < self.duplication else 1):
            if self.rng.random() >= self.loss:
                self.later(target, self.rng.uniform(*self.latency_s), lambda: target.receive(data))

    def later(self, peer: Peer, delay_s: float, action: Callable[[], None]) -> None:
        """Do something at `peer` after a while, unless it was killed or sleeps by then."""
        life = peer.incarnation

        def act() -> None:
            if peer.awake and peer.incarnation == life:
                action()
                peer.pump()

        heapq.heappush(self._heap, (self.now + delay_s, next(self._order), act))

    # --- time --------------------------------------------------------------------------------------------------------

    def run(self, slots: float) -> None:
        """Let so many slots pass."""
        self.run_until(self.now + slots * self.manifest.slot_s)

    def run_until(self, end_s: float) -> None:
        while True:
            timers = [(peer.engine.get_timer(), peer.number) for peer in self.live]
            timer_s, number = min(timers, default=(float("inf"), -1))
            event_s = self._heap[0][0] if self._heap else float("inf")
            if min(timer_s, event_s) > end_s:
                break
            if event_s <= timer_s:
                self.now = max(self.now, event_s)
                heapq.heappop(self._heap)[2]()
                continue
            self.now = max(self.now, timer_s)
            peer = self.peers[number]
            peer.engine.handle_timer(self.now)
            peer.pump()
            assert peer.engine.get_timer() > self.now, "the engine asks for a timer that has already gone off"
        self.now = end_s

    # --- what the tests ask ------------------------------------------------------------------------------------------

    def certified(self, first: int, last: int) -> dict[int, bytes | None]:
        """slot -> verdict digest that the peers who hold its fragment report; they must not report different ones."""
        found: dict[int, bytes | None] = {}
        for slot in range(first, last + 1):
            digests = {
                event.certificate.verdict.digest
                for peer in self.peers
                if (event := peer.settled.get(slot)) is not None and event.certificate is not None
            }
            assert len(digests) <= 1, f"slot {slot} has {len(digests)} certificates"
            found[slot] = next(iter(digests), None)
        return found

    def disputed(self) -> list[int]:
        """Fragments of which not all who hold them hold the same bytes."""
        holders = {f: [peer for peer in self.live if f in peer.anchors] for f in range(self.manifest.window)}
        return [f for f, peers in holders.items() if len({anchor_digest(peer.anchors[f]) for peer in peers}) > 1]

    def check_agreement(self) -> None:
        """I2: whoever holds a fragment holds the same bytes and says so."""
        assert self.disputed() == []
        for peer in self.live:
            for f in peer.anchors:
                assert peer.engine.anchors()[f] == peer.states[f]
                assert peer.states[f].digest == anchor_digest(peer.anchors[f])

    def check_counters(self) -> None:
        """I7: every message is accounted for."""
        for peer in self.live:
            engine = peer.engine
            assert engine.received == engine.accepted + sum(engine.refused.values())

    def check(self) -> None:
        """Everything that must hold when nothing is wrong any more."""
        self.check_agreement()
        self.check_counters()
        for peer in self.live:
            peer.check_books()
            assert not peer.engine.history.missing_updates()
