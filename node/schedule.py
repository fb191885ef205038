"""Weekly hours such as "mon-fri 20:00-06:00": read, checked, and asked whether a local time is in them.

A window belongs to the day it begins on; one that ends at or before its beginning ends on the next day. 24:00 is the
end of a day. Without days it holds on every day.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
DAY_MINUTES = 24 * 60
WEEK_MINUTES = 7 * DAY_MINUTES

_WINDOW = re.compile(r"(?:(?P<days>[a-z,\s-]+?)\s+)?(?P<from>\d{1,2}:\d{2})\s*-\s*(?P<to>\d{1,2}:\d{2})")
_WANTED = 'hours such as "mon-fri 20:00-06:00" or "sat,sun 00:00-24:00"'


@dataclass(frozen=True)
class Window:
    """Hours of some days of the week, in minutes."""

    days: frozenset[int]
    """On which it begins; Monday is 0."""
    begin: int
    """Minutes after midnight."""
    length: int
    """Minutes, at most a whole day."""

    def contains(self, minute: float) -> bool:
        """Whether a minute of the week (Monday 00:00 is 0) is in it."""
        return any((minute - self._start(day)) % WEEK_MINUTES < self.length for day in self.days)

    def minutes_until(self, minute: float) -> float:
        """From a minute of the week to the next beginning, at most a week."""
        return min((self._start(day) - minute) % WEEK_MINUTES for day in self.days)

    def _start(self, day: int) -> int:
        return day * DAY_MINUTES + self.begin


def parse_window(text: str) -> Window:
    """Read one window. Raises ValueError, which says what was expected."""
    match = _WINDOW.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(_WANTED)
    begin, end = _minutes(match["from"]), _minutes(match["to"])
    if begin in (end, DAY_MINUTES):
        raise ValueError(f"{_WANTED}; this one has no length, all day is 00:00-24:00")
    return Window(_days(match["days"]), begin, (end - begin) % DAY_MINUTES or DAY_MINUTES)


def join_days(items: Sequence[str]) -> list[str]:
    """Put together again what was cut at its commas: "sat", "sun 00:00-24:00"."""
    joined: list[str] = []
    days: list[str] = []
    for item in items:
        days.append(item)
        if any(letter.isdigit() for letter in item):
            joined.append(",".join(days))
            days = []
    return joined + days


def is_open(windows: Iterable[Window], local: datetime) -> bool:
    """Whether a local time is in any of the windows."""
    return any(window.contains(_minute_of_week(local)) for window in windows)


def seconds_until_open(windows: Iterable[Window], local: datetime) -> float:
    """From a local time to the next beginning of a window. A change of the clocks in between is not counted."""
    return 60 * min(window.minutes_until(_minute_of_week(local)) for window in windows)


def _minute_of_week(local: datetime) -> float:
    day_minutes = local.hour * 60 + local.minute + (local.second + local.microsecond / 1e6) / 60
    return local.weekday() * DAY_MINUTES + day_minutes


def _minutes(text: str) -> int:
    hours, minutes = map(int, text.split(":"))
    total = 60 * hours + minutes
    if minutes > 59 or total > DAY_MINUTES:
        raise ValueError(f"{_WANTED}; {text} is no time of the day")
    return total


def _days(text: str | None) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    days: set[int] = set()
    for part in text.split(","):
        first, dash, last = (name.strip() for name in part.partition("-"))
        if first not in DAYS or (dash and last not in DAYS):
            raise ValueError(f"{_WANTED}; the days are {', '.join(DAYS)}")
        begin, end = DAYS.index(first), DAYS.index(last or first)
        days.update(day % 7 for day in range(begin, end + 1 if end >= begin else end + 8))
    return frozenset(days)
