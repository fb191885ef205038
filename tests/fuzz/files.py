"""Files for decoders that read from a path."""

from __future__ import annotations

import atexit
import functools
import tempfile
from pathlib import Path


@functools.cache
def folder() -> Path:
    """Where they are put; gone when the process ends."""
    made = tempfile.TemporaryDirectory(prefix="braniac-fuzz-")
    atexit.register(made.cleanup)
    return Path(made.name)


def file_of(name: str, data: bytes) -> Path:
    """A file of its owner's with these bytes."""
    path = folder() / name
    path.write_bytes(data)
    path.chmod(0o600)
    return path
