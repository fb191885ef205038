"""What can go wrong with a node, one class and one exit code each.

* NodeError                      1  anything below, when nothing more exact is known
  x ConfigError                  2  a flag, a key, a value or a path that cannot be used
  x AlreadyRunning               4  another process holds the state directory
  x Incompatible                 5  another run id or protocol version
  x IdentityFileError            6  the key file cannot be used, or its identity is in use elsewhere
  x ResourceError                7  a port in use, a socket path too long, memory too small for any tier
  x StateError                   8  no generation in the state directory can be read
  x NotRunning                   9  no daemon answers on the control socket

Every message is one sentence that names the cause and what to do next; the command line prints it without a traceback.
Exit code 0 is a clean leave, 3 is kept for "restart wanted", 2 is also what the argument parser uses; `doctor` ends
with 10 for warnings and 11 for errors that it found.
"""

from __future__ import annotations


class NodeError(Exception):
    """Root of everything `braniac.node` raises on purpose."""

    exit_code = 1


class ConfigError(NodeError):
    """A flag, key, value or path that cannot be used."""

    exit_code = 2


class AlreadyRunning(NodeError):
    """Another process holds the state directory."""

    exit_code = 4


class Incompatible(NodeError):
    """The run has another id, or speaks another protocol version."""

    exit_code = 5


class IdentityFileError(NodeError):
    """The key file is missing, damaged or open to others."""

    exit_code = 6


class ResourceError(NodeError):
    """The machine lacks something: a free port, memory, disk."""

    exit_code = 7


class StateError(NodeError):
    """Nothing in the state directory can be read."""

    exit_code = 8


class NotRunning(NodeError):
    """No daemon answers on the control socket."""

    exit_code = 9
