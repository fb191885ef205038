"""What systemd wants to hear of a service: that it is ready, how it does, that it still lives (sd_notify(3)).

Nothing is sent unless systemd asked for it in the environment, so the same program runs without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from braniac.node.clock import Clock
from braniac.node.control_pb2 import StatusReply

_PERIOD_S_MAX = 10.0
_PINGS_PER_WATCHDOG = 3  # one may be late, and one lost


class Notifier:
    """Datagrams to the socket that the service manager listens on, if there is one."""

    def __init__(
        self,
        environ: Mapping[str, str],
        pid: int | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._sleep = sleep
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        if address[:1] not in ("/", "@"):
            self._address = ""  # none, or not a unix socket
        of_ours = environ.get("WATCHDOG_PID", "") in ("", str(pid or os.getpid()))  # children inherit the variables
        text = environ.get("WATCHDOG_USEC", "")
        self.watchdog_s = int(text) / 1e6 if of_ours and text.isascii() and text.isdecimal() else 0.0
        """Without a ping for so long, the service is killed; 0: never."""

    def tell(self, *assignments: str) -> None:
        """Send variables such as READY=1. A manager that does not listen is no reason to fail."""
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)  # ASYNC: one datagram on this machine, or none
            channel.connect(self._address)
            channel.send("\n".join(assignments).encode())

    @contextlib.asynccontextmanager
    async def telling(self, describe: Callable[[], str], is_well: Callable[[], bool]) -> AsyncIterator[None]:
        """Ready from now on: say so, and how it goes, and ping from this event loop while it turns and all is well."""
        task = asyncio.create_task(self._keep_telling(describe, is_well)) if self._address else None
        self.tell("READY=1", f"STATUS={describe()}")
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _keep_telling(self, describe: Callable[[], str], is_well: Callable[[], bool]) -> None:
        period_s = min(_PERIOD_S_MAX, self.watchdog_s / _PINGS_PER_WATCHDOG or _PERIOD_S_MAX)
        while True:
            ping = ["WATCHDOG=1"] if self.watchdog_s and is_well() else []
            self.tell(*ping, f"STATUS={describe()}")
            await self._sleep(period_s)


class Pulse:
    """Whether slots go by. An event loop that turns while the node stands still is not worth a ping."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._slot: int | None = None
        self._since_s = clock.monotonic()

    def beats(self, slot: int | None, patience_s: float) -> bool:
        """Whether the slot has changed within `patience_s`; None, for a node that rests or has no run, always does."""
        now = self._clock.monotonic()
        if slot is None or slot != self._slot:
            self._slot, self._since_s = slot, now
        return now - self._since_s <= patience_s


def describe_status(reply: StatusReply) -> str:
    """One line for `systemctl status`."""
    why = "; ".join([*(reason.sentence for reason in reply.reasons), *filter(None, [reply.state_reason])])
    parts = [f"{reply.state}: {why}" if why else reply.state]
    if reply.run_id:
        parts.append(f"slot {reply.slot:,}, {reply.peers_live} peers")
    if reply.HasField("train_loss"):
        parts.append(f"loss {reply.train_loss:.3f}")
    return " ".join(", ".join(parts).split())
