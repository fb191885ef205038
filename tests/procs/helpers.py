"""Real daemons for tests: started, asked over their control sockets, signalled, and cleaned up after."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from braniac.node.config import control_socket_path
from braniac.node.control_client import ControlClient
from braniac.node.control_pb2 import StatusReply
from braniac.node.errors import NodeError
from tests.procs.nursery import Fork, nursery

SLOT_S = 0.5
PATIENCE_S = 120.0  # a machine may have other work
COMMAND = [sys.executable, "-m", "braniac.node"]
ENVIRONMENT = {**os.environ, "BRANIAC_DEBUG": "0", "OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": "/nowhere"}

_Result = TypeVar("_Result")


def until(condition: Callable[[], _Result | None], what: str, patience_s: float = PATIENCE_S) -> _Result:
    """Ask again and again until there is an answer: the answer. Fails the test when patience ends."""
    deadline_s = time.monotonic() + patience_s
    while time.monotonic() < deadline_s:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError(f"waited {patience_s:g} s in vain for {what}")


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run one `braniac-node` command to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S
    )


def corpus(folder: Path) -> Path:
    """A small text to train on, so that starting costs little."""
    path = folder / "text.txt"
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    path.write_text("".join(source.read_text(encoding="utf-8") for source in sources), encoding="utf-8")
    return path


@dataclass
class Node:
    """One state directory, and the daemon that was last started on it."""

    state_dir: Path
    data: Path
    tier: int = 3
    process: subprocess.Popen[bytes] | Fork | None = None
    helpers: set[psutil.Process] = field(default_factory=set)
    """libp2p daemons that were seen as its children."""
    log_began: int = 0
    """Where the log of the present daemon begins, in bytes."""

    @property
    def log_path(self) -> Path:
        """What its daemons wrote to stderr."""
        return self.state_dir.with_name(self.state_dir.name + ".log")

    @property
    def output_path(self) -> Path:
        """What its daemons wrote to stdout."""
        return self.state_dir.with_name(self.state_dir.name + ".out")

    def start(self, *more: object, peers: str | None = None, listen: str = "/ip4/127.0.0.1/tcp/0") -> Node:
        """Start a daemon; it is not waited for."""
        arguments: list[object] = ["join", "--state-dir", self.state_dir, "--tier", self.tier, "--data", self.data]
        arguments += ["--listen", listen, "--log-format", "json"]
        for setting in (f"run.slot_s={SLOT_S}", "train.batch=1"):
            arguments += ["--set", setting]
        arguments += ["--peers", peers] if peers else []
        self.output_path.touch()
        self.log_path.touch()
        self.log_began = self.log_path.stat().st_size
        words = [str(word) for word in (*arguments, *more)]
        self.process = nursery(ENVIRONMENT).fork(words, ENVIRONMENT, self.output_path, self.log_path)
        return self

    @property
    def pid(self) -> int:
        """Of the daemon."""
        assert self.process is not None
        return self.process.pid

    def ask(self) -> StatusReply | None:
        """Its status, or None while it does not answer. Fails the test if it has ended."""
        assert self.process is not None
        assert self.process.poll() is None, f"the daemon ended with {self.process.returncode}: {self.words()}"
        try:
            reply = ControlClient(control_socket_path(self.state_dir)).status()
        except NodeError:
            return None
        self.helpers.update(self.children())
        return reply

    def until(self, condition: Callable[[StatusReply], Any], what: str, patience_s: float = PATIENCE_S) -> StatusReply:
        """The first status that fulfils a condition."""

        last: StatusReply | None = None

        def look() -> StatusReply | None:
            nonlocal last
            reply = self.ask()
            last = reply or last
            return reply if reply is not None and condition(reply) else None

        try:
            return until(look, f"{what} ({self.state_dir.name})", patience_s)
        except AssertionError as error:
            newest = "\n".join(str(dict(entry)) for entry in self.log()[-30:])
            error.add_note(f"its last status:\n{last}\nits log ends:\n{newest}")
            raise

    def training(self, certificates: int = 1) -> StatusReply:
        """Wait until it trains and has applied that many certificates."""
        wanted = ("training", "degraded")
        return self.until(
            lambda s: s.state in wanted and s.certificates >= certificates, f"{certificates} certificates"
        )

    @property
    def address(self) -> str:
        """Where others find it."""
        return str(self.until(lambda s: len(s.addresses), "an address").addresses[0])

    def children(self) -> list[psutil.Process]:
        """Its libp2p daemons."""
        return psutil.Process(self.pid).children()

    def signal(self, number: int) -> None:
        """Send a signal to the daemon."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it without warning, as a power cut would."""
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """Its exit code."""
        assert self.process is not None
        return self.process.wait(PATIENCE_S)

    def stop(self) -> int:
        """Let it leave: its exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def log(self) -> list[Mapping[str, Any]]:
        """What its daemons logged."""
        lines = self.log_path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{")]

    def logged(self, event: str) -> list[Mapping[str, Any]]:
        """Log entries of one kind."""
        return [entry for entry in self.log() if entry["event"] == event]

    def words(self) -> list[str]:
        """What the present daemon said beside its log: the sentence that explains an exit code, or a traceback."""
        text = self.log_path.read_bytes()[self.log_began :].decode()
        return [line for line in text.splitlines() if not line.startswith("{")]

    def failed(self, code: int) -> str:
        """Wait for its end, which must have this exit code and one sentence for it: that sentence."""
        assert self.wait() == code, self.words()
        [sentence] = self.words()
        assert sentence.startswith("braniac-node: ")
        return sentence


class Nodes:
    """Makes nodes below one folder; `close` ends whatever still runs and checks that no helper process is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = corpus(folder)
        self.made: list[Node] = []

    def make(self, name: str, tier: int = 3) -> Node:
        """A node that was not started yet."""
        self.made.append(Node(self.folder / name, self.data, tier))
        return self.made[-1]

    def close(self) -> None:
        """See the class."""
        for node in self.made:
            if node.process is not None and node.process.poll() is None:
                node.helpers.update(node.children())
                node.kill()
        for node in self.made:
            until(lambda node=node: not any(map(_runs, node.helpers)), "p2pd to follow its daemon")  # type: ignore[misc]


def nodes_below(folder: Path) -> Iterator[Nodes]:
    """The body of a fixture."""
    nodes = Nodes(folder)
    try:
        yield nodes
    finally:
        nodes.close()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
