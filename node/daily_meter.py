"""Bytes exchanged with peers on the present local day, kept across restarts in a small file."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from datetime import date, datetime
from pathlib import Path

import structlog

from braniac.node.clock import Clock
from braniac.node.files import Files
from braniac.node.sensors import local_time

log = structlog.get_logger(__name__)

FILE_NAME = "traffic.json"
_SAVE_S = 10.0  # what a killed node forgets at most
_BYTES_MAX = 1 << 60


class DailyMeter:
    """Counts until local midnight, then from zero."""

    def __init__(
        self,
        path: Path | None,
        clock: Clock,
        *,
        files: Files | None = None,
        local: Callable[[float], datetime] = local_time,
    ) -> None:
        """Take up what the file at `path` says of this day; None keeps nothing."""
        self.sent_bytes = 0.0
        self.received_bytes = 0.0
        self._path = path
        self._clock = clock
        self._files = files or Files()
        self._local = local
        self._day = self._today()
        self._saved = ""
        if path is not None:
            self._load(path)

    def add(self, sent_bytes: float, received_bytes: float) -> None:
        """Count some more."""
        self._turn()
        self.sent_bytes += sent_bytes
        self.received_bytes += received_bytes

    def used_bytes(self) -> int:
        """Sent and received since midnight; may be asked from any thread."""
        return 0 if self._today() > self._day else int(self.sent_bytes + self.received_bytes)

    def save(self) -> None:
        """Make the count durable, if it changed; on a disk that takes nothing the old one stays."""
        text = json.dumps(
            {
                "day": self._day.isoformat(),
                "sent_bytes": int(self.sent_bytes),
                "received_bytes": int(self.received_bytes),
            }
        )
        if self._path is None or text == self._saved:
            return
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            with self._files.create(temporary) as file:
                self._files.write(file, memoryview(text.encode()))
                self._files.fsync(file)
            self._files.rename(temporary, self._path)
        except OSError as error:
            log.debug("could not save the day's traffic", reason=str(error))
            with contextlib.suppress(OSError):
                self._files.remove(temporary)
            return
        self._saved = text

    async def keep_saved(self, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        """Save now and then, for ever."""
        while True:
            await sleep(_SAVE_S)
            await asyncio.to_thread(self.save)

    def _turn(self) -> None:
        """At midnight all is forgotten. A clock that is set back takes the count along: nobody gains a day by that."""
        today = self._today()
        if today > self._day:
            self.sent_bytes = self.received_bytes = 0.0
        self._day = today

    def _today(self) -> date:
        return self._local(self._clock.wall()).date()

    def _load(self, path: Path) -> None:
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            day, sent, received = date.fromisoformat(told["day"]), told["sent_bytes"], told["received_bytes"]
            if not all(isinstance(count, int) and 0 <= count < _BYTES_MAX for count in (sent, received)):
                raise ValueError("a count out of bounds")
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning(
                "the count of the day's traffic cannot be read, counting from 0", path=str(path), reason=repr(error)
            )
            return
        if day >= self._day:
            self.sent_bytes, self.received_bytes = float(sent), float(received)
