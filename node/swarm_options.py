"""What can be asked of `braniac-node swarm`. No settings of a node: no file, no environment, only flags."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from braniac.node.faults import Wish


@dataclass(frozen=True, kw_only=True)
class SwarmOptions:
    """One run of `braniac-node swarm`: daemons on this machine, and what is done to them on the way."""

    nodes: int
    """How many daemons."""
    tiers: tuple[int, ...]
    """Their tiers, dealt out in turn: node i has tiers[i % len(tiers)]."""
    seconds: float
    """How long to train after the last node joined."""
    faults: tuple[Wish, ...] = ()
    """What is done to them, in this order."""
    seed: int
    """Seed of the run, and of who is hit when."""
    preset: str
    """Model of the run."""
    slot_s: float
    """Slot length."""
    sets: tuple[str, ...]
    """`--set key=value` settings of every daemon."""
    keep_dir: Path | None
    """Keep state directories and logs here; None: a temporary folder, removed at the end."""
    json: bool
    """Print nothing but the JSON object on stdout."""

    def tier_of(self, index: int) -> int:
        """The tier of a node."""
        return self.tiers[index % len(self.tiers)]
