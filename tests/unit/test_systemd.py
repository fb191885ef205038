"""Life under systemd: what is said to its socket, when the watchdog is fed, and that the unit files can be used."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from braniac.node import control_pb2 as pb
from braniac.node import errors
from braniac.node.clock import FakeClock
from braniac.node.systemd import Notifier, Pulse, describe_status

DEPLOY = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS = [DEPLOY / "braniac-node.service", DEPLOY / "user" / "braniac-node.service"]
PID = 4711


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """A service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.setblocking(False)
        yield channel


def environ(manager: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": manager.getsockname(), **more}


def heard(manager: socket.socket) -> list[list[str]]:
    """Every datagram that came, as its lines."""
    found = []
    while True:
        try:
            found.append(manager.recv(4096).decode().split("\n"))
        except BlockingIOError:
            return found


def test_a_socket_in_a_folder(manager: socket.socket) -> None:
    Notifier(environ(manager)).tell("READY=1", "STATUS=training")
    assert heard(manager) == [["READY=1", "STATUS=training"]]


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_an_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind("")  # the kernel picks a free abstract name
        channel.setblocking(False)
        name = channel.getsockname().decode()
        assert name.startswith("\0")
        Notifier({"NOTIFY_SOCKET": "@" + name[1:]}).tell("READY=1")
        assert heard(channel) == [["READY=1"]]


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative", "/nobody/listens/here", "/" + "x" * 200])
async def test_nobody_to_tell(address: str) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": address})
    notifier.tell("READY=1")
    async with notifier.telling(lambda: "", lambda: True):
        notifier.tell("STOPPING=1")


def test_a_manager_that_does_not_read_holds_up_nobody(manager: socket.socket) -> None:
    notifier = Notifier(environ(manager))
    for _ in range(2000):  # more than the socket holds
        notifier.tell("STATUS=" + "x" * 200)
    assert 0 < len(heard(manager)) < 2000


def test_the_time_of_the_watchdog() -> None:
    for more, expected in [
        ({}, 0.0),
        ({"WATCHDOG_USEC": "2500000"}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": str(PID)}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"}, 0.0),  # meant for another process
        ({"WATCHDOG_USEC": "soon"}, 0.0),
    ]:
        assert Notifier(more, PID).watchdog_s == expected


class Turns:
    """A sleep that ends when told to."""

    def __init__(self) -> None:
        self.asked_s: list[float] = []
        self._gate = asyncio.Semaphore(0)
        self.arrived = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        self.asked_s.append(seconds)
        self.arrived.set()
        await self._gate.acquire()

    async def turn(self) -> None:
        """Let it wake once, and wait until it sleeps again."""
        self.arrived.clear()
        self._gate.release()
        await self.arrived.wait()


@pytest.mark.parametrize(("watchdog_us", "period_s"), [("", 10.0), ("6000000", 2.0), ("120000000", 10.0)])
async def test_ready_and_then_pinged_while_all_is_well(
    manager: socket.socket, watchdog_us: str, period_s: float
) -> None:
    turns, well, words = Turns(), [True], ["joining"]
    notifier = Notifier(environ(manager, WATCHDOG_USEC=watchdog_us), PID, turns.sleep)
    ping = ["WATCHDOG=1"] if watchdog_us else []
    assert heard(manager) == []
    async with notifier.telling(lambda: words[0], lambda: well[0]):
        await turns.arrived.wait()
        assert heard(manager) == [["READY=1", "STATUS=joining"], [*ping, "STATUS=joining"]]
        words[0] = "training"
        await turns.turn()
        assert heard(manager) == [[*ping, "STATUS=training"]]
        well[0] = False
        await turns.turn()
        assert heard(manager) == [["STATUS=training"]]  # no ping: the watchdog will end this
        well[0] = True
        await turns.turn()
        assert heard(manager) == [[*ping, "STATUS=training"]]
    assert set(turns.asked_s) == {period_s}
    assert heard(manager) == []


def test_a_node_without_slots_has_no_pulse() -> None:
    clock = FakeClock()
    pulse = Pulse(clock)
    clock.advance(1000)
    assert pulse.beats(7, 60.0)  # a first look
    clock.advance(60)
    assert pulse.beats(7, 60.0)
    clock.advance(1)
    assert not pulse.beats(7, 60.0)
    assert pulse.beats(8, 60.0)
    clock.advance(1000)
    assert pulse.beats(None, 60.0)  # it rests
    assert pulse.beats(8, 60.0)  # and has just gone on
    clock.advance(61)
    assert not pulse.beats(8, 60.0)


def test_status_is_one_line() -> None:
    assert describe_status(pb.StatusReply(state="joining", state_reason="0 peers\n(a\tb)")) == "joining: 0 peers (a b)"
    reply = pb.StatusReply(state="training", run_id="ab", slot=1234, peers_live=3, train_loss=2.5)
    assert describe_status(reply) == "training, slot 1,234, 3 peers, loss 2.500"
    reply = pb.StatusReply(state="paused", reasons=[pb.Reason(sentence="on battery"), pb.Reason(sentence="hot")])
    assert describe_status(reply) == "paused: on battery; hot"


# --- the unit files --------------------------------------------------------------------------------------------------


def settings(unit: Path) -> dict[str, list[str]]:
    """Every setting of a unit by "Section.Key", in order."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in unit.read_text(encoding="utf-8").splitlines():
        if header := re.fullmatch(r"\[(\w+)\]", line):
            section = header[1]
        elif line and not line.startswith("#"):
            key, value = line.split("=", 1)
            found.setdefault(f"{section}.{key}", []).append(value)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=["system", "user"])
def test_the_command_exists(unit: Path) -> None:
    [start] = settings(unit)["Service.ExecStart"]
    program, *arguments = start.split()
    assert Path(program).name == "braniac-node"
    run = subprocess.run(
        [sys.executable, "-m", "braniac.node", *arguments, "--help"], capture_output=True, text=True, timeout=60
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert "Usage: braniac-node join " in run.stdout


@pytest.mark.parametrize("unit", UNITS, ids=["system", "user"])
def test_it_is_restarted_unless_that_is_in_vain(unit: Path) -> None:
    service = settings(unit)
    assert service["Service.Type"] == ["notify"]
    assert service["Service.Restart"] == ["on-failure"]
    in_vain = (errors.ConfigError, errors.AlreadyRunning, errors.Incompatible, errors.IdentityFileError)
    assert service["Service.RestartPreventExitStatus"] == [" ".join(str(error.exit_code) for error in in_vain)]
    assert service["Service.WatchdogSec"] == ["2min"]
    assert service["Service.Nice"] == ["10"]
    assert "Service.MemoryDenyWriteExecute" not in service  # breaks torch
    assert "Service.ProcSubset" not in service  # hides the load and the free memory
    assert "AF_NETLINK" in service["Service.RestrictAddressFamilies"][0]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit", UNITS, ids=["system", "user"])
def test_systemd_is_content(unit: Path, tmp_path: Path) -> None:
    text = re.sub(r"^ExecStart=\S+", f"ExecStart={shutil.which('true')}", unit.read_text(encoding="utf-8"), flags=re.M)
    (tmp_path / unit.name).write_text(text, encoding="utf-8")  # the program is not installed where the unit says
    kind = "--user" if unit.parent.name == "user" else "--system"
    run = subprocess.run(
        ["systemd-analyze", kind, "--man=no", "verify", tmp_path / unit.name],
        env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    complaints = [line for line in run.stderr.splitlines() if unit.name in line]
    assert (run.returncode, complaints) == (0, [])
