"""Who is in the swarm, as far as this peer has heard: heartbeats, liveness, replay windows, bans.

Whether a peer may sit in a committee follows from what its heartbeats say (their slot, since when it is ready), not
from when they arrived, so peers that heard the same heartbeats agree on the committee.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from braniac.protocol import limits, listing
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.identity import PeerId
from braniac.protocol.messages import CertificateName, Equivocation, FragmentState, Heartbeat, Presence


@dataclass(slots=True)
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


def _follows(presence: Presence, last: Presence) -> bool:
    """Whether it was said after `last`: once a slot, so that nobody can keep all others busy; goodbye at any time."""
    later = presence.slot > last.slot or (presence.gone and not last.gone and presence.slot == last.slot)
    return later and presence.sequence > last.sequence


@dataclass(slots=True)
class Member:
    """One peer, from its latest heartbeat."""

    peer: PeerId
    tier: int
    ready_slot: int
    heard_slot: int
    """Slot its last heartbeat or presence speaks of, never in the future of this peer's clock."""
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
    greeted_slot: int | None = None
    """Slot that its last heartbeat to this peer speaks of."""
    lists_from: int = 0
    """Slot from which what it was heard to list is all that it lists."""
    every: int = 1
    """It says to all that it is there at least once in so many slots."""
    presence: Presence | None = None
    """The last that it said of itself to all."""

    def live(self, slot: int) -> bool:
        return not self.gone and self.heard_slot > slot - limits.ROSTER_LIVE_SLOTS - self.every

    def speaking(self, slot: int) -> bool:
        """Whether its heartbeats come here, so that what it lists is of now."""
        greeted = self.greeted_slot
        return self.live(slot) and greeted is not None and greeted >= slot - limits.ROSTER_LIVE_SLOTS

    def eligible(self, slot: int) -> bool:
        """Whether it is expected to contribute to `slot`."""
        return self.live(slot) and 0 <= self.ready_slot <= slot - limits.ELIGIBLE_SLOTS

    def stands(self, slot: int) -> bool:
        """Whether it may sit in the committee of `slot`, if it is `dialable`: all have heard of it a moment before."""
        told_all = self.heard_slot if self.every == 1 or self.presence is None else self.presence.slot
        return self.eligible(slot) and told_all >= slot - limits.ROSTER_LIVE_SLOTS

    def dialable(self, slot: int) -> bool:
        """Whether the others may count on reaching it in `slot`."""
        return dialable(self.unreachable_slot, slot)


