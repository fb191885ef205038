"""A disk that loses what was not synced: the file system's calls with a power cut between any two, or no space left."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import Counter
from io import FileIO
from pathlib import Path

from braniac.node.files import Files


class PowerCut(BaseException):
    """Not an Exception: nothing may catch it and tidy up, as nothing would after a power cut."""


class CrashingFiles(Files):
    """Stops at the `at`-th call, leaving what that failure would leave.

    kill: everything done before the call is there, and half of what the call itself does.
    power: only what was synced is there; an unsynced file has half of its bytes, an unsynced name is gone.
    reorder: names survive but unsynced bytes do not, the order a file system without barriers may choose.
    """

    def __init__(self, at: int, mode: str) -> None:
        self._left = at
        self._mode = mode
        self._unsynced: set[Path] = set()
        self._undo: list[tuple[Path, Path, Path | None, bytes | None]] = []  # directory, path, old path, old content

    def restart(self, at: int, mode: str) -> None:
        """A new process on the same disk: what was not synced is still not synced."""
        self._left = at
        self._mode = mode

    def _step(self) -> bool:
        """Whether the power fails during this call."""
        self._left -= 1
        return self._left == 0

    def crash(self) -> None:
        if self._mode != "kill":
            for path in self._unsynced:
                os.truncate(path, path.stat().st_size // 2)
        if self._mode == "power":
            for _, path, old_path, old_content in reversed(self._undo):
                if path.is_dir():
                    path.rmdir()
                elif old_path is not None:
                    path.rename(old_path)
                elif old_content is None:
                    path.unlink(missing_ok=True)
                if old_content is not None:
                    path.write_bytes(old_content)
        raise PowerCut

    def create(self, path: Path) -> FileIO:
        if self._step():
            self.crash()
        self._undo.append((path.parent, path, None, None))
        self._unsynced.add(path)
        return super().create(path)

    def write(self, file: FileIO, data: memoryview) -> None:
        if self._step():
            super().write(file, data[: len(data) // 2])
            self.crash()
        super().write(file, data)

    def fsync(self, file: FileIO) -> None:
        if self._step():
            self.crash()
        super().fsync(file)
        self._unsynced.remove(Path(os.fsdecode(file.name)))

    def fsync_directory(self, path: Path) -> None:
        if self._step():
            self.crash()
        self._undo = [entry for entry in self._undo if entry[0] != path]

    def rename(self, source: Path, target: Path) -> None:
        if self._step():
            self.crash()
        old = target.read_bytes() if target.exists() else None
        super().rename(source, target)
        if source in self._unsynced:
            self._unsynced.remove(source)
            self._unsynced.add(target)
        self._undo.append((target.parent, target, source, old))

    def remove(self, path: Path) -> None:
        if self._step():
            self.crash()
        old = path.read_bytes()
        super().remove(path)
        self._unsynced.discard(path)
        self._undo.append((path.parent, path, None, old))

    def mkdir(self, path: Path) -> None:
        if self._step():
            self.crash()
        super().mkdir(path)
        self._undo.append((path.parent, path, None, None))


class _Unsynced(Files):
    """In a simulation a real sync would only cost time: what it promises is what CrashingFiles keeps book of."""

    def fsync(self, file: FileIO) -> None:
        pass

    def fsync_directory(self, path: Path) -> None:
        pass


class SimDisk(CrashingFiles, _Unsynced):
    """The disk of one simulated machine, from boot to crash."""

    def __init__(self, fired: Counter[str], full: bool) -> None:
        """`fired` counts what went wrong; a `full` disk takes no more data until told otherwise."""
        super().__init__(0, "kill")
        self.full = full
        self._fired = fired
        self._dead = False

    def arm(self, calls: int, mode: str) -> None:
        """Let the power fail during the call of that number from now."""
        self.restart(calls, mode)

    def lose_power(self, mode: str) -> None:
        """Crash now, between two calls."""
        self._mode = mode
        with contextlib.suppress(PowerCut):
            self.crash()

    def crash(self) -> None:
        if not self._dead:
            self._dead = True
            if self._mode != "kill":
                self._fired["torn write"] += len(self._unsynced)
            if self._mode == "power":
                self._fired["lost write"] += len(self._undo)
            super().crash()
        raise PowerCut

    def _step(self) -> bool:
        return self._dead or super()._step()

    def write(self, file: FileIO, data: memoryview) -> None:
        if self._dead:
            raise PowerCut
        if self.full:
            super().write(file, data[: len(data) // 2])
            self._fired["disk full"] += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(file.name))
        super().write(file, data)
