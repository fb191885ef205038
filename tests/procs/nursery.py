"""Starts daemons without their seconds of imports: one process imports it all and is forked for each of them.

A fork is a real process in everything that the tests look at: arguments, environment, files, signals, its end. What it
skips is Python's start, which every other command in these tests goes through.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_LOOK_S = 0.02


class Fork:
    """One daemon, with what the tests use of `subprocess.Popen`."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._nursery = nursery

    def poll(self) -> int | None:
        """Its exit code, as Popen has it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._nursery.ask(reap=self.pid)
        return self.returncode

    def wait(self, timeout: float) -> int:
        """Wait for its end. Raises TimeoutExpired."""
        deadline_s = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline_s:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(_LOOK_S)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


class Nursery:
    """The process that is forked, seen from the tests."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._turn = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request: Any) -> Any:
        """One request, one answer."""
        pipes = self._process
        assert pipes.stdin is not None
        assert pipes.stdout is not None
        with self._turn:
            pipes.stdin.write(json.dumps(request) + "\n")
            pipes.stdin.flush()
            return json.loads(pipes.stdout.readline())

    def fork(self, arguments: Sequence[str], environment: Mapping[str, str], output: Path, errors: Path) -> Fork:
        """Start `braniac-node` with these arguments; it appends to two files that exist."""
        pid = self.ask(fork=list(arguments), environment=dict(environment), output=str(output), errors=str(errors))
        return Fork(self, pid)

    def close(self) -> None:
        """End it; what was forked goes on."""
        self._process.communicate()


_started: list[Nursery] = []


def nursery(environment: Mapping[str, str]) -> Nursery:
    """The one of this test process, started when it is first needed."""
    if not _started:
        _started.append(Nursery(environment))
        atexit.register(_started[0].close)
    return _started[0]


# --- the process itself ----------------------------------------------------------------------------------------------


def serve() -> int:
    """Do what the lines on stdin ask for until there are no more. A child returns its own exit code."""
    main = importlib.import_module("braniac.node.cli").main
    for module in ("service", "logs", "look", "consent"):  # what `join` loads once it has read its arguments
        importlib.import_module(f"braniac.node.{module}")
    gc.freeze()  # else the first collection in each child would copy all of this
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "reap" in request:
            pid, status = os.waitpid(request["reap"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            become(request)
            return main(request["fork"])
        os.write(1, f"{json.dumps(answer)}\n".encode())
    return 0


def become(request: Mapping[str, Any]) -> None:
    """Take the files and the environment of the process that was asked for."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    append = os.O_WRONLY | os.O_APPEND
    files = ((os.devnull, os.O_RDONLY), (request["output"], append), (request["errors"], append))
    for number, (path, how) in enumerate(files):
        opened = os.open(path, how)
        os.dup2(opened, number)
        os.close(opened)
    sys.argv = ["braniac-node", *request["fork"]]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then close stdin
    sys.exit(serve())
