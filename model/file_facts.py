"""What reading a whole file has shown, remembered until the file changes, so that no start reads all text again.

A file is taken for unchanged if its size, times and inode are, as make and rsync do. Losing this memory, or a part of
it to another process that writes at the same time, costs the time to read the files once more and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NAME = "files.json"
_FORMAT = 1


class FileFacts:
    """Answers to questions about files, by path and question."""

    def __init__(self, folder: Path) -> None:
        """`folder` is where they are kept; nothing is read from a file there that is damaged."""
        self._file = folder / _NAME
        self._known = _read(self._file)
        self._changed = False

    def ask(self, path: Path, question: str, answer: Callable[[], int | str]) -> int | str:
        """What `answer` says of the file, from memory if it was asked before. Raises what `answer` does, OSError."""
        place, stamp = str(path.absolute()), _stamp(path)
        known = self._known.get(place)
        if known is None or known["stamp"] != stamp:
            known = {"stamp": stamp, "answers": {}}
        answers: dict[str, int | str] = known["answers"]
        if question not in answers:
            answers[question] = answer()
            if _stamp(path) == stamp:  # else it changed while it was read
                self._known[place] = known
                self._changed = True
        return answers[question]

    def sha256(self, path: Path) -> str:
        """Of its content, 64 hexadecimal digits. Raises OSError."""
        return str(self.ask(path, "sha256", lambda: _sha256(path)))

    def save(self) -> None:
        """Keep what is known of files that are still there; in vain where nothing can be written."""
        if not self._changed:
            return
        known = {place: fact for place, fact in (_read(self._file) | self._known).items() if os.path.lexists(place)}
        temporary = self._file.with_name(f".{_NAME}.{os.getpid()}")
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"format": _FORMAT, "files": known}), encoding="utf-8")
            temporary.replace(self._file)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
        known = content["files"] if content["format"] == _FORMAT else {}
        return {place: fact for place, fact in known.items() if isinstance(fact["answers"], dict) and fact["stamp"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
