"""Who contributed how much, as far as the certificates that this peer has seen say.

Counted is every certificate that stands, once per slot: each contribution in it counts one for its peer, and the tokens
that the peer signed as its weight. One that is replaced by a better one is taken back. Everything counted was signed by
the contributor and by a majority of a committee, so whoever has the same certificates comes to the same totals. The
weights are what peers say of themselves: nobody can check how many tokens somebody trained on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from braniac.protocol import limits
from braniac.protocol.identity import PeerId, peer_id_from_text, peer_id_text
from braniac.protocol.messages import Certificate


@dataclass(frozen=True)
class Total:
    """What one peer has contributed."""

    contributions: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class _Counted:
    """A certificate that may still be replaced."""

    signatures: int
    weight: int
    digest: bytes
    shares: tuple[tuple[PeerId, int], ...]

    def rank(self) -> tuple[int, int, int]:
        return (self.signatures, self.weight, -int.from_bytes(self.digest))


class Contributions:
    """Totals per peer. Bounded by CONTRIBUTORS_MAX: a full table drops whoever has contributed least."""

    def __init__(self) -> None:
        self.first_slot: int | None = None
        """The oldest slot that was counted."""
        self.certificates = 0
        self._totals: dict[PeerId, Total] = {}
        self._open: dict[int, _Counted] = {}
        self._closed: set[int] = set()
        """Slots that are counted for good, as long as a certificate of them may still arrive."""

    def note(self, certificate: Certificate) -> None:
        """Count a checked certificate, unless its slot has that one or a better one already."""
        slot, verdict = certificate.verdict.slot, certificate.verdict
        shares = tuple((share.commitment.peer, share.commitment.weight) for share in verdict.shares)
        counted = _Counted(len(certificate.signatures), certificate.weight, verdict.digest, shares)
        if slot in self._closed:
            return
        if (standing := self._open.get(slot)) is not None:
            if standing.digest == counted.digest or standing.rank() > counted.rank():
                return
            self._add(standing, -1)
        self._open[slot] = counted
        self._add(counted, 1)
        self.first_slot = slot if self.first_slot is None else min(self.first_slot, slot)

    def prune(self, final_slot: int, horizon_slot: int) -> None:
        """Slots up to `final_slot` cannot be replaced any more; of slots up to `horizon_slot` nothing arrives."""
        final = {slot for slot in self._open if slot <= final_slot}
        for slot in final:
            del self._open[slot]
        self._closed = {slot for slot in self._closed | final if slot > horizon_slot}

    def of(self, peer: PeerId) -> Total:
        return self._totals.get(peer, Total())

    def ranking(self) -> list[tuple[PeerId, Total]]:
        """Everybody, most tokens first."""
        return sorted(self._totals.items(), key=lambda item: (-item[1].tokens, -item[1].contributions, item[0]))

    def _add(self, counted: _Counted, sign: int) -> None:
        self.certificates += sign
        for peer, weight in counted.shares:
            total = self.of(peer)
            changed = Total(max(0, total.contributions + sign), max(0, total.tokens + sign * weight))
            if changed.contributions:
                self._make_room(peer)
                self._totals[peer] = changed
            else:
                self._totals.pop(peer, None)

    def _make_room(self, newcomer: PeerId) -> None:
        if newcomer not in self._totals and len(self._totals) >= limits.CONTRIBUTORS_MAX:
            del self._totals[min(self._totals, key=lambda peer: (self._totals[peer].tokens, peer))]

    def to_json(self) -> dict[str, Any]:
        """For a generation."""
        return {
            "first_slot": self.first_slot,
            "certificates": self.certificates,
            "totals": {peer_id_text(p): [t.contributions, t.tokens] for p, t in self._totals.items()},
            "open": {
                str(slot): [c.signatures, c.weight, c.digest.hex(), [[peer_id_text(p), w] for p, w in c.shares]]
                for slot, c in self._open.items()
            },
            "closed": sorted(self._closed),
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Contributions:
        """Inverse of `to_json`. Raises KeyError, TypeError, ValueError or IdentityError if the state is damaged."""
        self = cls()
        self.first_slot = None if stored["first_slot"] is None else int(stored["first_slot"])
        self.certificates = int(stored["certificates"])
        self._totals = {peer_id_from_text(p): Total(int(n), int(t)) for p, (n, t) in stored["totals"].items()}
        self._open = {
            int(slot): _Counted(int(signatures), int(weight), bytes.fromhex(digest), _shares(shares))
            for slot, (signatures, weight, digest, shares) in stored["open"].items()
        }
        self._closed = {int(slot) for slot in stored["closed"]}
        return self


def _shares(stored: Iterable[tuple[str, int]]) -> tuple[tuple[PeerId, int], ...]:
    return tuple((peer_id_from_text(peer), int(weight)) for peer, weight in stored)
