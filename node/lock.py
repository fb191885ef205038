"""One process per directory: an advisory lock that the kernel releases when its holder dies.

The file holds the pid of the last holder, for the error message only. It is never removed: removing a lock file lets
two processes each lock their own copy of it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from braniac.node.errors import AlreadyRunning


class DirectoryLock:
    """Exclusive right to `directory`, from construction until `release` or the end of the process."""

    def __init__(self, directory: Path, option: str = "--state-dir") -> None:
        """Take the lock at once, or raise AlreadyRunning, which names the option that chose the directory.

        OSError if the file cannot be opened.
        """
        self._file = open(directory / "lock", "a+", encoding="ascii", opener=_private)  # noqa: SIM115 - held open on purpose
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._holder()
            self._file.close()
            raise AlreadyRunning(f"{directory} is held by {holder}: stop it, or choose another {option}") from None
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()

    def _holder(self) -> str:
        self._file.seek(0)
        pid = self._file.read(20)
        return f"process {pid}" if pid.isdecimal() else "another process"

    def release(self) -> None:
        """Give the directory up. Harmless when repeated."""
        self._file.close()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
