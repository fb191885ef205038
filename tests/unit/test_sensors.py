"""Sensors over made-up trees: what is there is read, what is not there is None, and nothing ever raises."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from braniac.node import probes
from braniac.node.clock import FakeClock
from braniac.node.sensors import Sample, Sensors, run_program

PID = 100
SUPPLY, THERMAL, HWMON = "sys/class/power_supply", "sys/class/thermal", "sys/class/hwmon"


class Device:
    """A machine made of files, programs and a clock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.clock = FakeClock()
        self.outputs: dict[str, str] = {}
        self.ran: list[tuple[str, ...]] = []
        self.state_dir = root / "state"
        self.state_dir.mkdir()
        self.daily = 7
        self.sensors = Sensors(self.state_dir, self.clock, lambda: self.daily, root=root, run=self._run, pid=PID)

    def _run(self, arguments: Sequence[str]) -> str | None:
        self.ran.append(tuple(arguments))
        return self.outputs.get(arguments[0])

    def write(self, path: str, text: object) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
        return file

    def supply(self, name: str, **files: object) -> None:
        for file, text in files.items():
            self.write(f"{SUPPLY}/{name}/{file}", text)

    def cpu(self, busy: int, idle: int, *, own: int = 0, child: int = 0) -> None:
        """Ticks since boot, of all, of this process and of its child."""
        self.write("proc/stat", f"cpu  {busy} 0 0 {idle} 0 0 0 0 0 0\ncpu0 1 2 3 4")
        for pid, ticks in ((PID, own), (PID + 1, child)):
            name = "(a name) with spaces)"
            self.write(f"proc/{pid}/stat", f"{pid} {name} S 1 1 1 0 -1 4194560 1 0 0 0 {ticks} 0 0 0 20 0 1 0 1 1")
        self.write(f"proc/{PID}/task/{PID}/children", f"{PID + 1} ")

    def look(self) -> Sample:
        return self.sensors.sample()


@pytest.fixture
def device(tmp_path: Path) -> Device:
    return Device(tmp_path)


def test_a_device_without_sensors_says_nothing(tmp_path: Path) -> None:
    sample = Sensors(None, FakeClock(), root=tmp_path, run=lambda arguments: None, pid=PID).sample()
    assert {field.name for field in fields(Sample) if getattr(sample, field.name) is not None} == {"local_time"}


def test_a_laptop(device: Device) -> None:
    device.supply("AC", type="Mains", online=0)
    device.supply("BAT0", type="Battery", present=1, capacity=80, status="Discharging", temp=310)
    device.supply("BAT1", type="Battery", present=1, capacity=40, status="Unknown", temp=355)
    device.supply("hidpp_battery_0", type="Battery", scope="Device", capacity=3, status="Discharging")
    sample = device.look()
    assert (sample.plugged, sample.battery_percent, sample.battery_celsius) == (False, 60.0, 35.5)
    device.supply("AC", online=1)
    assert device.look().plugged is True


@pytest.mark.parametrize(
    ("files", "plugged", "percent"),
    [
        ({"status": "Charging", "capacity": 5}, True, 5.0),
        ({"status": "Full", "capacity": 100}, True, 100.0),
        ({"status": "Unknown", "capacity": 50}, None, 50.0),
        ({"status": "Discharging"}, False, None),
        ({"status": "Discharging", "capacity": 0, "present": 0}, None, None),  # an empty slot is not an empty battery
        ({"status": "Discharging", "capacity": "nonsense"}, False, None),
        ({"capacity": 255}, None, None),
    ],
)
def test_what_a_battery_says(
    device: Device, files: dict[str, object], plugged: bool | None, percent: float | None
) -> None:
    device.supply("BAT0", type="Battery", **files)
    sample = device.look()
    assert (sample.plugged, sample.battery_percent, sample.battery_celsius) == (plugged, percent, None)


def test_a_charger_without_a_battery_is_a_charger(device: Device) -> None:
    device.supply("usb", type="USB", online=1)
    assert device.look().plugged is True
    device.supply("usb", type="USB", online=0)
    assert device.look().plugged is None  # a machine without a battery does not run on one


