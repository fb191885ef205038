"""How the store changes the disk: the single calls, and in which order they make a file durable.

What is written when, and what may be removed, is `store.py`'s business.
"""

from __future__ import annotations

import contextlib
import errno
import os
from io import FileIO
from pathlib import Path


class Files:
    """The calls that change the disk, one method each, so that a test can cut the power between any two of them."""

    def create(self, path: Path) -> FileIO:
        """An empty file open for writing, readable by its owner only."""
        return FileIO(path, "w", opener=lambda name, flags: os.open(name, flags, 0o600))

    def write(self, file: FileIO, data: memoryview) -> None:
        """Append all of `data`; the system may take it in pieces."""
        while data:
            data = data[file.write(data) :]

    def fsync(self, file: FileIO) -> None:
        """Return once the file's bytes are on the medium."""
        os.fsync(file.fileno())

    def fsync_directory(self, path: Path) -> None:
        """Return once the names in the directory are on the medium."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Atomically give `source` the name `target`."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Unlink a file."""
        os.unlink(path)

    def mkdir(self, path: Path) -> None:
        """Make a directory for its owner only."""
        os.mkdir(path, 0o700)


class ReadOnlyFiles(Files):
    """For whoever only looks: nothing can be created, and nothing is removed even if it is damaged."""

    def create(self, path: Path) -> FileIO:
        """Refuse."""
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def remove(self, path: Path) -> None:
        """Refuse."""
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def write_whole(files: Files, path: Path, data: memoryview, *, keep: bool = False) -> None:
    """Make `path` appear, whole and durable, or not at all. Raises OSError.

    `keep`: then `path` holds what it held before, or `data`; without it, nothing if `data` may not be durable.
    """
    temporary = path.with_name(path.name + ".tmp")
    doubtful = [temporary]
    try:
        with files.create(temporary) as file:
            files.write(file, data)
            files.fsync(file)
        files.rename(temporary, path)
        doubtful = [] if keep else [path]  # its name may not be durable, and `Store.put` would believe in it
        files.fsync_directory(path.parent)
    except OSError:
        for leftover in doubtful:
            with contextlib.suppress(OSError):
                files.remove(leftover)
        raise


def make_directory(files: Files, path: Path) -> None:
    """Make a directory, durably, unless it is there. Raises OSError."""
    if not path.is_dir():
        files.mkdir(path)
        files.fsync_directory(path.parent)


def remove_others(files: Files, directory: Path, names: set[str]) -> int:
    """Remove all files but those of these names: how many. Raises OSError."""
    others = [path for path in sorted(directory.iterdir()) if path.name not in names]
    for path in others:
        files.remove(path)
    if others:
        files.fsync_directory(directory)
    return len(others)
