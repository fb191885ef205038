"""`status --watch`: draw every reply of the daemon on the terminal until somebody leaves or the daemon does."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

import typer
from rich.console import Console
from rich.live import Live

from braniac.node.commands import json_text, message_dict
from braniac.node.control_client import ControlClient
from braniac.node.errors import NotRunning
from braniac.node.screen import History, Picture, one_line

PERIOD_S = 1.0


def watch(client: ControlClient, *, json: bool) -> None:
    """Until q or Ctrl-C. Raises NotRunning when the daemon stops, and what ControlClient raises."""
    terminal = Console()
    if terminal.is_terminal and not terminal.is_dumb_terminal and not json:
        left = _watch_screen(client, terminal)
    else:
        left = _watch_lines(client, json=json)
    if not left:
        raise NotRunning(f"the daemon on {client.path} has stopped: start it again with 'braniac-node join'")


def _watch_lines(client: ControlClient, *, json: bool) -> bool:
    history = History()
    for reply in client.watch(period_s=PERIOD_S):
        history.add(reply)
        typer.echo(json_text(message_dict(reply)) if json else one_line(history))
    return False


def _watch_screen(client: ControlClient, terminal: Console) -> bool:
    """Whether somebody left; if not, the daemon did."""
    history, left = History(), threading.Event()
    cancels: list[Callable[[], object]] = []

    def leave() -> None:
        left.set()
        for cancel in cancels:
            cancel()

    def began(cancel: Callable[[], object]) -> None:
        cancels.append(cancel)
        if left.is_set():
            cancel()

    # Between two replies Live draws again by itself, so that a new size of the terminal is met at once.
    with (
        _key(sys.stdin, "q", leave),
        Live(console=terminal, screen=True, refresh_per_second=4, redirect_stdout=False, redirect_stderr=False) as live,
    ):
        for reply in client.watch(period_s=PERIOD_S, began=began):
            history.add(reply)
            live.update(Picture(history), refresh=True)
    return left.is_set()


@contextlib.contextmanager
def _key(stream: TextIO, key: str, pressed: Callable[[], None]) -> Iterator[None]:
    """Call `pressed` in another thread when a key is pressed; nothing if `stream` is no terminal."""
    if os.name != "posix" or not stream.isatty():
        yield
        return
    import termios
    import tty

    file = stream.fileno()
    before = termios.tcgetattr(file)
    end, ended = os.pipe()

    def read() -> None:
        with contextlib.suppress(OSError):  # the terminal went away
            while end not in select.select([file, end], [], [])[0] and (typed := os.read(file, 64)):
                if key in typed.decode(errors="ignore").lower():
                    pressed()
                    return

    reader = threading.Thread(target=read, name="keys")
    tty.setcbreak(file, termios.TCSADRAIN)
    reader.start()
    try:
        yield
    finally:
        os.close(ended)  # the other end becomes readable
        reader.join()
        os.close(end)
        termios.tcsetattr(file, termios.TCSADRAIN, before)
