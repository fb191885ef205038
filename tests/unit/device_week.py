"""A week of a phone's life, made up from a seed: what its sensors would have said every minute.

Values hover around the thresholds on purpose, with noise far quicker than the dwell time, and sensors fail for a while.
Days have a shape: charged at night, used in the evening, warm at noon, at home on wifi, outside on mobile data.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta

from braniac.node.config import CapsSection, PolicySection
from braniac.node.sensors import Sample

SPACING_S = 60.0
SAMPLES = 7 * 24 * 60
BEGIN = datetime(2026, 11, 16)  # a Monday

POLICY = PolicySection(
    on_battery=True,
    battery_min_percent=40,
    battery_margin_percent=5,
    battery_max_celsius=38,
    cpu_max_celsius=75,
    only_idle=True,
    idle_s=300,
    others_cpu_max_percent=50,
    metered=False,
    schedule=("mon-fri 18:00-09:00", "sat,sun 00:00-24:00"),
    dwell_s=300,
)
CAPS = CapsSection(memory_mib=1000, disk_mib=2000, disk_free_min_mib=500, daily_mib=400)
_MIB = 1 << 20


def week(seed: int = 6) -> Iterator[tuple[float, Sample]]:
    """(seconds since the beginning, sample), in order."""
    rng = random.Random(seed)
    percent, used_s, daily = 60.0, 0.0, 0.0
    for number in range(SAMPLES):
        local = BEGIN + timedelta(seconds=number * SPACING_S)
        hour = local.hour + local.minute / 60
        plugged = hour < 6.5 or hour > 23 or (12 <= hour < 13 and rng.random() < 0.7)
        percent = min(100.0, max(5.0, percent + (0.35 if plugged else -0.085) + rng.gauss(0, 0.3)))
        used_s = 0.0 if rng.random() < (0.3 if 17 < hour < 22 else 0.01) else used_s + SPACING_S
        daily = 0.0 if local.hour == local.minute == 0 else daily + rng.random() * 0.8 * _MIB
        noon = max(0.0, 1 - abs(hour - 13) / 5)
        sample = Sample(
            local_time=local,
            plugged=plugged,
            battery_percent=percent,
            battery_celsius=30 + 8 * noon + rng.gauss(0, 1.5),
            cpu_celsius=60 + 14 * noon + rng.gauss(0, 4),
            others_cpu_percent=min(100.0, max(0.0, rng.gauss(45 if 8 < hour < 18 else 10, 15))),
            idle_s=used_s,
            metered=(8 < hour < 17) != (rng.random() < 0.1),
            disk_free_bytes=int((500 + 200 * noon - 100 + rng.gauss(0, 30)) * _MIB),
            disk_used_bytes=int((1900 + 100 * noon + rng.gauss(0, 40)) * _MIB),
            memory_bytes=int((900 + 100 * noon + rng.gauss(0, 30)) * _MIB),
            daily_bytes=int(daily),
        )
        if rng.random() < 0.02:
            sample = _without(sample, rng)
        yield number * SPACING_S, sample


def _without(sample: Sample, rng: random.Random) -> Sample:
    """The same with a sensor gone."""
    match rng.randrange(6):
        case 0:
            return replace(sample, plugged=None, battery_percent=None, battery_celsius=None)
        case 1:
            return replace(sample, cpu_celsius=None)
        case 2:
            return replace(sample, others_cpu_percent=None, idle_s=None)
        case 3:
            return replace(sample, metered=None)
        case 4:
            return replace(sample, disk_free_bytes=None, disk_used_bytes=None, memory_bytes=None)
        case _:
            return Sample()
