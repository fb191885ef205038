"""Messages on their way out: sealed with a sequence number that never repeats."""

from __future__ import annotations

from collections.abc import Collection

from braniac.protocol import limits, wire
from braniac.protocol.identity import Identity, PeerId
from braniac.protocol.messages import Message
from braniac.protocol.roster import Roster

_TRIED_ALWAYS_SLOTS = 64  # whoever was silent for longer is tried once in as many slots


class Outbox:
    """What the engine says until the daemon takes it."""

    def __init__(self, identity: Identity, run_id: bytes, incarnation: int, roster: Roster) -> None:
        self._identity = identity
        self._run_id = run_id
        self._sequence = incarnation << 32
        self._roster = roster
        self._waiting: list[tuple[PeerId, bytes]] = []

    def drain(self) -> list[tuple[PeerId, bytes]]:
        """Messages since the last call; each may be lost."""
        out, self._waiting = self._waiting, []
        return out

    def send(self, peer: PeerId, message: Message) -> None:
        """To one peer."""
        self._waiting.append((peer, self._seal(message)))

    def broadcast(self, message: Message, slot: int) -> None:
        """To every member; once in a while also to those silent for long, in case it was the network that failed.

        In a large swarm to the neighbours.
        """
        if (neighbours := self._roster.neighbours) is not None:
            return self.send_all(neighbours, message)
        age = limits.ROSTER_FORGET_SLOTS if slot % _TRIED_ALWAYS_SLOTS == 0 else _TRIED_ALWAYS_SLOTS
        known = self._roster.last_heard(limits.LOOKED_FOR_PEERS_MAX)
        self.send_all([member.peer for member in known if member.heard_slot > slot - age], message)

    def send_all(self, peers: Collection[PeerId], message: Message) -> None:
        """The same bytes to several peers."""
        if peers:
            data = self._seal(message)
            self._waiting.extend((peer, data) for peer in peers)

    def next_sequence(self) -> int:
        """For a message, or for a statement that is to be put in order with messages."""
        self._sequence += 1
        return self._sequence

    def _seal(self, message: Message) -> bytes:
        self.next_sequence()
        return wire.seal(self._identity, self._run_id, self._sequence, message)
