"""`matformer_manifest.json` of a universal checkpoint: which files each tier consists of, and their SHA-256.

    {"schema_version": 1, "matformer_base_intermediate_size": 1024, "common_files": ["tokenizer.json"],
     "tiers": [{"tier": 1, "intermediate_size": 512, "files": ["../X-tier1/config.json", ...]}, ...],
     "sha256": {"tokenizer.json": "<64 hex>", "../X-tier1/config.json": "<64 hex>", ...}}

The format is psyche-elastic's. Unlike there nothing in it is trusted, as anybody may have written it: a path is
relative, POSIX, and leads, symbolic links followed, to nowhere but the universal folder's parent, where siblings lie.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from braniac.model.checkpoint_files import CONFIG_NAME, INDEX_SUFFIX, hash_file, read_json
from braniac.model.errors import CheckpointError
from braniac.model.slicing import BASE_KEY, MAX_TIER, MAX_WIDTH, WIDTH_KEY

MANIFEST_NAME = "matformer_manifest.json"

_MAX_PATH = 512
_HASH = re.compile(r"[0-9a-f]{64}")
_COMMON_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".py")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest whose every claim has been checked, except those about the files themselves."""

    base: int
    """FFN neurons of the universal checkpoint."""
    common: tuple[str, ...]
    """Files that every tier shares, such as the tokenizer's."""
    tiers: Mapping[int, tuple[str, ...]]
    """Files of each tier: its config.json, its weights and their index."""
    sha256: Mapping[str, str]
    """Hexadecimal hash of each file above."""

    def files_of(self, tier: int) -> tuple[str, ...]:
        """A tier's own files and the common ones, each once."""
        return tuple(dict.fromkeys((*self.tiers[tier], *self.common)))

    def encode(self) -> bytes:
        """The JSON to write."""
        tiers = [
            {"tier": tier, WIDTH_KEY: self.base >> tier, "files": list(files)} for tier, files in self.tiers.items()
        ]
        document = {
            "schema_version": 1,
            BASE_KEY: self.base,
            "common_files": list(self.common),
            "tiers": tiers,
            "sha256": dict(self.sha256),
        }
        return json.dumps(document, indent=2).encode() + b"\n"


def read_manifest(universal: Path) -> Manifest | None:
    """The manifest in a universal checkpoint's folder, or None if there is none.

    Raises CheckpointError naming the file and the key for anything that is not exactly schema version 1.
    """
    path = universal / MANIFEST_NAME
    if not path.is_symlink() and not path.exists():
        return None
    document = read_json(path)
    _has_keys(path, "the manifest", document, ("schema_version", BASE_KEY, "common_files", "tiers", "sha256"))
    if document["schema_version"] != 1 or type(document["schema_version"]) is not int:
        _refuse(path, f"schema_version is {document['schema_version']!r}", "1 is the only one known")
    base = _whole(path, BASE_KEY, document[BASE_KEY], 1, MAX_WIDTH)
    common = _paths(path, "common_files", document["common_files"])
    for name in common:
        if not name.endswith(_COMMON_SUFFIXES):
            _refuse(path, f"common_files names {name!r}", f"only {', '.join(_COMMON_SUFFIXES)} are common files")
    entries, tiers = document["tiers"], dict[int, tuple[str, ...]]()
    if not isinstance(entries, list):
        _refuse(path, "tiers is no list", "write it anew")
    for entry in entries:
        tier, files = _entry(path, entry, base)
        if tier in tiers:
            _refuse(path, f"tier {tier} is listed twice", "keep one entry")
        tiers[tier] = files
    return Manifest(
        base, common, tiers, _hashes(path, document["sha256"], {*common, *(f for t in tiers.values() for f in t)})
    )


def locate(universal: Path, name: str) -> Path | None:
    """The regular file that a manifest's path names, or None if nothing has that name.

    Raises CheckpointError if it leads outside the universal folder's parent or is no regular file.
    """
    root = universal.resolve().parent
    path = root / name[3:] if name.startswith("../") else universal / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            _refuse(universal / MANIFEST_NAME, f"{name!r} is a link to nothing", "restore the file")
        return None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise CheckpointError(f"{path} cannot be read ({error}): restore the file.") from error
    if not real.is_relative_to(root):
        _refuse(universal / MANIFEST_NAME, f"{name!r} leads to {real}", f"only files below {root} can be used")
    if not stat.S_ISREG(mode):
        _refuse(universal / MANIFEST_NAME, f"{name!r} is no regular file", "restore it")
    return path


