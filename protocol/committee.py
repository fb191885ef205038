"""Who decides a slot: rendezvous hashing picks the same few peers for everybody who knows the same roster.

Highest random weight (Thaler and Ravishankar 1998): every peer's score for a slot is a hash, the best three form the
committee, rank 0 owns the slot. A peer that leaves changes only the slots it had a seat in, and nobody can choose
their seat without choosing a new identity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from braniac.protocol import limits
from braniac.protocol.identity import PeerId


def score(run_id: bytes, slot: int, peer: PeerId) -> bytes:
    """The peer's lot for this slot; the highest wins."""
    return hashlib.sha256(b"seat" + run_id + slot.to_bytes(8, signed=True) + peer).digest()


def drawn(lot: bytes, places: int, peers: int) -> bool:
    """Whether this lot is among the best for about `places` places, of as many lots as there are `peers`."""
    return int.from_bytes(lot[:8]) * peers >= peers - places << 64


def share_lot(run_id: bytes, slot: int, peer: PeerId) -> bytes:
    """The peer's lot for contributing to this slot."""
    return hashlib.sha256(b"share" + run_id + slot.to_bytes(8, signed=True) + peer).digest()


def ranking(run_id: bytes, slot: int, peers: Iterable[PeerId]) -> list[PeerId]:
    """All peers, best first."""
    return sorted(set(peers), key=lambda peer: score(run_id, slot, peer), reverse=True)


def committee(run_id: bytes, slot: int, peers: Iterable[PeerId]) -> tuple[PeerId, ...]:
    """The seats of a slot, owner first; fewer than three only in a smaller swarm."""
    return tuple(ranking(run_id, slot, peers)[: limits.COMMITTEE_SIZE])


def majority(seats: int) -> int:
    """Signatures that decide a committee of `seats`."""
    return seats // 2 + 1
