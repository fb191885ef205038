"""When to rest: decisions from samples of the sensors, without any clock or sensor of its own.

Every gate has two thresholds, one to rest and one to go on, and keeps whatever it says for the dwell time. A sensor
that is missing never rests the node. Of all gates that are shut each one is told, with its value and its limit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from braniac.node import schedule
from braniac.node.config import CapsSection, PolicySection
from braniac.node.sensors import Sample

CODES = (
    "on_battery",
    "battery_low",
    "battery_hot",
    "cpu_hot",
    "user_active",
    "others_cpu",
    "metered",
    "schedule",
    "disk_free",
    "disk",
    "memory",
    "quota",
)

_MIB = 1 << 20
_OTHERS_SHARE = 0.8  # of the limit: others must use less than that before the node goes on
_DISK_FREE_SHARE = 1.1  # of the least free space: so much must be free
_USED_SHARE = 0.95  # of a cap on disk or memory: no more than that may be used


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason to rest."""

    code: str
    sentence: str
    since_s: float
    """On the monotonic clock."""
    until_s: float | None = None
    """On the monotonic clock, if it is known when it ends."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a gate sees in one sample."""

    rest: bool
    """Beyond the threshold to rest."""
    go_on: bool
    """Beyond the threshold to go on; between the two a gate stays as it is."""
    sentence: str
    wait_s: float | None = None
    """Until it ends, if that is known."""


Look = Callable[[Sample], Reading | None]
"""What a gate sees; None if its sensor is missing."""


class Gate:
    """One reason to rest, shut or open."""

    def __init__(self, code: str, look: Look, dwell_s: float) -> None:
        self.code = code
        self._look = look
        self._dwell_s = dwell_s
        self._shut = False
        self._changed_s = -math.inf
        self._sentence = ""

    def decide(self, sample: Sample, now: float) -> Reason | None:
        """The reason, if the gate is shut at `now`."""
        reading = self._look(sample)
        # A sensor that went away takes its reason along, but not faster than any other change.
        toggles = reading.rest if reading and not self._shut else (reading is None or reading.go_on) and self._shut
        if toggles and now - self._changed_s >= self._dwell_s:
            self._shut, self._changed_s = not self._shut, now
        if not self._shut:
            return None
        self._sentence = reading.sentence if reading else self._sentence
        wait_s = reading.wait_s if reading else None
        return Reason(self.code, self._sentence, self._changed_s, None if wait_s is None else now + wait_s)


class Policy:
    """What the settings say about a sample."""

    def __init__(self, policy: PolicySection | None = None, caps: CapsSection | None = None) -> None:
        """Only what is bounded has a gate."""
        policy, caps = policy or PolicySection(), caps or CapsSection()
        looks = {**_power_looks(policy), **_use_looks(policy), **_caps_looks(caps)}
        assert set(looks) <= set(CODES)
        self._gates = [Gate(code, looks[code], policy.dwell_s) for code in CODES if code in looks]

    def decide(self, sample: Sample, now: float) -> tuple[Reason, ...]:
        """Every reason to rest that holds at `now`, a time of the monotonic clock; call it with growing times."""
        found = [gate.decide(sample, now) for gate in self._gates]
        return tuple(reason for reason in found if reason is not None)


def _power_looks(policy: PolicySection) -> dict[str, Look]:
    """Battery and temperatures."""

    def on_battery(sample: Sample) -> Reading | None:
        if sample.plugged is None:
            return None
        return Reading(not sample.plugged, sample.plugged, "the device runs on its battery: waiting for a charger")

    def battery_low(sample: Sample) -> Reading | None:
        if sample.battery_percent is None or sample.plugged is None:
            return None
        limit = policy.battery_min_percent
        enough = min(100.0, limit + policy.battery_margin_percent)
        return Reading(
            not sample.plugged and sample.battery_percent < limit,
            sample.plugged or sample.battery_percent >= enough,
            f"the battery is at {sample.battery_percent:.0f}%, the least is {limit:g}%: "
            f"waiting for {enough:g}% or a charger",
        )

    looks: dict[str, Look] = {
        "battery_low": battery_low,
        "battery_hot": _hot(
            "battery", lambda sample: sample.battery_celsius, policy.battery_max_celsius, policy.celsius_margin
        ),
        "cpu_hot": _hot("processor", lambda sample: sample.cpu_celsius, policy.cpu_max_celsius, policy.celsius_margin),
    }
    return looks if policy.on_battery else {"on_battery": on_battery, **looks}


