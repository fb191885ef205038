"""Who has a place in a slot that this peer owns, when more peers want one than are good for it.

Identities are free, so one person may bring many. Networks are less so: each gets a few places. And peers known for a
short time get no more places than there are peers known for longer, and always a few; if all are new nobody is, so a
young swarm loses nothing. Among rivals lots decide, others in each slot, so that all get their turn, after those that
have announced payloads in vain. Whoever has no place keeps its work and offers it again.

Only the owner looks at this, with its own eyes: the other seats may see other networks, and sign what it proposes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from braniac.protocol import limits
from braniac.protocol.committee import score
from braniac.protocol.identity import PeerId
from braniac.protocol.roster import Member


def known_since(slot: int, window: int) -> int:
    """Who is known for longer than this slot is no newcomer; `window` is the number of slots in one."""
    return slot - limits.NEWCOMER_WINDOWS * window


def claimants(members: Iterable[Member], since: int) -> int:
    """How many of these could have a place at once: invented peers do not make lots rarer for the others."""
    of_network: Counter[str] = Counter()
    veterans = newcomers = 0
    for member in members:
        of_network[member.network] += 1
        if member.network == "" or of_network[member.network] <= limits.NETWORK_PLACES:
            veterans += member.known_slot <= since
            newcomers += member.known_slot > since
    return veterans + (min(newcomers, max(limits.NEWCOMER_PLACES, veterans)) if veterans else newcomers)


class Places:
    """The places of one slot, given away once, and again for those that turn up later."""

    def __init__(self, run_id: bytes, slot: int, window: int) -> None:
        """`window` is the number of slots in one."""
        self._run_id = run_id
        self._slot = slot
        self._known_since = known_since(slot, window)
        self._considered: set[PeerId] = set()
        self._admitted: set[PeerId] = set()
        self._looks = 0

    def admit(self, peer: PeerId, members: Iterable[Member], taken: Collection[PeerId]) -> bool:
        """Whether `peer` has a place; `members` are who may want one, and those in `taken` have theirs already."""
        if peer not in self._considered and self._looks < limits.ADMISSION_LOOKS:
            self._looks += 1
            found = list(members)
            self._considered = {member.peer for member in found}
            self._admitted = self._choose(found, taken)
        return peer in self._admitted

    def _choose(self, members: list[Member], taken: Collection[PeerId]) -> set[PeerId]:
        veterans = sum(member.known_slot <= self._known_since for member in members)
        newcomers_max = max(limits.NEWCOMER_PLACES, veterans) if veterans else len(members)
        ranked = sorted(members, key=lambda member: self._rank(member, taken), reverse=True)
        of_network: Counter[str] = Counter()
        newcomers = 0
        admitted: set[PeerId] = set()
        for member in ranked:
            new = member.known_slot > self._known_since
            crowded = member.network != "" and of_network[member.network] >= limits.NETWORK_PLACES
            if crowded or (new and newcomers >= newcomers_max):
                continue
            of_network[member.network] += 1
            newcomers += new
            admitted.add(member.peer)
        return admitted

    def _rank(self, member: Member, taken: Collection[PeerId]) -> tuple[bool, int, bytes]:
        return member.peer in taken, -member.undelivered, score(self._run_id, self._slot, member.peer)
