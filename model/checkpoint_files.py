"""Files of a checkpoint folder: finding them, reading the small ones, and writing so that nothing partial can be seen.

Whatever is read here may have been written by anybody: sizes are bounded, and weights are safetensors or nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import safetensors

from braniac.model.errors import CheckpointError
from braniac.model.slicing import Slice, infer

CONFIG_NAME = "config.json"
INDEX_SUFFIX = ".safetensors.index.json"

_MAX_JSON_BYTES = 1 << 20


def files_in(folder: Path) -> tuple[Path, ...]:
    """A checkpoint folder's config.json, weights and their index. Raises CheckpointError if there are none."""
    config = folder / CONFIG_NAME
    if not config.is_file():
        raise CheckpointError(f"{config} is missing: name a folder with a checkpoint.")
    names = sorted(file for file in folder.iterdir() if file.is_file())
    weights = [file for file in names if file.name.endswith(".safetensors")]
    if not weights:
        raise CheckpointError(f"{folder} holds no .safetensors file, and nothing else is read: convert its weights.")
    return (config, *weights, *(file for file in names if file.name.endswith(INDEX_SUFFIX)))


def held_by(files: Sequence[Path], base: int | None = None) -> Slice:
    """What the weights are, by their own shapes and the config.json that comes first in `files`.

    `base` is what a manifest states. Raises CheckpointError if the layers differ or the config contradicts them.
    """
    folder, widths = files[0].parent, set[int]()
    for file in files:
        if file.name.endswith(".safetensors"):
            try:
                with safetensors.safe_open(str(file), framework="pt") as opened:
                    names = [name for name in list(opened.keys()) if name.endswith(".mlp.up_proj.weight")]
                    shapes = [opened.get_slice(name).get_shape() for name in names]
            except (safetensors.SafetensorError, OSError) as error:
                raise CheckpointError(f"{file} is no valid safetensors file ({error}): fetch it again.") from error
            widths |= {shape[0] for shape in shapes if shape}
    if len(widths) != 1:
        raise CheckpointError(
            f"{folder} holds up_proj matrices of {sorted(widths)} neurons: one width in all layers is expected."
        )
    return infer(read_json(files[0]), width=widths.pop(), manifest_base=base, folder_name=folder.name)


def hash_file(path: Path) -> str:
    """SHA-256 of a file of any size, as 64 hexadecimal digits. Raises CheckpointError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): restore the file.") from error


def read_json(path: Path) -> dict[str, object]:
    """A JSON object of at most 1 MiB without repeated keys. Raises CheckpointError for anything else."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing or no file: restore it.")
        with path.open("rb") as file:
            data = file.read(_MAX_JSON_BYTES + 1)
        if len(data) > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_JSON_BYTES} bytes: it is no file of this kind.")
        document = json.loads(data, object_pairs_hook=_without_repeats)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON that can be read ({error}): restore it.") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} holds no JSON object: restore it.")
    return document


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is repeated")
    return found


@contextlib.contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A hidden folder on the target's file system, gone afterwards. Turns an OSError into a CheckpointError."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            yield Path(scratch)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {target} ({error.strerror or error}): choose a folder that exists and has room."
        ) from error


def write_durably(path: Path, data: bytes) -> None:
    """Create a file and return once its bytes are on the medium."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Return once the names in a directory are on the medium."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
