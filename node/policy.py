"""When to rest: decisions from samples of the sensors, without any clock or sensor of its own."""

from __future__ import annotations

from dataclasses import dataclass

from braniac.node.sensors import Sample


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason to rest."""

    code: str
    sentence: str
    since_s: float
    """On the monotonic clock."""
    until_s: float | None = None
    """On the monotonic clock, if it is known when it ends."""


class Policy:
    """What the settings say about a sample."""

    def decide(self, sample: Sample, now: float) -> tuple[Reason, ...]:
        """Every reason to rest that holds at `now`, a time of the monotonic clock."""
        return ()
