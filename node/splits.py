"""Times in which peers show different bytes of a fragment after the same last slot, and when that is a fault.

A moment of this is normal. Updates add up in any order, so a peer that comes back may hold the newest certificate
before an older one that it missed, or bring one that nobody else has: it heals when the other certificate has gone
round. A split that outlives a window does not heal by certificates, and means that somebody has lost one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol


class Shown(Protocol):
    """A peer's word on one fragment."""

    @property
    def fragment(self) -> int: ...
    @property
    def slot(self) -> int:
        """The last one merged into it."""

    @property
    def digest(self) -> bytes: ...


@dataclass
class Splits:
    """Follows splits from look to look."""

    window_s: float = 0.0
    """A split that lasts longer is a fault; set it before the first look at a run."""
    healed: int = 0
    lasting: int = 0
    """Splits that are over, by whether they outlived a window."""
    _longest_s: float = 0.0
    _since: dict[int, float] = field(default_factory=dict)
    _looked_at: float = 0.0

    def look(self, at: float, shown: Iterable[Shown]) -> None:
        """One look at all peers, at a moment in seconds."""
        self._looked_at = at
        digests: dict[tuple[int, int], set[bytes]] = defaultdict(set)
        for state in shown:
            digests[state.fragment, state.slot].add(state.digest)
        split = {fragment for (fragment, _), found in digests.items() if len(found) > 1}
        for fragment in split - self._since.keys():
            self._since[fragment] = at
        for fragment in self._since.keys() - split:
            lasted_s = at - self._since.pop(fragment)
            self._longest_s = max(self._longest_s, lasted_s)
            if lasted_s > self.window_s:
                self.lasting += 1
            else:
                self.healed += 1

    def open_s(self) -> list[float]:
        """How long each split has lasted that was there at the last look."""
        return [self._looked_at - since for since in self._since.values()]

    def figures(self) -> dict[str, Any]:
        """Splits that outlived a window, the others, and the longest, those that are still there among them."""
        open_s = self.open_s()
        lasting = sum(lasted_s > self.window_s for lasted_s in open_s)
        return {
            "disagreements": self.lasting + lasting,
            "disagreements_healed": self.healed + len(open_s) - lasting,
            "disagreement_s_max": round(max([self._longest_s, *open_s]), 3),
        }
