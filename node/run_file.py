"""A signed run manifest in a file, as `braniac-node init` writes it and `join --run` takes it."""

from __future__ import annotations

import binascii
import json
import os
from pathlib import Path

from braniac.node.errors import ConfigError
from braniac.protocol import limits
from braniac.protocol.errors import ManifestError, VersionMismatch
from braniac.protocol.manifest import Manifest, from_json, open_manifest, to_json

_FORMAT = 1
_BYTES_MAX = 4 * limits.MANIFEST_BYTES_MAX


def write(path: Path, body: bytes, signature: bytes, *, overwrite: bool) -> None:
    """Raises ConfigError if the file cannot be written, or is there and must not be replaced."""
    text = json.dumps({"braniac_run": _FORMAT, **to_json(body, signature)}, indent=1) + "\n"
    draft = path.with_name(path.name + ".new")
    try:
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists: choose another --out, or replace that run with --force")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}): choose another --out") from None


def read(path: Path) -> tuple[Manifest, tuple[bytes, bytes]]:
    """The run in a file: (manifest, (body, signature)). Raises ConfigError, VersionMismatch."""
    try:
        with path.open("rb") as file:
            data = file.read(_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read the run file {path} ({error.strerror}): check its path") from None
    try:
        content = json.loads(data)
        if type(content) is not dict or content.get("braniac_run") != _FORMAT:
            raise ValueError
        signed = from_json(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error):
        raise ConfigError(f"{path} is not a run file: make one with `braniac-node init`, or get a whole copy") from None
    try:
        return open_manifest(*signed), signed
    except VersionMismatch:
        raise
    except ManifestError as error:
        raise ConfigError(f"the run file {path} cannot be used: {error}; get a fresh copy from its founder") from None
