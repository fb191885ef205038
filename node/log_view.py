"""What `braniac-node logs` reads: the last lines of a node's log files, and then those to come, over every rotation."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

from braniac.node.errors import StateError

LEVELS = ("debug", "info", "warning", "error", "critical")
_LINE_BYTES_MAX = 1 << 20  # longer ones are cut in two: a damaged file must not fill our memory


def log_path(state_dir: Path) -> Path:
    """The log file of the node of a state directory; older ones have .1, .2, ... behind their name."""
    return state_dir / "logs" / "node.log"


def lines(path: Path, count: int, level: str, follow_sleep: Callable[[], object] | None = None) -> Iterator[str]:
    """The last `count` lines of at least `level`, oldest first; then, given a way to wait, every new one, for ever.

    Raises StateError if there is no log file.
    """
    files = _Files(path)
    if not files.open_oldest():
        raise StateError(
            f"there is no log in {path.parent}: start a node with 'braniac-node join', name its --state-dir, or set "
            "log.file=true"
        )
    with files:
        wanted = (line for line in files.read() if _important(line, level))
        yield from deque(wanted, maxlen=count)
        while follow_sleep is not None:
            follow_sleep()
            yield from (line for line in files.read() if _important(line, level))


def _important(line: str, level: str) -> bool:
    """Whether a line is of this level or above; what cannot be read is, for it may be the trace of a failure."""
    try:
        written = json.loads(line)["level"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return True
    return written not in LEVELS or LEVELS.index(written) >= LEVELS.index(level)


class _Files:
    """A log file and its predecessors, read as one that grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._rest = b""

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()

    def open_oldest(self) -> bool:
        """Begin at the oldest file; whether there is one."""
        return any(map(self._open, self._paths()))

    def read(self) -> Iterator[str]:
        """All whole lines that were not read yet."""
        while True:
            yield from self._read_file()
            following = self._following()
            if not following:
                return
            yield from self._read_file()  # what came between our last look and the rotation
            any(map(self._open, following))

    def _read_file(self) -> Iterator[str]:
        assert self._file is not None
        while piece := self._file.readline(_LINE_BYTES_MAX):
            self._rest += piece
            if self._rest.endswith(b"\n") or len(self._rest) >= _LINE_BYTES_MAX:
                line, self._rest = self._rest.decode(errors="replace").rstrip("\n"), b""
                yield line

    def _following(self) -> list[Path]:
        """The files after the one that is being read.

        Files are known by their number on disk, because their names wander: node.log becomes node.log.1.
        """
        assert self._file is not None
        mine, paths = os.fstat(self._file.fileno()).st_ino, self._paths()
        for place, path in enumerate(paths):
            if _inode(path) == mine:
                return paths[place + 1 :]
        return paths if self._path in paths else []  # else removed, or in the middle of a rotation

    def _open(self, path: Path) -> bool:
        with suppress(FileNotFoundError):  # rotated away this very moment
            file = path.open("rb")
            if self._file is not None:
                self._file.close()
            self._file, self._rest = file, b""
            return True
        return False

    def _paths(self) -> list[Path]:
        """The files that exist, oldest first."""
        numbered = []
        for path in self._path.parent.glob(self._path.name + ".*"):
            number = path.name.removeprefix(self._path.name + ".")
            if number.isdecimal():
                numbered.append((int(number), path))
        older = [path for _, path in sorted(numbered, reverse=True)]
        return [*older, *([self._path] if self._path.exists() else [])]


def _inode(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return path.stat().st_ino
    return None