def _hot(part: str, celsius: Callable[[Sample], float | None], limit: float, margin: float) -> Look:
    def look(sample: Sample) -> Reading | None:
        if (value := celsius(sample)) is None:
            return None
        sentence = f"the {part} has {value:.1f} °C, the most is {limit:g} °C: waiting for {limit - margin:g} °C"
        return Reading(value > limit, value <= limit - margin, sentence)

    return look


def _use_looks(policy: PolicySection) -> dict[str, Look]:
    """Who else uses the device, its network, and at which hours."""
    windows = tuple(schedule.parse_window(text) for text in policy.schedule)

    def user_active(sample: Sample) -> Reading | None:
        if sample.idle_s is None:
            return None
        sentence = (
            f"somebody used the device {sample.idle_s:.0f} s ago: waiting until nobody has for {policy.idle_s:g} s"
        )
        return Reading(sample.idle_s < policy.idle_s, sample.idle_s >= policy.idle_s, sentence)

    def others_cpu(sample: Sample) -> Reading | None:
        if sample.others_cpu_percent is None:
            return None
        limit = policy.others_cpu_max_percent
        sentence = (
            f"other programs use {sample.others_cpu_percent:.0f}% of the processor, the most is {limit:g}%: "
            f"waiting for {limit * _OTHERS_SHARE:g}%"
        )
        return Reading(sample.others_cpu_percent > limit, sample.others_cpu_percent <= limit * _OTHERS_SHARE, sentence)

    def metered(sample: Sample) -> Reading | None:
        if sample.metered is None:
            return None
        return Reading(sample.metered, not sample.metered, "the connection is metered: waiting for one that is not")

    def hours(sample: Sample) -> Reading | None:
        if sample.local_time is None:
            return None
        is_open = schedule.is_open(windows, sample.local_time)
        wait_s = None if is_open else schedule.seconds_until_open(windows, sample.local_time)
        begins = sample.local_time + timedelta(seconds=wait_s or 0)
        sentence = (
            f"{sample.local_time:%a %H:%M} is outside the hours to work in ({'; '.join(policy.schedule)}): "
            f"they begin {begins:%a %H:%M}"
        )
        return Reading(not is_open, is_open, sentence, wait_s)

    looks: dict[str, Look] = {}
    if policy.only_idle:
        looks["user_active"] = user_active
    if policy.others_cpu_max_percent < 100:
        looks["others_cpu"] = others_cpu
    if not policy.metered:
        looks["metered"] = metered
    if windows:
        looks["schedule"] = hours
    return looks


def _caps_looks(caps: CapsSection) -> dict[str, Look]:
    """What the owner lets the node take."""

    def disk_free(sample: Sample) -> Reading | None:
        if (free := sample.disk_free_bytes) is None:
            return None
        limit = caps.disk_free_min_mib * _MIB
        sentence = (
            f"{free / _MIB:,.0f} MiB of the disk are free, the least is {caps.disk_free_min_mib:,} MiB: free some space"
        )
        return Reading(free < limit, free >= limit * _DISK_FREE_SHARE, sentence)

    def quota(sample: Sample) -> Reading | None:
        if (used := sample.daily_bytes) is None:
            return None
        sentence = (
            f"{used / _MIB:,.1f} MiB were exchanged today, the most is {caps.daily_mib:,g} MiB: waiting for midnight"
        )
        over = used >= caps.daily_mib * _MIB
        wait_s = _seconds_to_midnight(sample.local_time) if over and sample.local_time else None
        return Reading(over, not over, sentence, wait_s)

    looks: dict[str, Look] = {}
    if caps.disk_free_min_mib:
        looks["disk_free"] = disk_free
    if caps.disk_mib:
        looks["disk"] = _used("the state directory", "caps.disk_mib", lambda s: s.disk_used_bytes, caps.disk_mib)
    if caps.memory_mib:
        looks["memory"] = _used("this node's memory", "caps.memory_mib", lambda s: s.memory_bytes, caps.memory_mib)
    if caps.daily_mib:
        looks["quota"] = quota
    return looks


def _used(what: str, key: str, used_bytes: Callable[[Sample], int | None], limit_mib: int) -> Look:
    limit = limit_mib * _MIB

    def look(sample: Sample) -> Reading | None:
        if (used := used_bytes(sample)) is None:
            return None
        sentence = f"{what} takes {used / _MIB:,.0f} MiB, the most is {limit_mib:,} MiB: raise {key} to go on"
        return Reading(used > limit, used <= limit * _USED_SHARE, sentence)

    return look


def _seconds_to_midnight(local: datetime) -> float:
    """A change of the clocks in between is not counted."""
    midnight = datetime.combine(local.date() + timedelta(days=1), datetime.min.time())
    return (midnight - local.replace(tzinfo=None)).total_seconds()
