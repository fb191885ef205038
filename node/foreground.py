"""How a daemon runs in the foreground: its event loop, and the signals that end it."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine

from braniac.node.logs import route_hivemind

_SWITCH_INTERVAL_S = 0.001  # a training thread holds the interpreter's lock; the event loop must get it back quickly


def leave_when_told(leave: Callable[[], object]) -> None:
    """Call `leave` at every SIGTERM and Ctrl-C that the running loop gets."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, leave)


def run(main: Coroutine[None, None, None]) -> int:
    """Run a daemon to its end: the exit code. Raises what it raises."""
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    route_hivemind()
    if sys.platform == "win32":
        asyncio.run(main)
    else:
        import uvloop

        uvloop.run(main)
    return 0
