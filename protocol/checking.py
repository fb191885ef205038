"""Which proposals a seat merges again before it signs: all small ones, and of large ones as many as cost as much.

Nobody can tell which: lots are drawn from signatures that only this peer can make, and that it shows nobody.
"""

from __future__ import annotations

import hashlib

from braniac.protocol import limits
from braniac.protocol.identity import Identity, PeerId
from braniac.protocol.messages import Verdict


class Checking:
    """One seat's eye on owners."""

    def __init__(self, identity: Identity, run_id: bytes) -> None:
        self._identity = identity
        self._run_id = run_id
        self._distrusted: dict[PeerId, int] = {}
        """Owners that proposed a wrong merge, and for which slot."""

    def looks_at(self, verdict: Verdict) -> bool:
        """Whether this proposal is to be merged again."""
        count = len(verdict.commitments)
        if count <= limits.CHECKED_CONTRIBUTIONS or verdict.owner in self._distrusted:
            return True
        secret = self._identity.sign(b"check", self._run_id + verdict.slot.to_bytes(8))
        lot = int.from_bytes(hashlib.sha256(secret).digest()[:8])
        return lot * count < limits.CHECKED_CONTRIBUTIONS << 64

    def distrust(self, owner: PeerId, slot: int) -> None:
        """This owner has lied about `slot`: whatever it proposes is merged again from now on."""
        if len(self._distrusted) >= limits.DISTRUSTED_MAX:
            del self._distrusted[next(iter(self._distrusted))]
        self._distrusted[owner] = slot
