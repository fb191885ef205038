"""What the device says about itself: battery, temperatures, use by others, network, disk, memory.

A sensor that is missing or fails is None, whatever the reason. What is quick is read at every look, what needs a
program or a walk through the state directory at most once a minute.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import structlog

from braniac.node import probes
from braniac.node.clock import Clock, SystemClock

log = structlog.get_logger(__name__)

_SLOW_S = 60.0  # between two looks that cost more than reading a few small files
_PROGRAM_S = 5.0
_TERMUX = "termux-battery-status"

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One look; None is a sensor that is not there, which is never a reason to rest."""

    local_time: datetime | None = None
    """By the wall clock, in the device's time zone."""
    plugged: bool | None = None
    """Whether a charger is connected."""
    battery_percent: float | None = None
    battery_celsius: float | None = None
    cpu_celsius: float | None = None
    others_cpu_percent: float | None = None
    """Share of all cores that other programs used since the last look."""
    idle_s: float | None = None
    """Since the last input that could be seen."""
    metered: bool | None = None
    """Whether the connection is paid by the byte."""
    disk_free_bytes: int | None = None
    """On the file system of the state directory."""
    disk_used_bytes: int | None = None
    """By the state directory."""
    memory_bytes: int | None = None
    """Resident, of this process and its children."""
    daily_bytes: int | None = None
    """Exchanged with peers since local midnight."""


def local_time(wall_s: float) -> datetime:
    """Seconds since 1970 as the clock on the wall shows them."""
    return datetime.fromtimestamp(wall_s).astimezone()


def run_program(arguments: Sequence[str]) -> str | None:
    """Its output; None if it is not installed, fails, or takes too long."""
    program = shutil.which(arguments[0])
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROGRAM_S,
            env={**os.environ, "LC_ALL": "C"},
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


class Sensors:
    """Looks when asked. Not for two threads at a time."""

    def __init__(
        self,
        state_dir: Path | None = None,
        clock: Clock | None = None,
        daily_bytes: Callable[[], int] | None = None,
        *,
        root: Path = Path("/"),
        run: probes.RunProgram = run_program,
        pid: int | None = None,
        local: Callable[[float], datetime] = local_time,
    ) -> None:
        """`root` holds the trees sys, proc and dev; `daily_bytes` counts what was exchanged with peers today."""
        self._state_dir = state_dir
        self._clock = clock or SystemClock()
        self._daily_bytes = daily_bytes
        self._sys, self._proc, self._dev = root / "sys", root / "proc", root / "dev"
        self._run = run
        self._pid = os.getpid() if pid is None else pid
        self._local = local
        self._cpu: probes.CpuTimes | None = None
        self._interrupts: int | None = None
        self._input_s: float | None = None  # when interrupts changed last, on the monotonic clock
        self._slow: dict[str, tuple[float, object]] = {}
        self._silent: set[str] = set()

    def sample(self) -> Sample:
        """One look. It may take a while: call it from a thread."""
        battery = self._ask("battery", self._battery) or probes.Battery()
        pids = self._ask("processes", lambda: probes.own_processes(self._proc, self._pid)) or [self._pid]
        return Sample(
            local_time=self._ask("local_time", lambda: self._local(self._clock.wall())),
            plugged=battery.plugged,
            battery_percent=battery.percent,
            battery_celsius=battery.celsius,
            cpu_celsius=self._ask("cpu_celsius", lambda: probes.cpu_celsius(self._sys)),
            others_cpu_percent=self._ask("others_cpu_percent", lambda: self._others_cpu(pids)),
            idle_s=self._ask("idle_s", self._idle),
            metered=self._seldom("metered", lambda: probes.metered(self._proc, self._run)),
            disk_free_bytes=self._ask("disk_free_bytes", self._disk_free),
            disk_used_bytes=self._seldom("disk_used_bytes", self._disk_used),
            memory_bytes=self._ask("memory_bytes", lambda: probes.memory_bytes(self._proc, pids) or None),
            daily_bytes=self._ask("daily_bytes", self._daily_bytes) if self._daily_bytes else None,
        )

    def _ask(self, name: str, sensor: Callable[[], _Value]) -> _Value | None:
        """What a sensor says; whatever goes wrong with it, it is only missing."""
        try:
            value = sensor()
        except Exception as error:  # drivers, programs and foreign kernels fail in any way they like
            if name not in self._silent:
                self._silent.add(name)
                log.debug("a sensor does not work", sensor=name, reason=repr(error))
            return None
        self._silent.discard(name)
        return value

    def _seldom(self, name: str, sensor: Callable[[], _Value]) -> _Value | None:
        """The same, with an answer that is up to a minute old."""
        now = self._clock.monotonic()
        asked_s, value = self._slow.get(name, (None, None))
        if asked_s is None or now - asked_s >= _SLOW_S:
            value = self._ask(name, sensor)
            self._slow[name] = (now, value)
        return value  # type: ignore[return-value]

    def _battery(self) -> probes.Battery:
        """Android does not let programs read /sys, so its own program comes first."""
        told = self._seldom("termux", lambda: self._run((_TERMUX,)))
        return probes.termux_battery(told) if told else probes.battery(self._sys)

    def _others_cpu(self, pids: Sequence[int]) -> float | None:
        before, self._cpu = self._cpu, None
        self._cpu = probes.cpu_times(self._proc, pids)
        return self._cpu.others_percent(before) if before else None

    def _idle(self) -> float | None:
        """The shorter of the times since somebody typed at a terminal and since a built-in keyboard reported."""
        seen = []
        if (typed_s := self._ask("terminals", lambda: probes.last_terminal_use(self._dev))) is not None:
            seen.append(max(0.0, self._clock.wall() - typed_s))
        if (count := self._ask("interrupts", lambda: probes.keyboard_interrupts(self._proc))) is not None:
            if count != self._interrupts:
                self._interrupts, self._input_s = count, self._clock.monotonic()
            assert self._input_s is not None
            seen.append(self._clock.monotonic() - self._input_s)
        return min(seen, default=None)

    def _disk_free(self) -> int | None:
        return None if self._state_dir is None else shutil.disk_usage(self._state_dir).free

    def _disk_used(self) -> int | None:
        if self._state_dir is None:
            return None
        used = 0
        for folder, _, names in os.walk(self._state_dir):
            for name in names:
                try:
                    used += os.lstat(os.path.join(folder, name)).st_size
                except OSError:  # swept meanwhile
                    continue
        return used
