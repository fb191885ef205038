"""Who is there, in a swarm too large for everybody to greet everybody.

Up to GREETED_PEERS_MAX live peers, heartbeats go to all. Beyond that each peer has a few neighbours, the same for a
long time, that get its heartbeats, and says to all others only that it is there: a small signed presence that is passed
on from neighbour to neighbour. It does so seldom, but always shortly before a slot in whose committee it may have to
sit, so that whoever is to decide a slot was heard by all a moment before.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

from braniac.protocol import committee, events, limits, statements
from braniac.protocol.admission import known_since
from braniac.protocol.identity import Identity, PeerId
from braniac.protocol.manifest import Manifest
from braniac.protocol.messages import Gossip, Presence, RosterRequest
from braniac.protocol.outbox import Outbox
from braniac.protocol.roster import Member, Roster
from braniac.protocol.standing import Standing

_SEATS_AHEAD_SLOTS = 3  # for a presence to reach everybody before its slot begins


class Gossiper:
    """This peer's own presence, and those that it passes on."""

    def __init__(
        self,
        manifest: Manifest,
        identity: Identity,
        tier: int,
        roster: Roster,
        standing: Standing,
        outbox: Outbox,
        emit: Callable[[events.Event], None],
    ) -> None:
        self._manifest = manifest
        self._identity = identity
        self._me = identity.peer_id
        self._tier = tier
        self._roster = roster
        self._standing = standing
        self._outbox = outbox
        self._emit = emit
        self._news: dict[PeerId, Presence] = {}
        """Heard since neighbours were told last."""
        self._turn = 0
        self._distances: dict[PeerId, bytes] = {}
        self._strangers: Counter[PeerId] = Counter()
        """Unknown peers that each neighbour has brought up in this slot."""
        self._asked: PeerId | None = None
        """Who was asked for its roster in this slot."""
        self._answered: dict[PeerId, int] = {}

    def begin_slot(self, slot: int, addresses: tuple[str, ...]) -> None:
        """Look who is there: choose neighbours, and say that this peer is there if that is due."""
        live = self._roster.live(slot)
        self._roster.live_count = len(live)
        self._roster.neighbours = self._nearest(live, slot) if len(live) > limits.GREETED_PEERS_MAX else None
        self._strangers.clear()
        self._asked = None
        self._answered = {p: at for p, at in self._answered.items() if at > slot - limits.ROSTER_ANSWER_SLOTS}
        if self._roster.neighbours is None:
            self._standing.said = None
        elif self._due(slot, len(live) + 1):
            self.speak(slot, addresses)

    def _nearest(self, live: list[Member], slot: int) -> tuple[PeerId, ...]:
        """The same for a long time, and most often each other's: whom a hash of both puts first.

        Few of one network, and if there are others no more than half newcomers: invented peers pass nothing on.
        """
        since = known_since(slot, self._manifest.window)
        newcomers_left = max(limits.NEIGHBOURS // 2, limits.NEIGHBOURS - sum(m.known_slot <= since for m in live))
        of_network: Counter[str] = Counter()
        nearest: list[PeerId] = []
        for member in sorted(live, key=self._distance):
            new = member.known_slot > since
            crowded = member.network != "" and of_network[member.network] >= limits.NETWORK_PLACES
            if crowded or (new and not newcomers_left):
                continue
            of_network[member.network] += 1
            newcomers_left -= new
            nearest.append(member.peer)
            if len(nearest) == limits.NEIGHBOURS:
                break
        return tuple(nearest)

    def _distance(self, member: Member) -> bytes:
        if (known := self._distances.get(member.peer)) is None:
            if len(self._distances) > 2 * limits.ROSTER_PEERS_MAX:
                self._distances.clear()
            pair = b"".join(sorted([self._me, member.peer]))
            known = hashlib.sha256(b"neighbour" + self._manifest.run_id + pair).digest()
            self._distances[member.peer] = known
        return known

    def _due(self, slot: int, peers: int) -> bool:
        said = self._standing.said
        if said is None or said.slot + self._silence_slots(said) <= slot:
            return True
        if (said.ready_slot, said.unreachable_slot) != (self._standing.ready_slot, self._standing.unreachable_slot):
            return True
        if self._standing.ready_slot < 0:
            return False
        ahead = range(slot + 1, slot + 1 + _SEATS_AHEAD_SLOTS)
        return any(
            said.slot < seat - limits.ROSTER_LIVE_SLOTS
            and committee.drawn(committee.score(self._manifest.run_id, seat, self._me), limits.CANDIDATES, peers)
            for seat in ahead
        )

    def _silence_slots(self, said: Presence) -> int:
        """Other peers pause for other times, or those that began together would always speak together."""
        half = limits.PRESENCE_SLOTS // 2
        return half + 1 + int.from_bytes(said.signature[:4]) % half

    def speak(self, slot: int, addresses: tuple[str, ...], *, gone: bool = False) -> None:
        """Say to everybody that this peer is there, or goes; nothing where heartbeats go to everybody."""
        if self._roster.neighbours is None:
            return
        said = self._standing.said = statements.make_presence(
            self._identity,
            self._manifest.run_id,
            self._outbox.next_sequence(),
            slot=max(0, slot),
            tier=self._tier,
            ready_slot=self._standing.ready_slot,
            unreachable_slot=self._standing.unreachable_slot,
            every=limits.PRESENCE_SLOTS,
            gone=gone,
            addresses=addresses,
        )
        self._tell(self._roster.neighbours, [said])

    def pass_on(self) -> None:
        """Tell a few neighbours what is new, others each time."""
        news = list(self._news.values())
        self._news.clear()
        self._turn += 1
        if news:
            first = self._turn * limits.GOSSIP_PEERS
            self._tell(self._roster.some_neighbours(limits.GOSSIP_PEERS, first), news)

    def _tell(self, peers: Iterable[PeerId], presences: list[Presence]) -> None:
        for peer in peers:
            for batch in _batches([p for p in presences if p.peer != peer]):
                self._outbox.send(peer, Gossip(batch))

    def hear(self, sender: PeerId, presences: Iterable[Presence], slot: int) -> None:
        """Believe what is signed, new and of now, and pass it on. Of an unknown sender, only what it says of itself."""
        known = self._roster.get(sender) is not None
        for presence in presences:
            stranger = self._roster.get(presence.peer) is None
            foreign = not known and presence.peer != sender
            if foreign or presence.peer == self._me or presence.slot > slot + 1:
                continue
            if stranger and sender not in (presence.peer, self._asked):
                if self._strangers[sender] >= limits.GOSSIP_STRANGERS_MAX:
                    continue
                self._strangers[sender] += 1
            member, returned = self._roster.hear_of(presence, slot)
            if member is None:
                continue
            self._news[presence.peer] = presence
            if presence.gone:
                self._emit(events.PeerLeft(presence.peer, said_goodbye=True))
            elif returned:
                self._emit(events.PeerJoined(presence.peer, member.tier, member.addresses))

    def compare(self, sender: PeerId, known: int, slot: int) -> None:
        """A neighbour knows so many peers: ask for them if it is many more than are known here."""
        mine = self._roster.live_count
        if known > limits.GREETED_PEERS_MAX and known > mine + mine // 8 and self._asked is None:
            self._asked = sender
            self._outbox.send(sender, RosterRequest())

    def answer(self, sender: PeerId, slot: int) -> None:
        """Tell a peer of all that are live; not again for a while, and few in that time: it is the longest answer."""
        if sender not in self._answered and len(self._answered) < limits.NEIGHBOURS:
            self._answered[sender] = slot
            live = [m.presence for m in self._roster.live(slot) if m.presence is not None]
            self._tell([sender], live if self._standing.said is None else [*live, self._standing.said])


def _batches(presences: list[Presence]) -> Iterator[tuple[Presence, ...]]:
    for first in range(0, len(presences), limits.GOSSIP_PRESENCES_MAX):
        yield tuple(presences[first : first + limits.GOSSIP_PRESENCES_MAX])
