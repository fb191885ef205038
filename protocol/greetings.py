"""How peers come to know each other: greetings until somebody answers, and introductions of one peer to another.

A greeting is a heartbeat. Any of them may be lost, so nothing here counts on a single one.
"""

from __future__ import annotations

from collections.abc import Callable

from braniac.protocol import limits
from braniac.protocol.identity import PeerId
from braniac.protocol.messages import Heartbeat, Introduction, Message
from braniac.protocol.roster import Roster

_TRIED_SLOTS = 16


class Greetings:
    """Whom this peer greets though it does not hear them."""

    def __init__(
        self, me: PeerId, roster: Roster, send: Callable[[PeerId, Message], None], heartbeat: Callable[[], Heartbeat]
    ) -> None:
        self._me = me
        self._roster = roster
        self._send = send
        self._heartbeat = heartbeat
        self._unanswered: dict[PeerId, int] = {}
        """Since which slot."""

    def greet(self, peer: PeerId, slot: int) -> None:
        """Somebody says this peer exists: greet it until it answers or enough was tried."""
        member = self._roster.get(peer)
        silent = member is None or not member.live(slot)
        unwanted = peer == self._me or peer in self._roster.banned
        enough = self._roster.live_count > limits.GREETED_PEERS_MAX  # the others are known by hearsay
        if silent and not unwanted and not enough and len(self._unanswered) < limits.ROSTER_PEERS_MAX:
            self._unanswered.setdefault(peer, slot)
            self._send(peer, self._heartbeat())

    def look_for_members(self, slot: int) -> None:
        """After a silence of this peer's own: whoever was there is greeted again with the next repeats."""
        for member in self._roster.last_heard(limits.LOOKED_FOR_PEERS_MAX):
            self._unanswered.setdefault(member.peer, slot)

    def repeat(self, slot: int) -> None:
        """Greet once more whoever has not answered."""
        for peer, since in list(self._unanswered.items()):
            if slot > since + _TRIED_SLOTS:
                del self._unanswered[peer]
            else:
                self._send(peer, self._heartbeat())

    def answered(self, peer: PeerId) -> None:
        """A heartbeat of this peer arrived."""
        self._unanswered.pop(peer, None)

    def welcome(self, peer: PeerId, slot: int) -> None:
        """Tell a peer that is new, or back, who else is here and who is banned."""
        self._send(peer, self._heartbeat())
        self._introduce_others(peer, slot)
        room = limits.MESSAGE_BYTES_MAX
        for proof in list(self._roster.banned.values())[: -limits.REQUEST_NAMES_MAX - 1 : -1]:
            if (room := room - proof.body_bytes) >= 0:
                self._send(peer, proof)

    def spread(self, slot: int) -> None:
        """Once a slot, tell somebody else whom this peer knows; in a large swarm presences do that.

        Two peers that missed each other's greetings would otherwise disagree about committees for good.
        """
        if self._roster.neighbours is None and (live := self._roster.live(slot)):
            self._introduce_others(live[slot % len(live)].peer, slot)

    def _introduce_others(self, newcomer: PeerId, slot: int) -> None:
        """Name the peers heard last to a newcomer: who waits for the directory sits in other committees meanwhile."""
        others = [m for m in self._roster.live(slot) if m.peer != newcomer]
        others.sort(key=lambda m: (-m.heard_slot, m.peer))
        if others:
            named = tuple((m.peer, m.addresses) for m in others[: limits.INTRODUCED_MAX])
            self._send(newcomer, Introduction(named))