def verify(universal: Path, manifest: Manifest, files: Mapping[str, Path]) -> None:
    """Raise CheckpointError unless each file (by its name in the manifest) has the hash that the manifest states."""
    for name, path in files.items():
        found = hash_file(path)
        if found != manifest.sha256[name]:
            raise CheckpointError(
                f"{path} has SHA-256 {found} but {universal / MANIFEST_NAME} says {manifest.sha256[name]}: "
                "fetch both again."
            )


def _entry(path: Path, entry: object, base: int) -> tuple[int, tuple[str, ...]]:
    """Tier and files of one element of `tiers`."""
    if not isinstance(entry, dict):
        _refuse(path, "tiers holds something that is no object", "write it anew")
    _has_keys(path, "a tier", entry, ("tier", WIDTH_KEY, "files"))
    tier = _whole(path, "tier", entry["tier"], 0, MAX_TIER)
    width = _whole(path, WIDTH_KEY, entry[WIDTH_KEY], 1, MAX_WIDTH)
    if width << tier != base:
        _refuse(path, f"{WIDTH_KEY} of tier {tier} is {width}", f"{base} / 2^{tier} is expected")
    files = _paths(path, f"files of tier {tier}", entry["files"])
    for name in files:
        if not name.endswith((".safetensors", INDEX_SUFFIX)) and Path(name).name != CONFIG_NAME:
            _refuse(path, f"tier {tier} names {name!r}", "weights are read from safetensors only, never from a pickle")
    if sum(Path(name).name == CONFIG_NAME for name in files) != 1:
        _refuse(path, f"tier {tier} does not name exactly one {CONFIG_NAME}", "write it anew")
    if not any(name.endswith(".safetensors") for name in files):
        _refuse(path, f"tier {tier} names no .safetensors file", "write it anew")
    if len({Path(name).parent for name in files}) != 1:
        _refuse(path, f"the files of tier {tier} lie in several folders", "put them into one")
    return tier, files


def _paths(path: Path, what: str, names: object) -> tuple[str, ...]:
    """A list of different, safe paths."""
    if not isinstance(names, list) or len(set(map(str, names))) != len(names):
        _refuse(path, f"{what} is no list of different paths", "write it anew")
    for name in names:
        _check_path(path, name)
    return tuple(names)


def _check_path(path: Path, name: object) -> None:
    """Relative, POSIX, and at most one step up, at its start; what links make of it is `locate`'s business."""
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_PATH:
        _refuse(path, f"{str(name)[:_MAX_PATH]!r} is no path", f"1 to {_MAX_PATH} characters are expected")
    if "\\" in name or ":" in name or not name.isprintable():
        _refuse(path, f"{name!r} is no POSIX path", "use forward slashes, no drive, no colon")
    if name.startswith("/"):
        _refuse(path, f"{name!r} is absolute", "make it relative to the manifest's folder")
    first, *rest = name.split("/")
    steps = rest if first == ".." else [first, *rest]
    if not steps or any(step in ("", ".", "..") for step in steps):
        _refuse(path, f"{name!r} leaves the folder or is not in its shortest form", "write ../NAME-tier1/FILE or FILE")


def _hashes(path: Path, found: object, names: set[str]) -> dict[str, str]:
    if not isinstance(found, dict) or found.keys() != names:
        _refuse(path, "sha256 does not name exactly the files that are listed", "write it anew")
    for name, value in found.items():
        if not isinstance(value, str) or not _HASH.fullmatch(value):
            _refuse(path, f"sha256 of {name!r} is {value!r}", "64 lower-case hexadecimal digits are expected")
    return found


def _has_keys(path: Path, what: str, found: Mapping[str, object], keys: Iterable[str]) -> None:
    if found.keys() != set(keys):
        _refuse(path, f"{what} has the keys {sorted(found)}", f"exactly {sorted(keys)} are expected")


def _whole(path: Path, key: str, value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        _refuse(path, f"{key} is {value!r}", f"a whole number from {low} to {high} is expected")
    return value


def _refuse(path: Path, found: str, remedy: str) -> NoReturn:
    raise CheckpointError(f"{path} cannot be used: {found}; {remedy}.")
