"""A terminal for tests: a command on a pseudo terminal of 80 by 24, spoken to with pexpect."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager

import pexpect.fdpexpect

from tests.procs.helpers import COMMAND, ENVIRONMENT, PATIENCE_S

# pexpect.spawn would fork this process, which has gRPC's threads; the new process takes its terminal itself instead.
# Ctrl-C works there also if these tests run in the background of a shell, which has its jobs ignore it.
_TAKE_TERMINAL = (
    "import fcntl, os, signal, sys, termios; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


class Terminal:
    """A `braniac-node` command on a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.master, inner = pty.openpty()
        self.resize(80, 24)
        inherited = {name: value for name, value in ENVIRONMENT.items() if name not in {"COLUMNS", "LINES", "NO_COLOR"}}
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _TAKE_TERMINAL, *COMMAND, *map(str, arguments)],
            env=inherited | {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"},
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
        )
        os.close(inner)
        self.session = pexpect.fdpexpect.fdspawn(self.master, timeout=PATIENCE_S, encoding="utf-8")

    def expect(self, *texts: str) -> None:
        """Wait until each of these texts was shown, in this order."""
        for text in texts:
            self.session.expect_exact(text)

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self.master, keys.encode())

    def resize(self, columns: int, lines: int) -> None:
        """Give the terminal another size; who runs on it is told by the system."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def end(self, patience_s: float = PATIENCE_S) -> tuple[int, str]:
        """Wait for the command's end: its exit code and what it showed since the last `expect`."""
        self.session.expect(pexpect.EOF, timeout=patience_s)
        return self.process.wait(PATIENCE_S), self.session.before or ""

    def close(self) -> None:
        """End whatever still runs."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self.session.close()


@contextmanager
def terminal(*arguments: object) -> Iterator[Terminal]:
    """A command on a terminal, for as long as the context."""
    opened = Terminal(*arguments)
    try:
        yield opened
    finally:
        opened.close()


def run(*arguments: object) -> tuple[int, str]:
    """Run one command to its end on a terminal: exit code and what it showed."""
    with terminal(*arguments) as opened:
        return opened.end()
