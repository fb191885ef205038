"""Whom to ask first for a blob: who gave what it was asked for lately, before who did not.

This is one node's own experience. It changes in which order peers are asked, and never whether.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from braniac.protocol import limits
from braniac.protocol.identity import PeerId

_FAULTS_MAX = 16


class Holders:
    """Faults of holders, halved whenever they deliver."""

    def __init__(self) -> None:
        self._faults: OrderedDict[PeerId, int] = OrderedDict()  # the longest untouched first

    def in_order(self, holders: Iterable[PeerId]) -> list[PeerId]:
        """The same peers, those with the fewest faults first; of equals, the one named first."""
        return sorted(holders, key=lambda peer: self._faults.get(peer, 0))

    def failed(self, peer: PeerId) -> None:
        """It was not there, did not have it, was too slow, or sent something else."""
        self._faults[peer] = min(_FAULTS_MAX, self._faults.get(peer, 0) + 1)
        self._faults.move_to_end(peer)
        if len(self._faults) > limits.ROSTER_PEERS_MAX:
            self._faults.popitem(last=False)

    def delivered(self, peer: PeerId) -> None:
        """It gave what it was asked for."""
        if peer in self._faults:
            self._faults[peer] //= 2
