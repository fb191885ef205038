"""Whom to ask for the update of a certificate, and how long to wait for it before asking somebody else.

At first everybody asks its parent in the tree of the slot (tree.py), again and again while that has not got it either:
so nobody sends an update more than twice, however many peers there are. Who cannot be reached is passed over at once,
and a patience that grows with the depth ends the waiting for whoever promises and does not deliver.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from braniac.protocol import limits
from braniac.protocol.events import BlobWanted
from braniac.protocol.identity import PeerId
from braniac.protocol.manifest import Manifest
from braniac.protocol.messages import Certificate
from braniac.protocol.roster import Roster
from braniac.protocol.standing import Standing
from braniac.protocol.tree import ancestors


@dataclass
class _Wait:
    """For one update."""

    ancestors: list[PeerId]
    repeats: int
    """How often they are still asked before anybody is."""


class Sources:
    """Where the updates that are missing here can be had."""

    def __init__(self, manifest: Manifest, me: PeerId, roster: Roster, standing: Standing) -> None:
        self._manifest = manifest
        self._me = me
        self._roster = roster
        self._standing = standing
        self._waits: dict[bytes, _Wait] = {}

    def ask(self, certificate: Certificate, now_slot: int) -> BlobWanted:
        """Whom to ask now; to be called once more with every repeat."""
        verdict = certificate.verdict
        wait = self._waits.get(verdict.digest)
        if wait is None:
            wait = self._waits[verdict.digest] = self._begin(certificate, now_slot)
        if wait.repeats == 0:
            holders = self._anybody(certificate, wait.ancestors, now_slot)
            return BlobWanted(verdict.update_digest, verdict.update_bytes, holders)
        wait.repeats -= 1
        return BlobWanted(verdict.update_digest, verdict.update_bytes, tuple(wait.ancestors), patient=True)

    def forget(self, missing: Iterable[Certificate]) -> None:
        """Drop what is known about all updates but those that are still missing."""
        digests = {certificate.verdict.digest for certificate in missing}
        self._waits = {digest: wait for digest, wait in self._waits.items() if digest in digests}

    def _begin(self, certificate: Certificate, now_slot: int) -> _Wait:
        verdict = certificate.verdict
        if verdict.slot < now_slot - limits.PROPOSAL_OPEN_SLOTS - 1:
            return _Wait([], 0)  # it has gone round long ago: whoever lists it has it
        peers = [peer for peer in self._standing.taking_part(verdict.slot) if self._holds(peer, verdict.fragment)]
        above = ancestors(self._manifest.run_id, verdict.slot, verdict.committee, peers, self._me)
        return _Wait(above, min(len(above) + 1, limits.UPDATE_PATIENCE_REPEATS) if above else 0)

    def _holds(self, peer: PeerId, fragment: int) -> bool:
        tier = self._standing.tier_of(peer)
        return tier is not None and self._manifest.holds(tier, fragment)

    def _anybody(self, certificate: Certificate, above: list[PeerId], now_slot: int) -> tuple[PeerId, ...]:
        """All who should have it, in another order for each peer and update: not all shall turn to the same one."""
        listing = [m.peer for m in self._roster.live(now_slot) if certificate.name in m.recent]
        signers = [peer for peer, _ in certificate.signatures]

        def lot(peer: PeerId) -> bytes:
            return hashlib.sha256(b"source" + certificate.verdict.digest + self._me + peer).digest()

        return tuple(dict.fromkeys([*above, *sorted(listing, key=lot), *sorted(signers, key=lot)]))
