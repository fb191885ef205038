"""Finding and reading training text: files, folders, .jsonl, .bin token shards, or Python's own standard library.

One sixteenth is held out for evaluation, by a rule that needs no coordination: a file is held out if the first byte of
the SHA-256 of its path (relative to the folder that was named) is a multiple of 16. Where that would leave one side
empty, as for a single file, the last sixteenth of every file is held out instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from braniac.model.errors import DataError
from braniac.model.tokenizer import SEPARATOR

Tokens = npt.NDArray[np.uint8 | np.uint16]

HELD_OUT_ONE_IN = 16
TEXT_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("txt", "text", "md", "rst", "org", "tex", "srt", "csv", "tsv", "json", "jsonl", "xml", "htm", "html"),
        *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "go", "rs", "java", "kt", "scala", "swift", "js", "ts", "css"),
        *("lua", "php", "pl", "rb", "r", "jl", "sh", "bash", "sql", "cfg", "ini", "toml", "yaml", "yml"),
    )
)
# modded-nanogpt's shard format: 256 int32 (magic, version, tokens, zeros), then uint16 tokens, little-endian.
SHARD_MAGIC = 20240520
SHARD_VERSION = 1
SHARD_HEADER_BYTES = 256 * 4
# Tests, installed packages and build records differ between machines; character tables are no language.
STDLIB_SKIPPED = frozenset(
    ("__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo")
)


@dataclass(frozen=True)
class Corpus:
    """Token arrays, uint8 or memory-mapped uint16; a training window never spans two of them."""

    name: str
    """What to call it in messages."""
    train: tuple[Tokens, ...]
    held_out: tuple[Tokens, ...]


@dataclass(frozen=True)
class TextSource:
    """Where training text comes from; no paths at all means the standard library of the running Python."""

    paths: tuple[Path, ...] = ()

    def load(self, vocab_size: int) -> Corpus:
        """Read everything (.bin shards are mapped, not read). Raises DataError."""
        try:
            files = list(self._files())
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read ({error.strerror}): check its permissions.") from error
        if not files:
            raise DataError(
                f"no readable text files in {self.name}: name files, or folders with .txt, .md or .py files."
            )
        held = [_is_held_out(key) for key, _ in files]
        train: list[Tokens] = []
        held_out: list[Tokens] = []
        for (_, path), is_held in zip(files, held, strict=True):
            tokens = _read(path)
            largest = int(tokens.max()) if len(tokens) else 0
            if largest >= vocab_size:
                raise DataError(f"{path} holds token {largest}: this model's vocabulary ends at {vocab_size - 1}.")
            if all(held) or not any(held):
                cut = len(tokens) - len(tokens) // HELD_OUT_ONE_IN
                train.append(tokens[:cut])
                held_out.append(tokens[cut:])
            else:
                (held_out if is_held else train).append(tokens)
        return Corpus(self.name, _join(train), _join(held_out))

    @property
    def name(self) -> str:
        """The paths as one would read them out."""
        return ", ".join(str(path) for path in self.paths) or "the Python standard library"

    def _files(self) -> Iterator[tuple[str, Path]]:
        """(key for the held-out rule, file), in an order that depends on names alone."""
        if not self.paths:
            root = Path(sysconfig.get_paths()["stdlib"])
            yield from _walk(root, frozenset({".py"}), STDLIB_SKIPPED)
        for path in self.paths:
            if path.is_dir():
                yield from _walk(path, TEXT_SUFFIXES | {".bin"}, frozenset({"__pycache__"}))
            elif path.exists():
                yield path.name, path
            else:
                raise DataError(f"{path} does not exist: give the path of a text file or of a folder with some.")


def _walk(root: Path, suffixes: frozenset[str], skipped: frozenset[str]) -> Iterator[tuple[str, Path]]:
    found = []
    for folder, subfolders, names in os.walk(root):  # prunes, where rglob would enter site-packages
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith((".", "_sysconfigdata"))]
    for relative, path in sorted((path.relative_to(root).as_posix(), path) for path in found):
        if path.suffix.lower() in suffixes and path.is_file():
            yield relative, path


def _is_held_out(key: str) -> bool:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[0] % HELD_OUT_ONE_IN == 0


def _read(path: Path) -> Tokens:
    try:
        if path.suffix == ".bin":
            return _map_shard(path)
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error
    # Re-encoding makes sure that the separator occurs nowhere inside a document, whatever the file holds.
    text = raw.decode("utf-8", errors="replace")
    documents = _jsonl_documents(path, text) if path.suffix == ".jsonl" else [text]
    joined = b"".join(d.encode("utf-8", errors="replace") + bytes([SEPARATOR]) for d in documents if d)
    return np.frombuffer(joined, np.uint8)


def _jsonl_documents(path: Path, text: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} line {number} is not JSON ({error}): mend or remove the line.") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DataError(
                f'{path} line {number} lacks "text": each line must be an object with a string under that key.'
            )
        documents.append(record["text"])
    return documents


def _map_shard(path: Path) -> npt.NDArray[np.uint16]:
    size_bytes = path.stat().st_size
    if size_bytes < SHARD_HEADER_BYTES:
        raise DataError(f"{path} has {size_bytes} bytes: the header of a token shard alone takes {SHARD_HEADER_BYTES}.")
    header = np.fromfile(path, "<i4", 3)
    expected = (SHARD_MAGIC, SHARD_VERSION, (size_bytes - SHARD_HEADER_BYTES) // 2)
    for field, found, wanted in zip(("magic", "version", "token count"), header.tolist(), expected, strict=True):
        if found != wanted:
            raise DataError(
                f"{path} has {field} {found} in its header where {wanted} fits: it is no whole token shard."
            )
    if expected[2] == 0:
        return np.zeros(0, np.uint16)  # an empty file cannot be mapped
    return np.memmap(path, "<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(expected[2],))


def _join(arrays: Sequence[Tokens]) -> tuple[Tokens, ...]:
    """Text becomes one array; shards stay apart, so that they stay on disk."""
    shards = tuple(tokens for tokens in arrays if tokens.dtype == np.uint16)
    texts = [tokens for tokens in arrays if tokens.dtype == np.uint8]
    return (np.concatenate(texts), *shards) if texts else shards
