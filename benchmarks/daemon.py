"""One daemon as its owner meets it: how soon it works, how soon it answers, and what it costs while it rests.

Real processes on loopback, one node alone. The JSON object is the last line on stdout. Runs and what they gave are in
RESULTS.md.

    python benchmarks/daemon.py --json
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from braniac.node.commands import aligned_text, json_text
from braniac.node.config import control_socket_path
from braniac.node.control_client import ControlClient
from braniac.node.control_pb2 import StatusReply
from braniac.node.errors import NodeError

PATIENCE_S = 300.0
COMMAND = [sys.executable, "-m", "braniac.node"]


def wait_until(client: ControlClient, condition: Callable[[StatusReply], bool]) -> StatusReply:
    """Ask every 50 ms until a status fulfils the condition. Raises TimeoutError."""
    deadline_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(NodeError):
            if condition(reply := client.status(since_slot=1 << 62)):
                return reply
        time.sleep(0.05)
    raise TimeoutError("the daemon does not get that far")


@contextlib.contextmanager
def daemon(state_dir: Path, sets: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A running daemon, which leaves at the end."""
    arguments = ["join", "--state-dir", str(state_dir), "--listen", "/ip4/127.0.0.1/tcp/0"]
    for each in sets:
        arguments += ["--set", each]
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def measured_s(action: Callable[[], object], times: int) -> dict[str, float]:
    """Median and longest time of an action in milliseconds, spread over some seconds."""
    taken_s = []
    for _ in range(times):
        began = time.monotonic()
        action()
        taken_s.append(time.monotonic() - began)
        time.sleep(0.1)
    return {"median_ms": 1e3 * statistics.median(taken_s), "max_ms": 1e3 * max(taken_s)}


def cpu_s(pid: int) -> dict[str, float]:
    """CPU seconds of the daemon and of its children so far."""
    process = psutil.Process(pid)
    own, children = process.cpu_times(), [child.cpu_times() for child in process.children()]
    return {"daemon": own.user + own.system, "p2pd": sum(child.user + child.system for child in children)}


def run(state_dir: Path, sets: list[str], paused_s: float) -> dict[str, object]:
    """The whole measurement."""
    client = ControlClient(control_socket_path(state_dir))
    with daemon(state_dir, sets):  # a first life, that leaves a warm state directory
        wait_until(client, lambda reply: reply.certificates >= 3)
    began = time.monotonic()
    with daemon(state_dir, sets) as process:
        answered = wait_until(client, lambda reply: True)
        answered_s = time.monotonic() - began
        training = wait_until(client, lambda reply: reply.state == "training")
        training_s = time.monotonic() - began
        wait_until(client, lambda reply: reply.certificates > max(answered.certificates, training.certificates))
        settled_s = time.monotonic() - began
        status = measured_s(client.status, 50)
        command = [*COMMAND, "status", "--json", "--state-dir", str(state_dir)]
        whole = measured_s(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), 10)
        client.pause()
        wait_until(client, lambda reply: reply.state == "paused")
        time.sleep(5)  # until what was in flight has ended
        before, since = cpu_s(process.pid), time.monotonic()
        time.sleep(paused_s)
        after, seconds = cpu_s(process.pid), time.monotonic() - since
        share = {name: 100 * (after[name] - before[name]) / seconds for name in before}
        client.resume()
        wait_until(client, lambda reply: reply.state == "training")
    return {
        "warm_start_to_first_answer_s": answered_s,
        "warm_start_to_training_s": training_s,
        "warm_start_to_first_slot_settled_s": settled_s,
        "status_call_while_training": status,
        "status_command_while_training": whole,
        "paused_cpu_percent_of_a_core": share | {"together": sum(share.values())},
        "paused_measured_s": seconds,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--paused-s", type=float, default=30.0, help="how long to watch it rest")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the daemon")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(Path(folder) / "node", arguments.set, arguments.paused_s)
    print(json_text(report) if arguments.json else aligned_text(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
