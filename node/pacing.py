"""How fast contributions and updates go out: evenly, so that no second is much busier than another.

A slot asks much of some peers and nothing of others, and in the next slot it is the other way round. Whoever sends at a
little over its own average is done all the same, a slot later, and nobody's call stutters because a slot began. Anchors
for newcomers are not held back, nor are messages. It is for the owner of a link to choose (`caps.upload_pace`): where
all do, updates take a slot per level of their tree, and nobody has to spare what those do not send who send nothing.
"""

from __future__ import annotations

from braniac.node.costs import contribution_bytes, full_bytes, update_bytes
from braniac.node.throttle import Throttle
from braniac.protocol.manifest import Manifest

_SWIFT = 4.0
"""In one slot so many contributions of the largest fragment can leave: each in a quarter of it, also in a swarm of two,
in which the average is one."""


def paced_bytes_per_slot(manifest: Manifest, tier: int, peers: int, pace: float) -> float:
    """What a node sends of contributions and updates in a slot at most; 0, which bounds nothing, if it is alone.

    `pace`: times the average. At 1.5, what has piled up in a busy slot is gone after two.
    """
    if peers < 2 or not pace:
        return 0.0
    held = manifest.held(tier)
    contributed = sum(contribution_bytes(manifest, fragment, peers) for fragment in held)
    updated = sum(update_bytes(manifest, fragment, peers) for fragment in held)
    largest = max(full_bytes(manifest.fragments[fragment].layout, manifest.up) for fragment in held)
    return max(pace * (contributed + updated) / manifest.window, _SWIFT * largest)


class Pacing:
    """Sets the pace of one node's throttle as the swarm grows and shrinks."""

    def __init__(self, throttle: Throttle, manifest: Manifest, tier: int, pace: float) -> None:
        self._throttle = throttle
        self._manifest = manifest
        self._tier = tier
        self._pace = pace
        self._peers = 0
        throttle.first_bytes_max = max(map(manifest.contribution_bytes_max, manifest.held(tier)))

    def follow(self, peers: int) -> None:
        """There are so many live `peers` now, this one included."""
        if peers != self._peers:
            self._peers = peers
            per_slot = paced_bytes_per_slot(self._manifest, self._tier, peers, self._pace)
            self._throttle.pace.rate = per_slot / self._manifest.slot_s
