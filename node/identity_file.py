"""The key file: an Ed25519 key in libp2p's protobuf form, so that the libp2p daemon and we are the same peer.

The file is PrivateKey{Ed25519, seed | public key} of the libp2p specs (peer-ids.md), always 68 bytes.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from braniac.node.errors import IdentityFileError
from braniac.protocol.identity import Identity

_PREFIX = bytes([0x08, 0x01, 0x12, 0x40])  # field 1: key type Ed25519; field 2: 64 bytes
_RSA_PREFIX = bytes([0x08, 0x00])
_FILE_BYTES = len(_PREFIX) + 64


def load_or_create(path: Path) -> Identity:
    """The identity kept at `path`; a new one, readable by its owner only, if there is no such file.

    Raises IdentityFileError.
    """
    try:
        return load(path)
    except FileNotFoundError:
        pass
    try:
        return _create(path)
    except FileExistsError:  # another process was faster: its key is the identity
        return load(path)
    except OSError as error:
        raise IdentityFileError(f"cannot write a key file at {path} ({error.strerror}): choose another path") from None


def load(path: Path) -> Identity:
    """The identity kept at `path`. Raises IdentityFileError, FileNotFoundError."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_IMODE(status.st_mode) & 0o077:
                raise IdentityFileError(f"the key file {path} is open to other users: run `chmod 600 {path}`")
            data = file.read(_FILE_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise IdentityFileError(
            f"cannot read the key file {path} ({error.strerror}): check its path and owner"
        ) from None
    return _decode(data, path)


def encode(identity: Identity) -> bytes:
    """The 68 bytes of the file."""
    return _PREFIX + identity.seed + identity.public_key


def _decode(data: bytes, path: Path) -> Identity:
    if data.startswith(_RSA_PREFIX):
        raise IdentityFileError(f"the key file {path} holds an RSA key: move it away, and an Ed25519 key will be made")
    identity = Identity.from_seed(data[len(_PREFIX) : len(_PREFIX) + 32].ljust(32, b"\0"))
    if data != encode(identity):  # length, type, or a public half that is not of this seed
        raise IdentityFileError(
            f"the key file {path} is damaged: restore it from a backup, or delete it to begin under a new identity"
        )
    return identity


def _create(path: Path) -> Identity:
    identity = Identity.from_seed(os.urandom(32))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(encode(identity))
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()  # half a key would be refused for ever
        raise
    return identity
