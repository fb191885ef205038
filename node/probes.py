"""What Linux tells about a device in /sys and /proc, and Termux and NetworkManager through their programs.

Each function takes the root of the tree that it reads. What is not there is None; what is not readable raises OSError
or ValueError, which sensors.py takes for None too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

RunProgram = Callable[[Sequence[str]], str | None]
"""The output of a program; None if it is not installed, fails, or takes too long."""

_BATTERY_CELSIUS = (-40.0, 120.0)  # anything else is a sensor that does not work
_CPU_CELSIUS = (0.5, 150.0)  # zones that are switched off read 0 or less
_CPU_CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "soc_thermal")
_CPU_ZONES = ("cpu", "soc", "x86_pkg_temp")
_MODEMS = ("rmnet", "ccmni", "wwan", "ppp")  # interfaces of mobile networks, on phones and on laptops
_TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


@dataclass(frozen=True, slots=True)
class Battery:
    """What a battery, or several, say together."""

    percent: float | None = None
    """Mean charge."""
    plugged: bool | None = None
    """Whether a charger is connected."""
    celsius: float | None = None
    """Of the hottest."""


def battery(sys: Path) -> Battery:
    """From /sys/class/power_supply, without the batteries of mice and keyboards."""
    percents, celsius, online, status = [], [], [], set()
    for supply in sorted((sys / "class/power_supply").glob("*")):
        if _text(supply / "scope") == "Device":
            continue
        if _text(supply / "type") != "Battery":
            online.append(_number(supply / "online"))
        elif _text(supply / "present") != "0":
            status.add(_text(supply / "status"))
            percents.append(_number(supply / "capacity"))
            celsius.append(_number(supply / "temp"))
    chargers = [value > 0 for value in online if value is not None]
    plugged: bool | None = None
    if any(chargers) or (status and status <= {"Charging", "Full", "Not charging"}):
        plugged = True
    elif "Discharging" in status or (chargers and percents):
        plugged = False
    return Battery(
        _mean(value for value in percents if value is not None and 0 <= value <= 100),
        plugged,
        _hottest((value / 10 for value in celsius if value is not None), _BATTERY_CELSIUS),
    )


def termux_battery(output: str) -> Battery:
    """From what `termux-battery-status` prints. Raises ValueError."""
    told = json.loads(output)
    if not isinstance(told, dict):
        raise ValueError("not an object")
    percent, plugged, celsius = told.get("percentage"), told.get("plugged"), told.get("temperature")
    return Battery(
        _mean([float(percent)] if isinstance(percent, int | float) and 0 <= percent <= 100 else []),
        plugged != "UNPLUGGED" if isinstance(plugged, str) and plugged.startswith(("PLUGGED", "UNPLUGGED")) else None,
        _hottest([float(celsius)] if isinstance(celsius, int | float) else [], _BATTERY_CELSIUS),
    )


def cpu_celsius(sys: Path) -> float | None:
    """The hottest processor sensor among /sys/class/hwmon and /sys/class/thermal."""
    files: list[Path] = []
    for chip in sorted((sys / "class/hwmon").glob("*")):
        if _text(chip / "name") in _CPU_CHIPS:
            files += chip.glob("temp*_input")
    for zone in sorted((sys / "class/thermal").glob("thermal_zone*")):
        if (_text(zone / "type") or "").lower().startswith(_CPU_ZONES):
            files.append(zone / "temp")
    values = [_number(file) for file in files]
    return _hottest((value / 1000 for value in values if value is not None), _CPU_CELSIUS)


def own_processes(proc: Path, pid: int) -> list[int]:
    """This process and its children, such as the libp2p daemon."""
    children = [(thread / "children").read_text() for thread in (proc / str(pid) / "task").glob("*")]
    return [pid, *(int(child) for line in children for child in line.split())]


def memory_bytes(proc: Path, pids: Iterable[int]) -> int:
    """Resident memory of processes; one that is gone has none."""
    pages = 0
    for pid in pids:
        if (text := _text(proc / str(pid) / "statm")) is not None:
            pages += int(text.split()[1])
    return pages * _PAGE_BYTES


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds of processor time since boot."""

    total_s: float
    busy_s: float
    own_s: float

    def others_percent(self, before: CpuTimes) -> float | None:
        """Share of all cores that others used since; None after no time at all."""
        elapsed_s = self.total_s - before.total_s
        if elapsed_s <= 0:
            return None
        others_s = (self.busy_s - before.busy_s) - (self.own_s - before.own_s)
        return min(100.0, max(0.0, 100 * others_s / elapsed_s))


def cpu_times(proc: Path, pids: Sequence[int]) -> CpuTimes:
    """From /proc/stat, and of the given processes; the first one's count holds its dead children too."""
    name, *fields = (proc / "stat").read_text().partition("\n")[0].split()
    if name != "cpu" or len(fields) < 8:
        raise ValueError("no line of all processors")
    user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[:8])  # guests are in user and nice
    busy = user + nice + system + irq + softirq
    own = sum(_ticks(proc, pid) for pid in pids)
    return CpuTimes((busy + idle + iowait + steal) / _TICKS_PER_S, busy / _TICKS_PER_S, own / _TICKS_PER_S)


def _ticks(proc: Path, pid: int) -> int:
    text = _text(proc / str(pid) / "stat")
    if text is None:
        return 0
    return sum(map(int, text.rpartition(")")[2].split()[11:15]))  # utime stime cutime cstime; a name may hold spaces


def last_terminal_use(dev: Path) -> float | None:
    """When somebody typed at a terminal last, in seconds since 1970, as `who -u` and `w` find it: by access times."""
    times = []
    for terminal in (*dev.glob("tty[0-9]*"), *dev.glob("pts/[0-9]*")):
        try:
            times.append(terminal.stat().st_atime)
        except OSError:  # closed meanwhile
            continue
    return max(times, default=None)


def keyboard_interrupts(proc: Path) -> int | None:
    """How often the built-in keyboard and pointer of a laptop reported something."""
    lines = [line.split() for line in (proc / "interrupts").read_text().splitlines() if "i8042" in line]
    return sum(int(word) for words in lines for word in words[1:] if word.isdecimal()) if lines else None


def default_interface(proc: Path) -> str | None:
    """The network interface that traffic to the world takes, by /proc/net/route."""
    routes = []
    for line in (proc / "net/route").read_text().splitlines()[1:]:
        words = line.split()
        if len(words) > 7 and words[1] == "00000000" and words[7] == "00000000":
            routes.append((int(words[6]), words[0]))
    return min(routes)[1] if routes else None


def metered(proc: Path, run: RunProgram) -> bool | None:
    """Whether traffic is paid by the byte: what NetworkManager says, else whether it goes through a modem."""
    interface = default_interface(proc)
    if interface is None:
        return None
    told = (run(("nmcli", "-g", "GENERAL.METERED", "device", "show", interface)) or "").strip()
    if told.startswith(("yes", "no")):  # "yes (guessed)" is one of its words
        return told.startswith("yes")
    return True if interface.startswith(_MODEMS) else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _number(path: Path) -> float | None:
    text = _text(path)
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return sum(found) / len(found) if found else None


def _hottest(values: Iterable[float], plausible: tuple[float, float]) -> float | None:
    low, high = plausible
    return max((value for value in values if low <= value <= high), default=None)
