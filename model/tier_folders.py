"""Checkpoint folders: written whole or not at all, one per tier beside the universal one.

    X/            the universal checkpoint: config.json, *.safetensors and, if tiers were exported, the manifest
    X-tier1/      its first half of FFN neurons, a checkpoint of its own
    X-tier2/      its first quarter

`resolve` says which of them to load for a tier, and how much of it to run. A slice that was exported before the
universal weights were trained further is still a slice of them by every measure here, so export again after training.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from braniac.model.checkpoint_files import (
    CONFIG_NAME,
    files_in,
    hash_file,
    held_by,
    read_json,
    scratch_beside,
    sync_directory,
    write_durably,
)
from braniac.model.errors import CheckpointError
from braniac.model.schema import schema_hash
from braniac.model.slicing import BASE_KEY, MAX_TIER, TIER_KEY, CheckpointWarning, Slice, infer
from braniac.model.tier_manifest import MANIFEST_NAME, Manifest, locate, read_manifest, verify

Strategy = Literal["auto", "sliced", "universal"]
"""Of loading a tier: its own folder if there is one, always its own folder, or always the universal one."""

COMMON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
"""Files beside the weights that every slice of a model shares."""


def tier_folder(path: Path, tier: int) -> Path:
    """Where a tier of the universal checkpoint `path` lies: NAME-tier{t} beside it; tier 0 is `path` itself."""
    return path if tier == 0 else path.with_name(f"{path.name}-tier{tier}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """Which checkpoint to load for a tier, and how much of it to run."""

    folder: Path
    """Holds the config.json and every weight."""
    files: tuple[Path, ...]
    """The config.json, then weights and index, then files shared by all tiers; verified if a manifest lists them."""
    held: Slice
    """What the weights in the files are, by their own shapes."""
    width: int
    """FFN neurons to run: those of the tier that was asked for, all that a sliced file holds."""


def resolve(path: Path, tier: int, strategy: Strategy) -> Resolution:
    """Choose the files for a tier of the checkpoint `path`, which may be a universal one or itself a slice.

    A slice is used for its own tier only and always at the width it holds, so nothing is ever sliced twice. Files that
    a manifest lists must match its hashes. `auto` falls back from a tier that has no files here to the universal ones,
    with a CheckpointWarning if a manifest lists them; whatever is malformed is an error under every strategy.
    Raises CheckpointError naming the file and what was expected.
    """
    if not 0 <= tier <= MAX_TIER:
        raise CheckpointError(f"there is no tier {tier}: choose one from 0 (whole) to {MAX_TIER}.")
    path = path.resolve()
    manifest = read_manifest(path)
    if tier == 0 or strategy == "universal":
        return _here(path, tier, strategy, manifest)
    if manifest is not None and tier in manifest.tiers:
        missing = [name for name in manifest.files_of(tier) if locate(path, name) is None]
        if not missing:
            return _slice(path, _listed(path, manifest, tier), tier, manifest.base)
        message = f"{path / MANIFEST_NAME} lists {missing[0]!r} for tier {tier}, which is missing"
        if strategy == "sliced":
            raise CheckpointError(f"{message}: fetch it, or load the universal checkpoint.")
        warnings.warn(f"{message}: the universal checkpoint is used.", CheckpointWarning, stacklevel=2)
    elif tier_folder(path, tier).is_dir():
        base = None
        if manifest is not None:
            base = manifest.base
        elif (path / CONFIG_NAME).is_file():
            base = infer(read_json(path / CONFIG_NAME), folder_name=path.name).base
        return _slice(path, files_in(tier_folder(path, tier)), tier, base)
    return _here(path, tier, strategy, manifest)


def write_manifest(universal: Path, tiers: Sequence[int]) -> Path:
    """Write the manifest of a universal checkpoint and the given tiers beside it; return its path.

    The universal files are listed as tier 0, which need not be given. Raises CheckpointError if a folder is missing or
    does not hold what its name says.
    """
    universal = universal.resolve()
    whole = held_by(files_in(universal))
    if not whole.whole:
        raise CheckpointError(f"{universal} holds {whole.width} of {whole.base} FFN neurons: name a whole checkpoint.")
    base = whole.base
    listed: dict[int, tuple[str, ...]] = {}
    common = tuple(name for name in COMMON_FILES if (universal / name).is_file())
    hashes = {name: hash_file(universal / name) for name in common}
    for tier in sorted({0, *tiers}):
        files = files_in(tier_folder(universal, tier))
        _slice(universal, files, tier, base)
        prefix = "" if tier == 0 else f"../{files[0].parent.name}/"
        listed[tier] = tuple(prefix + file.name for file in files)
        hashes |= {prefix + file.name: hash_file(file) for file in files}
    target = universal / MANIFEST_NAME
    with scratch_beside(universal) as scratch:
        write_durably(scratch / MANIFEST_NAME, Manifest(base, common, listed, hashes).encode())
        (scratch / MANIFEST_NAME).replace(target)
        sync_directory(universal)
    return target


def _here(path: Path, tier: int, strategy: Strategy, manifest: Manifest | None) -> Resolution:
    """The checkpoint `path` itself: whole and sliced while running, or already the slice that was asked for."""
    if manifest is not None and 0 in manifest.tiers:
        files = _listed(path, manifest, 0)
        if files[0].parent != path:
            raise CheckpointError(f"{path / MANIFEST_NAME} has tier 0 in {files[0].parent}: it must be in {path}.")
    else:
        files = files_in(path)
    held = held_by(files, None if manifest is None else manifest.base)
    if manifest is not None and (held.width, held.base) != (manifest.base, manifest.base):
        raise CheckpointError(
            f"{path} holds {held.width} of {held.base} FFN neurons but {MANIFEST_NAME} in it says {manifest.base} of "
            f"{manifest.base}: write it anew."
        )
    if held.whole:
        if tier > 0 and strategy == "sliced":
            raise CheckpointError(
                f"{path} has no sliced files of tier {tier}: export {tier_folder(path, tier).name}, or load with auto."
            )
        return Resolution(folder=path, files=files, held=held, width=_tier_width(path, held.base, tier))
    named = f"tier {held.tier}" if held.tier else "no tier"
    part = f"{path} holds {held.width} of {held.base} FFN neurons ({named})"
    if strategy == "universal":
        raise CheckpointError(f"{part}: the universal strategy would slice it twice, load a whole checkpoint.")
    if held.tier == 0 or held.tier != tier:
        raise CheckpointError(f"{part} but tier {tier} was asked for: load the checkpoint that it was sliced from.")
    return Resolution(folder=path, files=files, held=held, width=held.width)


def _slice(path: Path, files: tuple[Path, ...], tier: int, base: int | None) -> Resolution:
    """The files of one tier of the universal checkpoint `path`, after a check that this is what they are."""
    folder = files[0].parent
    held = held_by(files, base)
    wanted = _tier_width(path, base or held.base, tier)
    if (held.width, held.base) != (wanted, base or held.base):
        raise CheckpointError(
            f"{folder} holds {held.width} of {held.base} FFN neurons: tier {tier} of {path} is {wanted} of "
            f"{base or held.base}, export it again."
        )
    universal = path / CONFIG_NAME
    if universal.is_file() and _schema(files[0], held.base) != _schema(universal, held.base):
        raise CheckpointError(f"{folder} is a slice of another model than {path}: export it again.")
    return Resolution(folder=folder, files=files, held=held, width=held.width)


def _schema(config: Path, base: int) -> str:
    return schema_hash({**read_json(config), TIER_KEY: None, BASE_KEY: base}, ())


def _tier_width(path: Path, base: int, tier: int) -> int:
    if base % (1 << tier):
        raise CheckpointError(
            f"{path} has {base} FFN neurons: they cannot be halved {tier} times, ask for a lower tier."
        )
    return base >> tier


def _listed(path: Path, manifest: Manifest, tier: int) -> tuple[Path, ...]:
    """A tier's files as the manifest lists them, verified; the config.json comes first."""
    located = {name: locate(path, name) for name in manifest.files_of(tier)}
    files = {name: file for name, file in located.items() if file is not None}
    missing = [name for name in located if name not in files]
    if missing:
        raise CheckpointError(f"{path / MANIFEST_NAME} lists {missing[0]!r}, which is missing: fetch it again.")
    verify(path, manifest, files)
    ordered = tuple(sorted(files.values(), key=lambda file: file.name != CONFIG_NAME))
    for file in ordered[0].parent.glob("*.safetensors"):
        # Whoever loads the folder would read it too, and nobody has vouched for it.
        if file not in ordered:
            raise CheckpointError(f"{file} is not listed in {path / MANIFEST_NAME}: remove it, or write that anew.")
    return ordered


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
    with scratch_beside(target) as scratch:
        new, old = scratch / "new", scratch / "old"
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


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not overwrite:
        raise CheckpointError(f"{target} exists: choose another name, or ask for it to be overwritten.")
    if target.is_symlink() or not target.is_dir():
        raise CheckpointError(f"{target} is no folder: remove it, or choose another name.")
    for entry in sorted(target.iterdir()):
        # Overwriting somebody's home directory by a slip must not be possible; a checkpoint holds files only.
        if entry.is_dir() and not entry.is_symlink():
            raise CheckpointError(f"{target} holds the folder {entry.name!r}, so it is no checkpoint: choose another.")
