"""Time: the machine's clock, a fake one for tests, and the swarm's, which the peers keep together without a leader.

Swarm time is the local monotonic clock plus an offset. The offset follows the median of what heartbeats to other peers
show, sampled as NTP does (RFC 5905, section 8), so a minority of liars cannot move it beyond what honest peers say.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from braniac.protocol.identity import PeerId

RTT_S_MAX = 2.0  # a slower exchange says too little about the offset
SAMPLES_MAX = 8  # per peer, as in NTP's clock filter
PEERS_MAX = 256
FORGET_S = 600.0  # a peer not heard for this long has no vote
SLEW_S_MAX = 0.05  # offset change per call of `adjust`
STEP_S_MIN = 1.0  # further away than this there is no point in slewing
STEP_AFTER = 2 * SAMPLES_MAX  # calls of `adjust` that find it so: no sample is from before the first of them


class Clock(Protocol):
    """Seconds, twice."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment; never jumps."""

    def wall(self) -> float:
        """Seconds since 1970, as far as this machine knows; may be wrong by hours, and jump."""


_UPTIME: int | None = getattr(time, "CLOCK_BOOTTIME", None)


class SystemClock:
    """The machine's clock."""

    def monotonic(self) -> float:
        """See Clock. On Linux time.monotonic() stands still while a phone or laptop sleeps, and slots do not."""
        return time.monotonic() if _UPTIME is None else time.clock_gettime(_UPTIME)

    def wall(self) -> float:
        """See Clock."""
        return time.time()


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self, monotonic_s: float = 1000.0, wall_s: float = 1_700_000_000.0) -> None:
        self._monotonic_s = monotonic_s
        self._wall_s = wall_s

    def monotonic(self) -> float:
        """See Clock."""
        return self._monotonic_s

    def wall(self) -> float:
        """See Clock."""
        return self._wall_s

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks."""
        assert seconds >= 0, "time does not run backwards"
        self._monotonic_s += seconds
        self._wall_s += seconds

    def set_wall(self, wall_s: float) -> None:
        """Set the wall clock, as a user or a time server may."""
        self._wall_s = wall_s


@dataclass(frozen=True)
class _Sample:
    rtt_s: float
    offset_s: float  # the peer's swarm time minus our monotonic time
    at_s: float  # monotonic


class SwarmClock:
    """Swarm time in seconds, monotone, near Unix time."""

    def __init__(self, clock: Clock, offset_s: float | None = None) -> None:
        """Start at `offset_s` from the monotonic clock; at the wall clock if None."""
        self._clock = clock
        self._offset_s = clock.wall() - clock.monotonic() if offset_s is None else offset_s
        self._latest_s = -math.inf
        self._samples: dict[PeerId, deque[_Sample]] = {}  # the peer heard longest ago first
        self._astray = 0
        """How often in a row `adjust` has found itself further off than slewing is for."""

    @property
    def offset_s(self) -> float:
        """What is added to the monotonic clock."""
        return self._offset_s

    @property
    def peers(self) -> int:
        """How many peers have a vote."""
        return len(self._samples)

    def now(self) -> float:
        """Swarm time in seconds; stands still rather than go back."""
        self._latest_s = max(self._latest_s, self.belief())
        return self._latest_s

    def belief(self) -> float:
        """What others are told: the time without the standing still, which would hold them back too."""
        return self._clock.monotonic() + self._offset_s

    def observe(
        self, peer: PeerId, their_time_s: float, sent_at_monotonic: float, received_at_monotonic: float
    ) -> bool:
        """Note the swarm time a peer put in its reply to a request of ours; whether it counts.

        A reply that took over RTT_S_MAX, or a time that is not a finite number, does not.
        """
        rtt_s = received_at_monotonic - sent_at_monotonic
        assert rtt_s >= 0, "the reply came before the request"
        if rtt_s > RTT_S_MAX or not math.isfinite(their_time_s):
            return False
        samples = self._samples.pop(peer, None) or deque(maxlen=SAMPLES_MAX)
        samples.append(_Sample(rtt_s, their_time_s + rtt_s / 2 - received_at_monotonic, received_at_monotonic))
        self._samples[peer] = samples
        if len(self._samples) > PEERS_MAX:
            del self._samples[next(iter(self._samples))]
        return True

    def forget(self, peer: PeerId) -> None:
        """Take a peer's vote away."""
        self._samples.pop(peer, None)

    def adjust(self) -> float:
        """Move the offset towards the median of our own and the peers', by at most SLEW_S_MAX; returns the move.

        Whoever started while nobody answered may be an hour off, which slewing would take weeks to mend: a large
        distance that persists is covered at once, as ntpd does after its stepout time. `now` stands still if that is
        a way back.
        """
        wanted_s = statistics.median([0.0, *(offset_s - self._offset_s for offset_s in self._peer_offsets())])
        self._astray = self._astray + 1 if abs(wanted_s) > STEP_S_MIN else 0
        if self._astray > STEP_AFTER:
            move_s, self._astray = wanted_s, 0
        else:
            move_s = max(-SLEW_S_MAX, min(SLEW_S_MAX, wanted_s))
        self._offset_s += move_s
        return move_s

    def set(self, now_s: float) -> None:
        """Start anew at `now_s`: for the moment of resuming, before anything was timed by this clock."""
        self._offset_s = now_s - self._clock.monotonic()
        self._latest_s = -math.inf

    def step(self) -> float:
        """Take the peers' median at once, backwards too; returns the move.

        For the moment of joining only, when nothing was yet timed by this clock: a newcomer's own clock has no vote.
        """
        offsets_s = self._peer_offsets()
        if not offsets_s:
            return 0.0
        move_s = statistics.median(offsets_s) - self._offset_s
        self._offset_s += move_s
        self._latest_s = -math.inf
        return move_s

    def spread_s(self) -> float:
        """How far the swarm clock of a peer heard lately is from the median of theirs, at most."""
        offsets_s = self._peer_offsets()
        middle_s = statistics.median(offsets_s) if offsets_s else 0.0
        return max((abs(offset_s - middle_s) for offset_s in offsets_s), default=0.0)

    def _peer_offsets(self) -> list[float]:
        """The offset of each peer heard lately: of its recent samples the last with the shortest round trip."""
        oldest_s = self._clock.monotonic() - FORGET_S
        self._samples = {peer: samples for peer, samples in self._samples.items() if samples[-1].at_s >= oldest_s}
        return [min(reversed(samples), key=lambda sample: sample.rtt_s).offset_s for samples in self._samples.values()]
