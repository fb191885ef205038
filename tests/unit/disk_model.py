"""A disk that may lose what was not synced: every state in which a crash can leave it.

`DiskModel` does what the store asks for, on the real disk, and keeps a record. From that, `after_crash` derives what
the next start may find: names that were not synced may be gone, each for itself, and bytes that were not synced may be
there, missing, cut in half, or zeros. That is worse than any one file system does.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from braniac.node.files import Files

SUBSETS_NAMES_MAX = 5
"""Of more names that were not synced, none, one, all but one or all survive, instead of any of them."""
TORN = ("whole", "missing", "half", "zeros")
"""What may become of bytes that were not synced."""

Tree = frozenset[tuple[Path, bytes | None]]
"""Paths below the root, and what is in them; None for a directory."""


class Crash(BaseException):
    """Not an Exception: nothing may catch it and tidy up, as nothing would after a power cut."""


@dataclass(eq=False)
class _Inode:
    """A file, or a directory if it has names."""

    data: bytes = b""
    durable: bytes = b""
    names: dict[str, _Inode] | None = None


@dataclass(eq=False)
class _Change:
    """Of names in one directory: what they mean from now on, None being nothing."""

    directory: _Inode
    sets: dict[str, _Inode | None]
    durable: bool = False

    def apply(self, names: dict[str, _Inode]) -> None:
        for name, inode in self.sets.items():
            if inode is None:
                names.pop(name, None)
            else:
                names[name] = inode


class DiskModel(Files):
    """What becomes of the directory `root`, which is empty at first."""

    def __init__(self, root: Path, watch: Callable[[], None]) -> None:
        """`watch` is called before every call and in the middle of every write; to die there, it raises Crash."""
        self.watch = watch
        self._root = root
        self._top = _Inode(names={})
        self._changes: list[_Change] = []
        self._files: list[_Inode] = []

    # --- what the store asks for -------------------------------------------------------------------------------------

    def create(self, path: Path) -> FileIO:
        self.watch()
        self._files.append(_Inode())
        self._change(path.parent, {path.name: self._files[-1]})
        return super().create(path)

    def write(self, file: FileIO, data: memoryview) -> None:
        inode, half = self._inode(Path(os.fsdecode(file.name))), len(data) // 2
        for part in (data[:half], data[half:]):
            self.watch()
            inode.data += bytes(part)
            super().write(file, part)

    def fsync(self, file: FileIO) -> None:
        self.watch()
        inode = self._inode(Path(os.fsdecode(file.name)))
        inode.durable = inode.data

    def fsync_directory(self, path: Path) -> None:
        self.watch()
        directory = self._inode(path)
        for change in self._changes:
            change.durable |= change.directory is directory

    def rename(self, source: Path, target: Path) -> None:
        self.watch()
        assert source.parent == target.parent, "the model knows one change of one directory at a time"
        self._change(target.parent, {source.name: None, target.name: self._inode(source)})
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self.watch()
        self._change(path.parent, {path.name: None})
        super().remove(path)

    def mkdir(self, path: Path) -> None:
        self.watch()
        self._change(path.parent, {path.name: _Inode(names={})})
        super().mkdir(path)

    def _change(self, directory: Path, sets: dict[str, _Inode | None]) -> None:
        change = _Change(self._inode(directory), sets)
        assert change.directory.names is not None
        change.apply(change.directory.names)
        self._changes.append(change)

    def _inode(self, path: Path) -> _Inode:
        inode = self._top
        for name in path.relative_to(self._root).parts:
            assert inode.names is not None
            inode = inode.names[name]
        return inode

    # --- what is left ------------------------------------------------------------------------------------------------

    def after_crash(self) -> set[Tree]:
        """Every tree that the next start may find if power fails now."""
        pending = [change for change in self._changes if not change.durable]
        torn = TORN if any(inode.data != inode.durable for inode in self._files) else TORN[:1]
        return {
            self._tree([change for change in self._changes if change.durable or change in kept], mode)
            for kept in _subsets(pending)
            for mode in torn
        }

    def _tree(self, changes: Iterable[_Change], mode: str) -> Tree:
        names: dict[_Inode, dict[str, _Inode]] = defaultdict(dict)
        for change in changes:
            change.apply(names[change.directory])

        def walk(directory: _Inode, path: Path) -> Iterator[tuple[Path, bytes | None]]:
            for name, inode in names[directory].items():
                if inode.names is None:
                    yield path / name, _content(inode, mode)
                else:
                    yield path / name, None
                    yield from walk(inode, path / name)

        return frozenset(walk(self._top, Path()))


def _content(inode: _Inode, mode: str) -> bytes:
    rest = inode.data[len(inode.durable) :]
    match mode:
        case "missing":
            rest = b""
        case "half":
            rest = rest[: len(rest) // 2]
        case "zeros":
            rest = bytes(len(rest))
    return inode.durable + rest


def _subsets(changes: list[_Change]) -> Iterator[tuple[_Change, ...]]:
    count = len(changes)
    sizes = range(count + 1) if count <= SUBSETS_NAMES_MAX else (0, 1, count - 1, count)
    for size in sizes:
        yield from itertools.combinations(changes, size)


def put_tree(root: Path, tree: Tree) -> None:
    """Make `root` hold a tree and nothing else."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, data in sorted(tree, key=lambda entry: entry[0]):  # directories before what is in them
        if data is None:
            (root / path).mkdir()
        else:
            (root / path).write_bytes(data)
