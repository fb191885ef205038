"""Checkpoint folders: written whole or not at all, one per tier beside the universal one, known by their schema.

X/            the universal checkpoint: config.json, *.safetensors and, if tiers were exported, the manifest
X-tier1/      its first half of FFN neurons, a checkpoint of its own
X-tier2/      its first quarter
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from braniac.model.errors import CheckpointError
from braniac.model.slicing import infer


def tier_folder(path: Path, tier: int) -> Path:
    """Where a tier of the universal checkpoint `path` lies: NAME-tier{t} beside it; tier 0 is `path` itself."""
    return path if tier == 0 else path.with_name(f"{path.name}-tier{tier}")


def write_folder(target: Path, files: Mapping[str, bytes], *, overwrite: bool = False) -> None:
    """Make the folder `target` appear with exactly these files, durable, or leave everything as it was.

    What was there before is replaced only if `overwrite`; a reader sees all of the old folder, for an instant none, or
    all of the new one. A killed process may leave a hidden sibling `.NAME.*`, which nothing reads. Raises
    CheckpointError if `target` exists, is no flat folder, or cannot be written.
    """
    for name in files:
        if name in ("", ".", "..") or any(character in name for character in "/\\:\0"):
            raise CheckpointError(f"cannot write a file named {name!r} to {target}: give a plain file name.")
    exists = os.path.lexists(target)
    if exists:
        _check_replaceable(target, overwrite)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
            new, old = Path(scratch, "new"), Path(scratch, "old")
            new.mkdir()
            for name, data in files.items():
                write_durably(new / name, data)
            sync_directory(new)
            try:
                if exists:
                    target.rename(old)
                new.rename(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise
            sync_directory(target.parent)
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


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not overwrite:
        raise CheckpointError(f"{target} exists: choose another name, or ask for it to be overwritten.")
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(f"{target} is no folder: remove it, or choose another name.")
    for entry in sorted(target.iterdir()):
        # Overwriting somebody's home directory by a slip must not be possible; a checkpoint holds files only.
        if entry.is_dir() and not entry.is_symlink():
            raise CheckpointError(f"{target} holds the folder {entry.name!r}, so it is no checkpoint: choose another.")


# What decides the parameters or the function of a model, its type, and the value that a missing key stands for.
_SCHEMA: Mapping[str, tuple[type, object]] = {
    "model_type": (str, None),
    "hidden_size": (int, None),
    "vocab_size": (int, None),
    "num_hidden_layers": (int, None),
    "num_attention_heads": (int, None),
    "num_key_value_heads": (int, None),
    "head_dim": (int, None),
    "max_position_embeddings": (int, None),
    "hidden_act": (str, "silu"),
    "rms_norm_eps": (float, 1e-6),
    "logit_softcap": (float, None),
    "attention_bias": (bool, False),
    "mlp_bias": (bool, False),
    "tie_word_embeddings": (bool, False),
    "nested_heads": (bool, False),
}
_DEFAULT_ROPE_THETA = 10000.0
_LARGEST_FLOAT = 1e300


def schema_hash(config: Mapping[str, object], names: Iterable[str]) -> str:
    """SHA-256 (hex) of what kind of model this is: equal for a universal checkpoint and all its slices.

    Of `config` (a config.json) only the keys that decide parameters or function count, in canonical spelling and with
    the base in place of the slice's width; `names` are the tensors' names in any order. It says nothing about values of
    weights. Raises CheckpointError for a key of a wrong type.
    """
    held = infer(config)
    fields = {key: _typed(key, config.get(key), kind, default) for key, (kind, default) in _SCHEMA.items()}
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    if fields["num_key_value_heads"] is None:
        fields["num_key_value_heads"] = heads
    if fields["head_dim"] is None and isinstance(heads, int) and isinstance(hidden, int) and heads:
        fields["head_dim"] = hidden // heads
    fields["rope"] = _rope(config)
    fields["base"] = held.base
    document = json.dumps([fields, sorted(set(names))], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(document.encode()).hexdigest()


def _typed(key: str, value: object, kind: type, default: object) -> object:
    """The value, or its default, in the one spelling that is hashed: floats as their exact hexadecimal."""
    if value is None:
        value = default
    if kind is float and isinstance(value, int | float) and type(value) is not bool:
        if abs(value) <= _LARGEST_FLOAT:  # NaN fails the comparison too
            return float(value).hex()
    elif value is None or type(value) is kind:
        return value
    raise CheckpointError(f"config.json has {key} {value!r}: it must be a {kind.__name__}.")


def _rope(config: Mapping[str, object]) -> dict[str, object]:
    """Rotary positions, which transformers 5 spells rope_parameters, others rope_theta and rope_scaling."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"config.json has rope_parameters or rope_scaling {scaling!r}: it must be an object.")
    theta = scaling.get("rope_theta", config.get("rope_theta"))
    kind = scaling.get("rope_type", scaling.get("type"))
    numbers = {key: value for key, value in scaling.items() if key not in ("rope_theta", "rope_type", "type")}
    return {
        "rope_theta": _typed("rope_theta", theta, float, _DEFAULT_ROPE_THETA),
        "rope_type": _typed("rope_type", kind, str, "default"),
        **{str(key): _typed(str(key), value, float, None) for key, value in numbers.items() if value is not None},
    }