class Roster:
    """All other peers. Bounded by ROSTER_PEERS_MAX; a full roster forgets the peer silent for longest."""

    def __init__(self) -> None:
        self._members: dict[PeerId, Member] = {}
        self._greeters: set[PeerId] = set()
        """Whose heartbeats came here lately: in a large swarm few of all."""
        self._replay: dict[PeerId, ReplayWindow] = {}
        self.banned: dict[PeerId, Equivocation] = {}
        """Peers that are never listened to again in this run, with the proof against each."""
        self.neighbours: tuple[PeerId, ...] | None = None
        """Who gets heartbeats where the swarm is too large for all to get them; see gossip.py."""
        self.live_count = 0
        """Live peers when this was looked at last, and those that turned up since."""

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
        returned = known is None or restarted or known.greeted_slot is None or not known.live(slot)
        before = None if restarted else known
        self.live_count += known is None or not known.live(slot)
        member = Member(
            peer,
            heartbeat.tier,
            heartbeat.ready_slot,
            min(heartbeat.slot, slot),
            sequence,
            heartbeat.addresses,
            listing.names_heard(before.recent if before else frozenset(), heartbeat),
            listing.states_heard(before.anchors if before else {}, heartbeat),
            heartbeat.tokens_per_s,
            heartbeat.unreachable_slot,
            heartbeat.loss,
            heartbeat.version,
            merged=known.merged if known else 0,
            undelivered=known.undelivered if known else 0,
            known_slot=known.known_slot if known else slot,
            network=known.network if known else "",
            greeted_slot=min(heartbeat.slot, slot),
            lists_from=listing.complete_from(before.lists_from if before and not returned else None, heartbeat, slot),
            every=heartbeat.every,
            presence=before.presence if before else None,
        )
        if known is not None:
            member.heard_slot = max(member.heard_slot, known.heard_slot)
        self._members[peer] = member
        self._greeters.add(peer)
        return member, returned

    def hear_of(self, presence: Presence, slot: int) -> tuple[Member | None, bool]:
        """Note what a peer says of itself to all, whoever brought it: the member, and whether it is new or came back.

        None if it is no news. On hearsay nobody who is live is forgotten, so that inventing peers displaces nobody.
        """
        known = self._members.get(presence.peer)
        if presence.peer in self.banned or presence.slot + presence.every + limits.ROSTER_LIVE_SLOTS <= slot:
            return None, False
        if known is None and len(self._members) >= limits.ROSTER_PEERS_MAX and not self._forget_silent(slot):
            return None, False
        last = known.presence if known is not None else None
        if last is not None and not _follows(presence, last):
            return None, False
        returned = known is None or not known.live(slot)
        if known is None or presence.sequence >> 32 > known.sequence >> 32:  # new, or another incarnation
            known = Member(
                presence.peer,
                presence.tier,
                ready_slot=-1,
                heard_slot=-1,
                merged=known.merged if known else 0,
                undelivered=known.undelivered if known else 0,
                known_slot=known.known_slot if known else slot,
                network=known.network if known else "",
            )
            self._members[presence.peer] = known
        if presence.sequence > known.sequence:
            known.sequence, known.tier, known.ready_slot = presence.sequence, presence.tier, presence.ready_slot
            known.unreachable_slot, known.addresses = presence.unreachable_slot, presence.addresses
            known.every, known.gone = presence.every, presence.gone
        known.presence, known.heard_slot = presence, max(known.heard_slot, min(presence.slot, slot))
        self.live_count += returned and known.live(slot)
        return known, returned and known.live(slot)

    def _forget_silent(self, slot: int) -> bool:
        """Make room by forgetting whoever was silent for longest; False if all are live."""
        silent = [member for member in self if not member.live(slot)]
        if silent:
            del self._members[min(silent, key=lambda m: m.heard_slot).peer]
        return bool(silent)

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

    def last_heard(self, count: int) -> list[Member]:
        """So many of those that did not say goodbye."""
        known = [member for member in self if not member.gone]
        return known if len(known) <= count else heapq.nlargest(count, known, key=lambda m: m.heard_slot)

    def some_neighbours(self, count: int, first: int) -> list[PeerId]:
        """So many of the neighbours, others for another `first`; nobody where heartbeats go to all."""
        near = self.neighbours or ()
        return [near[(first + n) % len(near)] for n in range(min(count, len(near)))]

    def speaking(self, slot: int) -> list[Member]:
        """Those whose heartbeats come here: all live ones, or in a large swarm neighbours."""
        heard = (self._members.get(peer) for peer in sorted(self._greeters))
        return [member for member in heard if member is not None and member.speaking(slot)]

    def eligible(self, slot: int) -> list[Member]:
        return [member for member in self if member.eligible(slot)]

    def standing(self, slot: int) -> list[Member]:
        edge = slot - limits.ROSTER_LIVE_SLOTS - 1  # who was not heard of since then did not tell all either
        return [member for member in self if member.heard_slot >= edge and member.stands(slot)]

    def lapsed(self, slot: int) -> list[Member]:
        """Members that fell silent just now: live one slot ago, not live any more."""
        return [member for member in self if not member.gone and member.live(slot - 1) and not member.live(slot)]

    def forget(self, slot: int) -> None:
        """Drop members that were silent for very long, and do not listen for those that greet no more."""
        self._greeters = {member.peer for member in self.speaking(slot)}
        for member in list(self):
            if member.heard_slot < slot - limits.ROSTER_FORGET_SLOTS:
                del self._members[member.peer]
