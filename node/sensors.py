"""What the device says about itself: battery, temperatures, use by others, network, disk, memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One look; None is a sensor that is not there, which is never a reason to rest."""


class Sensors:
    """Looks when asked."""

    def sample(self) -> Sample:
        """One look. It may take a while: call it from a thread."""
        return Sample()
