"""How a command fails: one sentence on stderr and an exit code; a traceback only for whoever asked for it."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Iterator

from braniac.node.errors import ConfigError, Incompatible, NodeError, ResourceError

# The machine's fault, not ours: reported as a sentence about the file instead of a request to report a bug.
_MACHINE_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOTDIR}


def explain(error: Exception) -> int:
    """Say on stderr, in one sentence, why a command failed, and return its exit code.

    A failure that nobody foresaw is our bug and ends with a request to report it; BRANIAC_DEBUG=1 adds the traceback.
    """
    causes = list(_leaves(error))
    bug = next((cause for cause in causes if _exit_code(cause) is None), None)
    if os.environ.get("BRANIAC_DEBUG", "0") not in {"", "0"}:
        traceback.print_exception(error, file=sys.stderr)
    if bug is not None:
        what = f"{type(bug).__name__}: {_one_line(bug)}".removesuffix(": ")
        print_error(f"unexpected {what}; this is a bug, please report it with what the same command says after --debug")
        return 1
    print_error(_one_line(causes[0]))
    return _exit_code(causes[0]) or 1


def in_short(error: Exception) -> str:
    """Why something failed, on one line."""
    return "; ".join(_one_line(cause) or type(cause).__name__ for cause in _leaves(error))


def print_error(sentence: str) -> None:
    """Write one line to stderr, signed with the program's name."""
    sys.stderr.write(f"braniac-node: {sentence}\n")


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions inside the groups that task groups raise."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


def _exit_code(error: BaseException) -> int | None:
    """The exit code of an error that was foreseen; None for our bugs."""
    from braniac.model import errors as model
    from braniac.protocol import errors as protocol

    match error:
        case NodeError():
            return error.exit_code
        case model.ConfigError() | model.DataError():  # a preset, a path: what somebody typed
            return ConfigError.exit_code
        case protocol.VersionMismatch():
            return Incompatible.exit_code
        case model.ModelError() | protocol.ProtocolError():
            return NodeError.exit_code
        case OSError() if error.errno in _MACHINE_ERRNOS:
            return ResourceError.exit_code
    return None


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: {error.filename}; make sure that it can be written and that the disk is not full"
    return " ".join(str(error).split())
