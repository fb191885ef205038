"""An event loop in virtual time: the next timer is always due at once, and no real thread or socket exists.

Everything that asyncio's tasks, futures, locks and timeouts ask of a loop, and no more. A callback belongs to the host
(a simulated process) in whose context it was scheduled, so that a host can be frozen, as by SIGSTOP, and go on later.
Work for a thread runs in the loop too, at once in the eyes of everybody else, after a while that its host chooses.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar
from typing import Any, Protocol


class Host(Protocol):
    """A simulated process."""

    frozen: bool
    """While set, none of its callbacks run."""
    held: list[asyncio.Handle]
    """Those that were due meanwhile."""

    def thread_delay_s(self) -> float:
        """How long its next piece of work for a thread waits for its turn."""

    def run_in_thread(self, work: Callable[[], Any]) -> Any:
        """Do a piece of work for a thread."""


HOST: ContextVar[Host | None] = ContextVar("HOST", default=None)


class VirtualLoop(asyncio.AbstractEventLoop):
    """Runs one simulation."""

    def __init__(self) -> None:
        self.errors: list[dict[str, Any]] = []
        """What tasks raised without anybody looking."""
        self._now_s = 0.0
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = itertools.count()

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        """Let time pass until `main` returns; its result."""
        asyncio.events._set_running_loop(self)
        try:
            task = self.create_task(main)
            while not task.done():
                self._run_next()
            return task.result()
        finally:
            asyncio.events._set_running_loop(None)

    def _run_next(self) -> None:
        if not self._ready:
            assert self._timers, "nothing is left to do, and the simulation is not over"
            due_s, _, timer = heapq.heappop(self._timers)
            if timer.cancelled():
                return
            self._now_s = max(self._now_s, due_s)
            self._ready.append(timer)
        handle = self._ready.popleft()
        if handle.cancelled():
            return
        host = handle._context.get(HOST)  # type: ignore[attr-defined]
        if host is not None and host.frozen:
            host.held.append(handle)
        else:
            handle._run()

    def thaw(self, host: Host) -> None:
        """Let a host go on: what was due meanwhile is done now, in the same order."""
        host.frozen = False
        self._ready.extend(host.held)
        host.held.clear()

    # --- what asyncio asks -------------------------------------------------------------------------------------------

    def time(self) -> float:
        """Seconds since the simulation began."""
        return self._now_s

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Coroutine[Any, Any, Any], *, name: str | None = None, context: Context | None = None
    ) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def run_in_executor(self, executor: object, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """What asyncio.to_thread comes down to; also for a future that is cancelled, as a thread would."""
        host = HOST.get()
        assert host is not None, "only simulated processes have threads"
        future = self.create_future()

        def work() -> None:
            try:
                result = host.run_in_thread(lambda: func(*args))
            except BaseException as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        self.call_later(host.thread_delay_s(), work)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.errors.append(context)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return asyncio.events._get_running_loop() is self

    def is_closed(self) -> bool:
        return False

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Left in the heap until it would be due."""
