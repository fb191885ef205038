"""Copies of a node's key: out of its state directory as a backup, and back into one."""

from __future__ import annotations

import os
from pathlib import Path

from braniac.node import identity_file
from braniac.node.errors import ConfigError, IdentityFileError
from braniac.node.lock import DirectoryLock
from braniac.protocol.identity import Identity, PeerId, peer_id_text


def path_in(state_dir: Path) -> Path:
    """Where a node keeps its key."""
    return state_dir / "identity.key"


def own(state_dir: Path) -> Identity:
    """The key of a state directory. Raises IdentityFileError, also if there is none yet."""
    try:
        return identity_file.load(path_in(state_dir))
    except FileNotFoundError:
        raise IdentityFileError(
            f"{state_dir} holds no key: `braniac-node join` makes one, `braniac-node identity import` takes one over"
        ) from None


def export(state_dir: Path, target: Path, *, overwrite: bool) -> Identity:
    """Copy the key to `target`, readable by its owner only. Raises IdentityFileError, ConfigError."""
    identity = own(state_dir)
    _write(target.expanduser(), identity, overwrite=overwrite)
    return identity


def import_(state_dir: Path, source: Path, *, overwrite: bool) -> Identity:
    """Take over the key in `source`. Raises IdentityFileError, AlreadyRunning, ConfigError.

    What was offered under one key can only be acknowledged to that key, so a directory with another key's checkpoints
    is refused in any case.
    """
    try:
        identity = identity_file.load(source.expanduser())
    except FileNotFoundError:
        raise IdentityFileError(f"there is no key file {source}: check its path") from None
    target = path_in(state_dir)
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = DirectoryLock(state_dir)
    except OSError as error:
        raise ConfigError(f"cannot keep a key in {state_dir} ({error.strerror}): choose another --state-dir") from None
    try:
        if target.exists() and _peer_at(target) == identity.peer_id:
            return identity
        if any((state_dir / "generations").glob("*.json")):
            raise IdentityFileError(
                f"{state_dir} holds checkpoints of another key: import {source} into another --state-dir"
            )
        _write(target, identity, overwrite=overwrite)
    finally:
        lock.release()
    return identity


def _peer_at(path: Path) -> PeerId | None:
    """Whose key that is; None if it cannot be used."""
    try:
        return identity_file.load(path).peer_id
    except IdentityFileError:
        return None


def _write(path: Path, identity: Identity, *, overwrite: bool) -> None:
    """Raises ConfigError; who looks sees the old file or the whole new one."""
    if path.exists() and not overwrite:
        peer = _peer_at(path)
        whose = f"the key of {peer_id_text(peer)}" if peer else "something else"
        raise ConfigError(f"{path} holds {whose}: choose another place, or replace it with --force")
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(identity_file.encode(identity))
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(f"cannot write a key to {path} ({error.strerror}): choose another place") from None
