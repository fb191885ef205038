"""Many phones, coming and going, and what became of their slots."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable
from unittest import mock

from braniac.node.pacing import paced_bytes_per_slot
from braniac.protocol import committee, limits, statements, tree, wire
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.history import History
from braniac.protocol.identity import PeerId
from braniac.protocol.manifest import Manifest
from braniac.protocol.messages import Certificate, FragmentState, Heartbeat, Opened, Presence, Verdict
from phones.links import REPLY_BYTES, Time
from phones.peer import Phone
from phones.run import Sizes

AGE_WINDOWS = 6  # of the run when the simulation begins
BOOTSTRAP_PEERS = 4  # that a newcomer knows


class Swarm:
    """A swarm that has run for long: everybody knows everybody, holds everything and has all certificates."""

    def __init__(
        self, manifest: Manifest, sizes: Sizes, peers: int, *, churn_per_h: float, pace: float, seed: int
    ) -> None:
        """`churn_per_h`: share of the peers that vanish per hour, each followed by a newcomer; `pace`: of uploads."""
        self.manifest = manifest
        self.sizes = sizes
        self.pace_bytes_per_s = paced_bytes_per_slot(manifest, 0, peers, pace) / manifest.slot_s
        self.rng = random.Random(seed)
        self.first_slot = AGE_WINDOWS * manifest.window
        self.time = Time(manifest.slot_start(self.first_slot) - 0.5 * manifest.slot_s)
        self.kinds: dict[bytes, str] = {}
        """Digest of a blob -> what it is."""
        self.names: Counter[str] = Counter()
        """Messages by kind."""
        self.departures = 0
        # What thousands of peers check alike is checked once: it depends on nothing but its bytes.
        self._presence_in = _shared(statements.presence_in)
        self._open, self._verify, self._score = (
            functools.lru_cache(maxsize=1 << 16)(check)
            for check in (wire.open_envelope, statements.verify, committee.score)
        )
        self._lifetime_s = 3600 / churn_per_h / peers if churn_per_h else float("inf")
        self.phones: list[Phone] = []
        self.by_id: dict[PeerId, Phone] = {}
        past = _past(manifest)
        for _ in range(peers):
            self._add(_history(manifest, past))
        self._acquaint()

    def _add(self, history: History) -> Phone:
        phone = Phone(self, len(self.phones), history)
        self.phones.append(phone)
        self.by_id[phone.id] = phone
        return phone

    def _acquaint(self) -> None:
        """Everybody has heard everybody: in a large swarm each at another time."""
        slot = self.manifest.slot_at(self.time.now)
        self._ready_slot = slot - self.manifest.window
        for phone in self.phones:
            for fragment, last in phone.engine.history.last.items():
                phone.engine.anchor_known(FragmentState(fragment, last, bytes([fragment % 256]) * 32))
        if len(self.phones) - 1 <= limits.GREETED_PEERS_MAX:
            states = tuple(self.phones[0].engine.anchors().values())
            recent = self.phones[0].engine.history.recent(slot)
            for phone in self.phones:
                heartbeat = Heartbeat(slot, 0, self._ready_slot, phone.engine.addresses, recent, states)
                for other in self._others(phone):
                    other.engine.roster.hear(phone.id, heartbeat, slot, 0)
        else:
            for phone in self.phones:
                presence = self._presence(phone, slot - self.rng.randrange(limits.PRESENCE_SLOTS // 2))
                phone.engine._standing.said = presence
                for other in self._others(phone):
                    member, _ = other.engine.roster.hear_of(presence, slot)
                    assert member is not None
                    member.greeted_slot = slot - limits.ROSTER_LIVE_SLOTS - 1  # nobody is new to anybody
        for phone in self.phones:
            phone.engine._standing.ready_slot = self._ready_slot
            phone.ready_s = self.time.now
            self.time.later(self.rng.uniform(0, self.manifest.slot_s / 4), phone.pump)

    def _others(self, phone: Phone) -> list[Phone]:
        return [other for other in self.phones if other is not phone]

    def _presence(self, phone: Phone, slot: int) -> Presence:
        return statements.make_presence(
            phone.identity,
            self.manifest.run_id,
            1 << 32,
            slot=slot,
            tier=0,
            ready_slot=self._ready_slot,
            unreachable_slot=0,
            every=limits.PRESENCE_SLOTS,
            gone=False,
            addresses=phone.engine.addresses,
        )

    # --- time --------------------------------------------------------------------------------------------------------

    def run(self, slots: int, settling_slots: int) -> None:
        """Let the swarm settle, then count what it sends for `slots`."""
        with (
            mock.patch.object(wire, "open_envelope", self._open),
            mock.patch.object(statements, "presence_in", self._presence_in),
            mock.patch.object(statements, "verify", self._verify),
            mock.patch.object(committee, "score", self._score),
            mock.patch.object(tree, "score", self._score),
        ):
            self.time.run_until(self.manifest.slot_start(self.first_slot + settling_slots))
            for phone in self.phones:
                phone.link.sent.clear()
                phone.link.received.clear()
            self._next_departure()
            self.time.run_until(self.manifest.slot_start(self.first_slot + settling_slots + slots))

    @property
    def alive(self) -> list[Phone]:
        return [phone for phone in self.phones if phone.alive]

    def _next_departure(self) -> None:
        if self._lifetime_s < float("inf"):
            self.time.later(self.rng.expovariate(1 / self._lifetime_s), self._depart)

    def _depart(self) -> None:
        """One vanishes without a word; another one, who has nothing, takes its place."""
        known = self.alive
        self.rng.choice(known).alive = False
        self.departures += 1
        newcomer = self._add(History(self.manifest))
        for phone in self.rng.sample(known, min(BOOTSTRAP_PEERS, len(known))):
            newcomer.engine.introduce(phone.id)
        newcomer.pump()
        self._next_departure()

    # --- network -----------------------------------------------------------------------------------------------------

    def deliver(self, source: Phone, peer: PeerId, data: bytes) -> None:
        """A message, and the empty reply to it."""
        target = self.by_id.get(peer)
        if target is None:
            return
        opened: Opened = self._open(data, self.manifest.run_id)
        kind = type(opened.message).__name__
        self.names[kind] += 1

        def arrive() -> None:
            if target.alive:
                target.link.sent[kind] += REPLY_BYTES
                source.link.received[kind] += REPLY_BYTES
                target.receive(data)

        source.link.send(target.link, len(data) + 4, kind, arrive)


def _shared(
    presence_in: Callable[[pb.SignedPresence, bytes], Presence],
) -> Callable[[pb.SignedPresence, bytes], Presence]:
    known: dict[bytes, Presence] = {}

    def look_up(signed: pb.SignedPresence, run_id: bytes) -> Presence:
        if (found := known.get(signed.signature)) is None:
            found = known[signed.signature] = presence_in(signed, run_id)
        return found

    return look_up


def _past(manifest: Manifest) -> list[Certificate]:
    """Certificates of the windows before the simulation begins; only their names matter."""
    first = AGE_WINDOWS * manifest.window
    horizon = History(manifest).horizon
    certificates = []
    for slot in range(first - horizon, first - 1):
        fragment = manifest.fragment_of(slot)
        certificates.append(Certificate(Verdict(slot, fragment, (), (), bytes(32), 1, (), b"%d" % slot), ()))
    return certificates


def _history(manifest: Manifest, past: list[Certificate]) -> History:
    history = History(manifest)
    history.begin(range(manifest.window))
    for certificate in past:
        slot = certificate.verdict.slot
        history.accept(certificate, slot)
        entry = history.entry(slot)
        assert entry is not None
        entry.handed = True
        history.confirm(certificate, None, undo=False)
    return history
