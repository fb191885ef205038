"""Who is in the swarm, as far as this peer has heard: heartbeats, liveness, replay windows, bans.

Whether a peer may sit in a committee follows from what its heartbeats say (their slot, since when it is ready), not
from when they arrived, so peers that heard the same heartbeats agree on the committee.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from braniac.protocol import limits
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.identity import PeerId
from braniac.protocol.messages import CertificateName, Equivocation, FragmentState, Heartbeat


@dataclass
class ReplayWindow:
    """Which sequence numbers of one sender were seen (as in RFC 6479, with one Python integer as the bitmap)."""

    highest: int = -1
    seen: int = 0

    def admit(self, sequence: int) -> bool:
        """Record `sequence`; False if it was seen or is too old to tell."""
        if sequence > self.highest:
            shift = min(sequence - self.highest, limits.REPLAY_WINDOW)
            self.seen = ((self.seen << shift) | 1) & ((1 << limits.REPLAY_WINDOW) - 1)
            self.highest = sequence
            return True
        if self.highest - sequence >= limits.REPLAY_WINDOW:  # first: a shift by 2**63 would take all memory
            return False
        bit = 1 << (self.highest - sequence)
        if self.seen & bit:
            return False
        self.seen |= bit
        return True


def dialable(unreachable_slot: int, slot: int) -> bool:
    """Whether a peer that says so may sit in `slot`: like readiness, its word counts once all have had time to hear."""
    return unreachable_slot == 0 or slot < unreachable_slot + limits.ELIGIBLE_SLOTS


@dataclass
class Member:
    """One peer, from its latest heartbeat."""

    peer: PeerId
    tier: int
    ready_slot: int
    heard_slot: int
    """Slot its last heartbeat speaks of, never in the future of this peer's clock."""
    sequence: int = -1
    """Of its latest heartbeat or goodbye: an older one that arrives later changes nothing."""
    addresses: tuple[str, ...] = ()
    recent: frozenset[CertificateName] = frozenset()
    anchors: dict[int, FragmentState] = field(default_factory=dict)
    tokens_per_s: float = 0.0
    unreachable_slot: int = 0
    loss: float | None = None
    version: str = ""
    gone: bool = False
    merged: int = 0
    """Contributions of this peer in certificates seen here."""
    undelivered: int = 0
    """How many payloads it has announced to this owner and not delivered since it last did."""
    known_slot: int = 0
    """Since when this peer knows it."""
    network: str = ""
    """The network of the Internet from which it is connected; empty if that is unknown or private."""

    def live(self, slot: int) -> bool:
        return not self.gone and self.heard_slot >= slot - limits.ROSTER_LIVE_SLOTS

    def eligible(self, slot: int) -> bool:
        """Whether it is expected to contribute to `slot`, and may sit in its committee if it is `dialable`."""
        return self.live(slot) and 0 <= self.ready_slot <= slot - limits.ELIGIBLE_SLOTS

    def dialable(self, slot: int) -> bool:
        """Whether the others may count on reaching it in `slot`."""
        return dialable(self.unreachable_slot, slot)


class Roster:
    """All other peers. Bounded by ROSTER_PEERS_MAX; a full roster forgets the peer silent for longest."""

    def __init__(self) -> None:
        self._members: dict[PeerId, Member] = {}
        self._replay: dict[PeerId, ReplayWindow] = {}
        self.banned: dict[PeerId, Equivocation] = {}
        """Peers that are never listened to again in this run, with the proof against each."""

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def __len__(self) -> int:
        return len(self._members)

    def get(self, peer: PeerId) -> Member | None:
        return self._members.get(peer)

    def check_fresh(self, peer: PeerId, sequence: int) -> None:
        """Raises WireError for a banned sender or a replayed message."""
        if peer in self.banned:
            raise WireError(Refusal.EQUIVOCATION, "the sender is banned from this run")
        if not self._replay.setdefault(peer, ReplayWindow()).admit(sequence):
            raise WireError(Refusal.REPLAYED, f"sequence number {sequence} was seen before")
        if len(self._replay) > 4 * limits.ROSTER_PEERS_MAX:
            for stranger in [p for p in self._replay if p not in self._members]:
                del self._replay[stranger]

    def hear(self, peer: PeerId, heartbeat: Heartbeat, slot: int, sequence: int) -> tuple[Member, bool]:
        """Note a heartbeat received in `slot`: the member, and whether it is new, came back or was restarted."""
        known = self._members.get(peer)
        if known is not None and sequence < known.sequence:
            return known, False
        if known is None and len(self._members) >= limits.ROSTER_PEERS_MAX:
            oldest = min(self._members.values(), key=lambda m: m.heard_slot)
            del self._members[oldest.peer]
        restarted = known is not None and sequence >> 32 != known.sequence >> 32  # another incarnation
        returned = known is None or restarted or not known.live(slot)
        member = Member(
            peer,
            heartbeat.tier,
            heartbeat.ready_slot,
            min(heartbeat.slot, slot),
            sequence,
            heartbeat.addresses,
            frozenset(heartbeat.recent),
            {state.fragment: state for state in heartbeat.anchors},
            heartbeat.tokens_per_s,
            heartbeat.unreachable_slot,
            heartbeat.loss,
            heartbeat.version,
            merged=known.merged if known else 0,
            undelivered=known.undelivered if known else 0,
            known_slot=known.known_slot if known else slot,
            network=known.network if known else "",
        )
        if known is not None:
            member.heard_slot = max(member.heard_slot, known.heard_slot)
        self._members[peer] = member
        return member, returned

    def locate(self, peer: PeerId, network: str) -> None:
        """A peer was seen to be connected from this network of the Internet; empty if it is private."""
        if member := self._members.get(peer):
            member.network = network

    def note_deliveries(self, announced: Iterable[PeerId], delivered: Collection[PeerId]) -> None:
        """Which of the peers that announced a payload have delivered it."""
        for peer in announced:
            if member := self._members.get(peer):
                member.undelivered = 0 if peer in delivered else member.undelivered + 1

    def leave(self, peer: PeerId, sequence: int) -> bool:
        """The peer said goodbye; False if it was heard again since."""
        member = self._members.get(peer)
        if member is None or sequence < member.sequence:
            return False
        member.gone, member.sequence = True, sequence
        return True

    def ban(self, proof: Equivocation) -> bool:
        """Never listen to this peer again in this run; False if it is banned already."""
        if proof.peer in self.banned:
            return False
        self.banned[proof.peer] = proof
        size = sum(kept.body_bytes for kept in self.banned.values())
        while len(self.banned) > limits.ROSTER_PEERS_MAX or size > limits.PROOFS_BYTES_MAX:
            oldest = next(iter(self.banned))  # if it still misbehaves it will be convicted again
            size -= self.banned.pop(oldest).body_bytes
        self._members.pop(proof.peer, None)
        return True

    def live(self, slot: int) -> list[Member]:
        return [member for member in self if member.live(slot)]

    def eligible(self, slot: int) -> list[Member]:
        return [member for member in self if member.eligible(slot)]

    def lapsed(self, slot: int) -> list[Member]:
        """Members that fell silent just now: live one slot ago, not live any more."""
        return [member for member in self if not member.gone and member.live(slot - 1) and not member.live(slot)]

    def forget(self, slot: int) -> None:
        """Drop members that were silent for very long."""
        for member in list(self):
            if member.heard_slot < slot - limits.ROSTER_FORGET_SLOTS:
                del self._members[member.peer]
