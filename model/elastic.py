"""Choosing a width for each request: narrower models when requests queue up, the widest when nobody waits.

The controller is a plain object. It reads no clock (`now` is passed in), holds no model and has no randomness, so a
recorded day of requests replays to the same choices. It moves by one width at a time, and only if three things agree:

* A threshold. There are two per direction, and between the directions a band in which nothing changes (hysteresis, as
  in a Schmitt trigger). The inner pair also asks how hard the text is, by the entropy of the model's last predictions:
  a short queue sends only easy text to a narrower model, and brings only hard text back. The outer pair does not ask.

      0 .. quiet         wider     whatever the text
      .. calm            wider     if the text is hard
      between            stay
      busy ..            narrower  if the text is easy
      flooded ..         narrower  whatever the text

* The dwell time. It must have passed since the last switch.
* The gain. What the switch saves must exceed what it costs, both in seconds of waiting. A width costs the length of the
  queue times its seconds per request, plus its loss times what a nat is worth; a switch costs the work that it throws
  away, such as a KV cache that another width cannot use. An empty queue is exempt: nobody is there to wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from braniac.model.errors import ConfigError, ModelError


@dataclass(frozen=True, kw_only=True, slots=True)
class WidthCost:
    """What one width costs, as measured on this machine."""

    width: int
    """FFN neurons in use."""

    seconds: float
    """Time for one typical request."""

    loss: float
    """Held-out loss, nats per token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ElasticSettings:
    """When to change the width. Raises ConfigError for values that contradict each other."""

    quiet: int = 0
    """Requests waiting, up to which any text goes to a wider model."""

    calm: int = 2
    """Requests waiting, up to which hard text goes to a wider model."""

    busy: int = 4
    """Requests waiting, from which easy text goes to a narrower model."""

    flooded: int = 8
    """Requests waiting, from which any text goes to a narrower model."""

    easy_entropy: float = 1.0
    """Nats: text whose last predictions have at most this entropy on average is easy."""

    hard_entropy: float = 2.0
    """Nats: text whose last predictions have at least this entropy on average is hard."""

    dwell_seconds: float = 5.0
    """Shortest time between two switches."""

    switch_seconds: float = 0.1
    """Work that a switch throws away."""

    seconds_per_nat: float = 1.0
    """Seconds of waiting, summed over the queue, that one nat per token of lower loss is worth."""

    def __post_init__(self) -> None:
        if not 0 <= self.quiet <= self.calm < self.busy <= self.flooded:
            raise ConfigError(
                f"the queue thresholds are quiet {self.quiet}, calm {self.calm}, busy {self.busy}, flooded "
                f"{self.flooded}: they must rise from 0, with calm below busy."
            )
        if not 0 <= self.easy_entropy < self.hard_entropy:
            raise ConfigError(
                f"easy_entropy is {self.easy_entropy!r} and hard_entropy {self.hard_entropy!r}: "
                "give two numbers from 0, the second larger."
            )
        for name in ("dwell_seconds", "switch_seconds", "seconds_per_nat"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: give a finite number from 0.")


class Demand(StrEnum):
    """What the queue and the text ask for."""

    WIDER_QUIET = "the queue is short enough for a wider model"
    WIDER_HARD = "the text is hard and the queue bearable"
    STAY = "neither direction's threshold is reached"
    NARROWER_EASY = "the text is easy and the queue long"
    NARROWER_FLOODED = "the queue is too long for this width"


class Hold(StrEnum):
    """Why a demand was not followed."""

    BOUND = "there is no width further in that direction"
    DWELL = "the last switch is not long enough ago"
    COST = "the gain does not exceed the cost of switching"


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One request's width and why."""

    width: int
    previous: int
    """The width before this request; another one than `width` if this decision switched."""
    demand: Demand
    held: Hold | None
    """What kept the width although another was demanded; None if it switched or none was demanded."""
    gain: float | None
    """Seconds of waiting that the demanded switch saves, before its cost; None if there is none to make."""
    now: float
    queue: int
    entropy: float | None


class ElasticController:
    """Chooses widths for one model, starting with the widest. `width` is the current one."""

    def __init__(self, costs: Sequence[WidthCost], settings: ElasticSettings | None = None) -> None:
        """Raises ConfigError unless there is a width, and each wider one takes longer."""
        self.settings = settings or ElasticSettings()
        self._costs = tuple(sorted(costs, key=lambda cost: cost.width))
        if not self._costs or not all(c.width > 0 and math.isfinite(c.seconds + c.loss) for c in self._costs):
            raise ConfigError("some width, time or loss is missing or not finite: measure at least one width.")
        for narrow, wide in zip(self._costs, self._costs[1:], strict=False):
            if not (narrow.width < wide.width and narrow.seconds < wide.seconds):
                raise ConfigError(
                    f"width {wide.width} takes {wide.seconds:g} s per request and width {narrow.width} "
                    f"{narrow.seconds:g} s: name each width once and leave out those no faster than a wider one."
                )
        self._place = len(self._costs) - 1
        self._switched_at = -math.inf

    @property
    def width(self) -> int:
        """FFN neurons that the last decision chose."""
        return self._costs[self._place].width

    def decide(self, now: float, queue: int, entropy: float | None = None) -> Decision:
        """Choose the width for a request.

        `now` is in seconds of a clock that never goes back; `queue` counts the requests that wait for the model;
        `entropy` is the mean over the last predicted tokens in nats, None if unknown, which is neither easy nor hard.
        Raises ModelError, with everything as before, for a negative queue or an entropy that is negative or not finite.
        """
        if queue < 0 or (entropy is not None and not 0 <= entropy < math.inf) or not math.isfinite(now):
            raise ModelError(
                f"now {now}, queue {queue}, entropy {entropy}: give a finite time and counts and nats that are from 0."
            )
        previous, demand, target = self.width, *self._demand(queue, entropy)
        gain, held = None, None
        if target is not None and not 0 <= target < len(self._costs):
            held = Hold.BOUND
        elif target is not None:
            gain = self._cost(self._place, queue) - self._cost(target, queue)
            if now - self._switched_at < self.settings.dwell_seconds:
                held = Hold.DWELL
            elif queue > 0 and gain <= self.settings.switch_seconds:
                held = Hold.COST
            else:
                self._place, self._switched_at = target, now
        return Decision(
            width=self.width,
            previous=previous,
            demand=demand,
            held=held,
            gain=gain,
            now=now,
            queue=queue,
            entropy=entropy,
        )

    def _demand(self, queue: int, entropy: float | None) -> tuple[Demand, int | None]:
        """What is asked for and the place in `_costs` it leads to, which may not exist; None to stay."""
        settings = self.settings
        if queue <= settings.quiet:
            return Demand.WIDER_QUIET, self._place + 1
        if queue >= settings.flooded:
            return Demand.NARROWER_FLOODED, self._place - 1
        if entropy is not None and queue <= settings.calm and entropy >= settings.hard_entropy:
            return Demand.WIDER_HARD, self._place + 1
        if entropy is not None and queue >= settings.busy and entropy <= settings.easy_entropy:
            return Demand.NARROWER_EASY, self._place - 1
        return Demand.STAY, None

    def _cost(self, place: int, queue: int) -> float:
        """Seconds: of waiting for this width, and what its loss is worth."""
        return queue * self._costs[place].seconds + self.settings.seconds_per_nat * self._costs[place].loss