def test_a_phone_asks_termux_at_most_once_a_minute(device: Device) -> None:
    device.outputs["termux-battery-status"] = json.dumps(
        {"health": "GOOD", "percentage": 85, "plugged": "UNPLUGGED", "status": "DISCHARGING", "temperature": 31.2}
    )
    for _ in range(3):
        sample = device.look()
        assert (sample.plugged, sample.battery_percent, sample.battery_celsius) == (False, 85.0, 31.2)
        device.clock.advance(19)
    device.outputs["termux-battery-status"] = json.dumps({"percentage": 84, "plugged": "PLUGGED_AC"})
    assert device.look().plugged is False
    device.clock.advance(3)
    assert device.look().plugged is True
    assert device.ran.count(("termux-battery-status",)) == 2


@pytest.mark.parametrize(
    "output", ["", "nonsense", "[]", "{}", '{"percentage": "85", "plugged": 3, "temperature": null}']
)
def test_what_termux_does_not_say_is_unknown(device: Device, output: str) -> None:
    device.outputs["termux-battery-status"] = output
    sample = device.look()
    assert (sample.plugged, sample.battery_percent, sample.battery_celsius) == (None, None, None)


def test_the_hottest_processor_sensor_that_works(device: Device) -> None:
    device.write(f"{HWMON}/hwmon0/name", "nvme")
    device.write(f"{HWMON}/hwmon0/temp1_input", 99000)
    assert device.look().cpu_celsius is None
    device.write(f"{THERMAL}/thermal_zone0/type", "cpu-1-0-usr")
    device.write(f"{THERMAL}/thermal_zone0/temp", 0)
    assert device.look().cpu_celsius is None  # a zone that is switched off
    device.write(f"{THERMAL}/thermal_zone0/temp", 61500)
    assert device.look().cpu_celsius == 61.5
    device.write(f"{HWMON}/hwmon1/name", "k10temp")
    device.write(f"{HWMON}/hwmon1/temp1_input", 70000)
    device.write(f"{HWMON}/hwmon1/temp2_input", 4_000_000)
    assert device.look().cpu_celsius == 70.0


def test_the_processor_time_of_others(device: Device) -> None:
    device.cpu(1000, 9000, own=300, child=100)
    assert device.look().others_cpu_percent is None  # since when?
    device.cpu(1500, 9500, own=500, child=200)
    assert device.look().others_cpu_percent == pytest.approx(20.0)  # 500 busy, 300 of them ours, of 1000
    device.cpu(1500, 9500, own=500, child=200)
    assert device.look().others_cpu_percent is None  # no time has passed
    device.cpu(1600, 10400, own=900, child=200)
    assert device.look().others_cpu_percent == 0.0  # never less, whatever the rounding
    device.write("proc/stat", "nonsense")
    assert device.look().others_cpu_percent is None
    device.cpu(1700, 11300, own=900, child=200)
    assert device.look().others_cpu_percent is None  # nothing to compare with
    device.cpu(2700, 11300, own=900, child=200)
    assert device.look().others_cpu_percent == 100.0


def test_memory_is_that_of_the_process_and_its_children(device: Device) -> None:
    device.cpu(0, 0)
    device.write(f"proc/{PID}/statm", "5000 300 1 1 0 1 0")
    assert device.look().memory_bytes == 300 * os.sysconf("SC_PAGE_SIZE")
    device.write(f"proc/{PID + 1}/statm", "5000 200 1 1 0 1 0")
    assert device.look().memory_bytes == 500 * os.sysconf("SC_PAGE_SIZE")


def test_a_terminal_tells_when_somebody_typed(device: Device) -> None:
    typed = device.clock.wall() - 240
    for name, at in (
        ("dev/pts/3", typed),
        ("dev/tty1", typed - 1000),
        ("dev/ptmx", typed + 200),
        ("dev/tty", typed + 200),
    ):
        os.utime(device.write(name, ""), (at, at + 100))
    assert device.look().idle_s == pytest.approx(240)
    device.clock.set_wall(typed - 5000)
    assert device.look().idle_s == 0.0  # a clock that was set back


def test_a_built_in_keyboard_tells_by_its_interrupts(device: Device) -> None:
    def pressed(count: int) -> None:
        device.write(
            "proc/interrupts",
            f"      CPU0  CPU1\n  1: {count} 7 IO-APIC 1-edge i8042\n 12: 5 5 IO-APIC 12-edge i8042\n 9: 1 1 acpi",
        )

    pressed(10)
    assert device.look().idle_s == 0.0
    device.clock.advance(100)
    assert device.look().idle_s == 100.0
    pressed(11)
    device.clock.advance(50)
    assert device.look().idle_s == 0.0
    device.clock.advance(30)
    assert device.look().idle_s == 30.0
    os.utime(device.write("dev/pts/0", ""), (device.clock.wall() - 10,) * 2)
    assert device.look().idle_s == pytest.approx(10)  # whichever was used last


ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n"


