"""The tensors of a Hugging Face folder: found by the headers of their files, checked, and read one at a time.

A folder has model.safetensors, or shards that model.safetensors.index.json names. Pickles are never opened: reading one
runs whatever its author wrote into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from braniac.model.checkpoint_files import INDEX_SUFFIX, read_json
from braniac.model.errors import CheckpointError
from braniac.model.tiers import is_input_major

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model" + INDEX_SUFFIX

_TYPES = ("F32", "BF16", "F16")
_MAX_NAME = 200
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Frequencies that old versions of transformers stored beside the weights; they follow from the configuration.
_DERIVED = ".self_attn.rotary_emb.inv_freq"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, by what the file's header says."""

    name: str
    file: Path
    shape: tuple[int, ...]
    """Of the disk's orientation, that of nn.Linear."""
    dtype: str
    """safetensors' word for it, such as BF16."""


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Name -> every tensor of a folder. No weight is read.

    Raises CheckpointError for pickles, files that are missing or damaged, an index that leads elsewhere or does not
    list exactly what its shards hold, and a tensor that occurs twice.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        if not (folder / WEIGHTS_NAME).is_file():
            raise CheckpointError(_nothing_in(folder))
        return _header(folder / WEIGHTS_NAME)
    listed = _listed(index)
    if WEIGHTS_NAME not in listed.values() and (folder / WEIGHTS_NAME).exists():
        raise CheckpointError(f"{folder} holds {WEIGHTS_NAME} beside an {INDEX_NAME} without it: remove one of them.")
    found: dict[str, Stored] = {}
    for shard in sorted(set(listed.values())):
        for name, stored in _header(folder / shard).items():
            if name in found:
                raise CheckpointError(f"{stored.file} holds {name!r}, as does {found[name].file}: remove one of them.")
            if name not in listed:
                raise CheckpointError(f"{stored.file} holds {name!r}, which {index} does not list: fetch both again.")
            found[name] = stored
    for name, shard in listed.items():
        if not name.endswith(_DERIVED) and (name not in found or found[name].file.name != shard):
            raise CheckpointError(f"{folder / shard} lacks {name!r}, which {index} says it holds: fetch both again.")
    return found


def check_tensors(folder: Path, found: Mapping[str, Stored], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless the tensors are exactly those in `shapes` (of memory's orientation)."""
    for name, shape in shapes.items():
        if name not in found:
            raise CheckpointError(
                f"{folder} lacks the tensor {name!r} of shape {_turned(name, shape)}: fetch it again."
            )
    for name, stored in found.items():
        if name not in shapes:
            raise CheckpointError(
                f"{stored.file} holds {name!r}, which its config.json leaves no place for: fetch both again."
            )
        if stored.shape != _turned(name, shapes[name]):
            wanted = _turned(name, shapes[name])
            raise CheckpointError(f"{stored.file} holds {name!r} of shape {stored.shape}: config.json needs {wanted}.")
        if stored.dtype not in _TYPES:
            raise CheckpointError(
                f"{stored.file} holds {name!r} as {stored.dtype}: one of {', '.join(_TYPES)} is expected."
            )


def read_tensor(stored: Stored, rows: int) -> Tensor:
    """The first `rows` rows (of memory's orientation) of a checked tensor, in memory's orientation and its own dtype.

    Raises CheckpointError if what is read is not finite.
    """
    try:
        with safetensors.safe_open(str(stored.file), framework="pt") as opened:
            lazy = opened.get_slice(stored.name)
            tensor: Tensor = lazy[:, :rows].mT if is_input_major(stored.name) else lazy[:rows]
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{stored.file} cannot be read ({error}): fetch it again.") from error
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{stored.file} holds {stored.name!r} with values that are not finite: fetch it again.")
    return tensor


def _turned(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Between memory and disk, either way."""
    return shape[::-1] if is_input_major(name) else shape


def _header(file: Path) -> dict[str, Stored]:
    try:
        with safetensors.safe_open(str(file), framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys() if not name.endswith(_DERIVED)}  # noqa: SIM118
            return {n: Stored(n, file, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no valid safetensors file ({error}): fetch it again.") from error


def _listed(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index has them; every file is there, in the index's own folder."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(shard, str) for shard in listed.values()):
        raise CheckpointError(f"{index} has no 'weight_map' of tensor names to file names: fetch it again.")
    for shard in set(listed.values()):
        if shard.endswith(_PICKLES):
            raise CheckpointError(
                f"{index} names {shard!r}, a pickle: only .safetensors files are read, convert it first."
            )
        plain = shard.isascii() and shard.isprintable() and len(shard) <= _MAX_NAME and "\\" not in shard
        if not plain or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index} names {shard!r}: only .safetensors files of its own folder are read.")
        if not (index.parent / shard).is_file():
            raise CheckpointError(f"{index} names {shard!r}, which is missing: fetch it again.")
    return listed


def _nothing_in(folder: Path) -> str:
    pickles = sorted(file.name for file in folder.iterdir() if file.name.endswith(_PICKLES))
    if pickles:
        return (
            f"{folder / pickles[0]} is a pickle, which could run anything: only .safetensors is read, convert it first."
        )
    return f"{folder} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}: name a folder that has one of them."
