"""Whom to ask first for a blob: who gave what it was asked for lately, before who did not.

This is one node's own experience. It changes in which order peers are asked, and never whether.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from braniac.node.clock import Clock
from braniac.protocol import limits
from braniac.protocol.identity import PeerId

_FAULTS_MAX = 16
_FORGIVEN_S = 600.0  # a peer without a new fault for so long has none: who is never asked can never make up for one


class Holders:
    """Faults of holders, halved whenever they deliver."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._faults: OrderedDict[PeerId, tuple[int, float]] = OrderedDict()
        """How many, and when the last one was; the longest untouched first."""

    def in_order(self, holders: Iterable[PeerId]) -> list[PeerId]:
        """The same peers, those with the fewest faults first; of equals, the one named first."""
        return sorted(holders, key=self._count)

    def failed(self, peer: PeerId) -> None:
        """It was not there, did not have it, was too slow, or sent something else."""
        self._faults[peer] = min(_FAULTS_MAX, self._count(peer) + 1), self._clock.monotonic()
        self._faults.move_to_end(peer)
        if len(self._faults) > limits.ROSTER_PEERS_MAX:
            self._faults.popitem(last=False)

    def delivered(self, peer: PeerId) -> None:
        """It gave what it was asked for."""
        if peer in self._faults:
            count, at_s = self._faults[peer]
            self._faults[peer] = count // 2, at_s

    def _count(self, peer: PeerId) -> int:
        count, at_s = self._faults.get(peer, (0, 0.0))
        return count if self._clock.monotonic() - at_s < _FORGIVEN_S else 0
