"""What seats have signed, as far as this peer has seen: two different verdicts on one slot convict the seat.

An owner that wants two updates for one slot needs its own signature under both, and each certificate goes to everybody.
A seat that has signed one of them signs no other (round.py), nor after a restart (standing.py), so whoever did lied.
"""

from __future__ import annotations

from braniac.protocol import limits
from braniac.protocol.identity import PeerId
from braniac.protocol.messages import Equivocation, SignedVerdict


class Witness:
    """The first verdict on each slot that each seat was seen to sign, while the slot may still change hands."""

    def __init__(self, final_slot: int) -> None:
        """Nothing can come of what was signed up to `final_slot`."""
        self._signed: dict[int, dict[PeerId, SignedVerdict]] = {}
        self._final_slot = final_slot

    def contradiction(self, signed: SignedVerdict) -> Equivocation | None:
        """The proof, if this seat was seen to sign something else for the same slot."""
        known = self._signed.get(signed.slot, {}).get(signed.peer)
        return Equivocation(known, signed) if known is not None and known.body != signed.body else None

    def note(self, signed: SignedVerdict) -> None:
        """Remember what a seat has signed: of each slot as many seats as could be, whatever certificates name."""
        if signed.slot > self._final_slot:
            of_slot = self._signed.setdefault(signed.slot, {})
            if len(of_slot) < limits.WITNESSED_SIGNERS_MAX:
                of_slot.setdefault(signed.peer, signed)

    def forget(self, final_slot: int) -> None:
        """Let go of what was signed up to a slot, which is final now."""
        self._final_slot = final_slot
        self._signed = {slot: signed for slot, signed in self._signed.items() if slot > final_slot}