@pytest.mark.parametrize(
    ("interface", "told", "metered"),
    [
        ("wlan0", "yes", True),
        ("wlan0", "no (guessed)", False),
        ("wlan0", "unknown", None),
        ("wlan0", None, None),
        ("rmnet_data0", None, True),
        ("wwan0", "no", False),
    ],
)
def test_a_connection_paid_by_the_byte(device: Device, interface: str, told: str | None, metered: bool | None) -> None:
    lines = ["eth9\t0000A8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0", "eth5\t00000000\t0\t3\t0\t0\t600\t00000000\t0"]
    device.write("proc/net/route", ROUTES + "\n".join([*lines, f"{interface}\t00000000\t0\t3\t0\t0\t100\t00000000\t0"]))
    if told is not None:
        device.outputs["nmcli"] = told + "\n"
    assert device.look().metered is metered
    device.look()
    asked = [words for words in device.ran if words[0] == "nmcli"]
    assert asked == [("nmcli", "-g", "GENERAL.METERED", "device", "show", interface)]


def test_without_a_way_out_nobody_is_asked(device: Device) -> None:
    device.write("proc/net/route", ROUTES)
    assert device.look().metered is None
    assert [words[0] for words in device.ran] == ["termux-battery-status"]


def test_the_disk_and_the_days_traffic(device: Device) -> None:
    (device.state_dir / "blobs").mkdir()
    (device.state_dir / "blobs" / "a").write_bytes(bytes(1000))
    (device.state_dir / "lock").write_bytes(bytes(24))
    sample = device.look()
    assert sample.disk_used_bytes == 1024
    assert sample.disk_free_bytes
    assert 0 < sample.disk_free_bytes <= shutil.disk_usage(device.root).total
    assert sample.daily_bytes == 7
    (device.state_dir / "lock").write_bytes(bytes(1024))
    assert device.look().disk_used_bytes == 1024
    device.clock.advance(60)
    assert device.look().disk_used_bytes == 2024


@settings(derandomize=True, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(st.text(max_size=40), min_size=12, max_size=12))
def test_nonsense_anywhere_is_a_missing_sensor(device: Device, texts: list[str]) -> None:
    names = [
        f"{SUPPLY}/b/type", f"{SUPPLY}/b/capacity", f"{SUPPLY}/b/temp", f"{THERMAL}/thermal_zone0/temp", "proc/stat",
        "proc/net/route", "proc/interrupts", f"proc/{PID}/statm", f"proc/{PID}/stat", f"proc/{PID}/task/1/children",
    ]  # fmt: skip
    for name, text in zip(names, texts, strict=False):
        device.write(name, text)
    device.write(f"{THERMAL}/thermal_zone0/type", "cpu")
    device.outputs = {"nmcli": texts[10], "termux-battery-status": texts[11]}
    device.clock.advance(60)
    sample = device.look()
    assert sample.disk_used_bytes == 0
    assert sample.battery_percent is None or 0 <= sample.battery_percent <= 100


def test_a_program_that_is_missing_or_fails_says_nothing() -> None:
    assert run_program(["no-such-program-anywhere"]) is None
    assert run_program(["false"]) is None
    assert run_program(["echo", "hello"]) == "hello\n"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_look_at_this_machine_is_cheap(tmp_path: Path) -> None:
    sensors = Sensors(tmp_path)
    first = sensors.sample()
    assert first.memory_bytes
    assert first.local_time
    began = time.thread_time()
    for _ in range(10):
        sensors.sample()
    assert (time.thread_time() - began) / 10 < 0.05  # 3 ms when it was written; the bound is loose for slow machines


def test_own_time_counts_children_that_died(device: Device) -> None:
    device.write(f"proc/{PID}/stat", f"{PID} (node) S 1 1 1 0 -1 4194560 1 0 0 0 10 20 30 40 20 0 1 0 1 1")
    device.write("proc/stat", "cpu 1000 0 0 0 0 0 0 0")
    ticks = os.sysconf("SC_CLK_TCK")
    assert probes.cpu_times(device.root / "proc", [PID, 999]).own_s == 100 / ticks
