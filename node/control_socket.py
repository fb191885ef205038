"""Where the control API listens: a unix socket in the state directory that only its owner can open."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from braniac.node.errors import AlreadyRunning, ResourceError

PATH_BYTES_MAX = 107  # sockaddr_un has room for 108, one of them the terminating zero
ANSWER_S_MAX = 5.0


def target(path: Path) -> str:
    """The socket's name in grpc's spelling."""
    return "unix:" + quote(os.fsencode(path))


def check_length(path: Path) -> None:
    """Raises ResourceError if the system allows no socket at a path as long as this."""
    length = len(os.fsencode(path))
    if length > PATH_BYTES_MAX:
        raise ResourceError(
            f"the control socket's path {path} has {length} bytes and the system allows {PATH_BYTES_MAX}: "
            "choose a shorter --state-dir"
        )


def remove_stale(path: Path) -> None:
    """Remove what a killed daemon left. grpc would do so even to a socket on which a living one listens.

    Raises AlreadyRunning if a daemon answers there, ResourceError if something else is in the way.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ResourceError(f"{path} is in the way of the control socket: remove it, or choose another --state-dir")
    except OSError:
        return  # nothing there, or nothing we may look at: binding will tell
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ANSWER_S_MAX)
        try:
            probe.connect(os.fsencode(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise AlreadyRunning(f"a daemon answers on {path}: stop it, or choose another --state-dir")


@contextmanager
def only_for_the_owner() -> Iterator[None]:
    """Whatever is made inside has no permission bits for others, from its first instant."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)
