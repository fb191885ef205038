"""Small files of the state directory that outlive every generation: which start this is, and what may have been signed.

They are no part of a generation, because whoever goes back to an older one must not go back with these: a number of a
start that is used twice makes the swarm take new messages for replays, a slot that is signed for twice gets a peer
banned. A file is replaced whole by one rename; one that rotted counts as missing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from braniac.node.files import Files, write_whole
from braniac.protocol.spans import Spans

_STARTS_MAX = (1 << 32) - 1


class Marks:
    """`<root>/starts` and `<root>/signed`."""

    def __init__(self, root: Path, files: Files, writing: Callable[[], AbstractContextManager[object]]) -> None:
        """`writing`: entered for every write, to keep others out and to give failures of the disk their name."""
        self._root = root
        self._files = files
        self._writing = writing

    def count_start(self, least: int) -> int:
        """The number of this start: above those of all earlier ones here, and at least `least`.

        It is durable when this returns, however soon the process ends. Raises DiskFull.
        """
        before = int(self._line_in("starts") or 0)  # none yet, or damaged: then `least` has to do
        number = max(least, before + 1 if before < _STARTS_MAX else 0)
        self._write_line("starts", str(number))
        return number

    def note_signing(self, first: int, last: int) -> Spans:
        """Make it durable that there may be signatures for these slots too; all such slots. Raises DiskFull."""
        with self._writing():
            signed = self.signed().adding(first, last)
            self._write_line("signed", signed.to_text())
        return signed

    def signed(self) -> Spans:
        """The slots for which there may be signatures."""
        try:
            return Spans.from_text(self._line_in("signed") or "")
        except ValueError:
            return Spans()

    def _line_in(self, name: str) -> str | None:
        """The line in a small file; None if there is none, or if it is damaged."""
        try:
            data = (self._root / name).read_bytes()
            line = data.rpartition(b" ")[0].decode("ascii")
        except (OSError, ValueError):
            return None
        return line if data == _sealed(line) else None

    def _write_line(self, name: str, line: str) -> None:
        with self._writing():
            write_whole(self._files, self._root / name, memoryview(_sealed(line)), keep=True)


def _sealed(text: str) -> bytes:
    """A line and its hash: one digit that rots could keep a node silent for years."""
    return f"{text} {hashlib.sha256(text.encode()).hexdigest()}".encode()
