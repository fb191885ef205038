"""Text as tokens, made once and kept on disk: one file to train on and one held out, mapped like any token shard.

    CACHE/<key>/entry.json    count of tokens and SHA-256 of the other two
                train.tokens, held_out.tokens    nothing but tokens, of the tokenizer's `token_type`
    CACHE/files.json          see file_facts.py

The key is a hash of what decides the tokens: content of the texts, which part of each is held out, tokenizer, format.
An entry appears whole, by one rename, and never changes; whoever finds it damaged makes it again. Two processes that
need the same entry at the same time both make it, and keep the first. Making it holds one block of text in memory.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from braniac.model.checkpoint_files import sync_directory, write_durably
from braniac.model.documents import Piece
from braniac.model.errors import DataError
from braniac.model.file_facts import FileFacts
from braniac.model.shards import MappedTokens, Tokens, map_tokens
from braniac.model.tokenizer import Tokenizer, token_type

Side = Literal["train", "held_out", "tail"]
"""What a text is for; of `tail` the last part is held out."""

_FORMAT = 1  # of the entries, and of how a text becomes tokens: pieces, separators
_ENTRY, _TRAIN, _HELD_OUT, _LOCK, _SCRATCH = "entry.json", "train.tokens", "held_out.tokens", "lock", ".making-"
_BATCH_CHARACTERS = 1 << 18
_BLOCK_TOKENS = 1 << 18


class Text(Protocol):
    """Something to tokenise."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def side(self) -> Side:
        """What it is for."""

    @property
    def tokens_max(self) -> int | None:
        """How many tokens of it to take; None: all."""

    def identity(self, facts: FileFacts) -> str:
        """What decides its pieces. Raises DataError."""

    def pieces(self) -> Iterator[Piece]:
        """Its documents, the same each time. Raises DataError."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The tokens of some texts, in order."""

    train: MappedTokens
    held_out: MappedTokens


@dataclass(frozen=True)
class TokenCache:
    """A folder of entries, shared by all processes of one user."""

    folder: Path
    facts: FileFacts
    going_on: Callable[[], bool]
    """Asked now and then while an entry is made; no means to stop."""

    def open(self, texts: Sequence[Text], tokenizer: Tokenizer, held_out_one_in: int) -> Entry:
        """The tokens of `texts`, made now if they are not here. Raises DataError."""
        identities = [[text.side, text.tokens_max, text.identity(self.facts)] for text in texts]
        decisive = json.dumps([_FORMAT, tokenizer.name, held_out_one_in, identities])
        entry = self.folder / hashlib.sha256(decisive.encode()).hexdigest()
        dtype = token_type(tokenizer.vocab_size)
        if (found := self._find(entry, dtype)) is not None:
            return found
        try:
            with self._scratch() as scratch:
                self._write(scratch, texts, tokenizer, held_out_one_in)
                for text, (_, _, before) in zip(texts, identities, strict=True):
                    if text.identity(self.facts) != before:
                        raise DataError(f"{text.name} changed while it was read: start again when nobody writes to it.")
                if (found := self._find(entry, dtype)) is not None:
                    return found  # another process was faster
                shutil.rmtree(entry, ignore_errors=True)
                scratch.rename(entry)
                sync_directory(self.folder)
        except OSError as error:
            raise DataError(
                f"the tokens of {texts[0].name} cannot be kept in {self.folder} ({error.strerror}): make room there, "
                "or set data.cache_dir to another folder."
            ) from None
        if (found := self._find(entry, dtype)) is None:
            raise DataError(f"{entry} is damaged as soon as it is written: check the disk, or set data.cache_dir.")
        return found

    def _find(self, entry: Path, dtype: np.dtype[np.unsignedinteger]) -> Entry | None:
        """The entry, if it is here and every byte is as it was written."""
        found = []
        try:
            content: dict[str, Any] = json.loads((entry / _ENTRY).read_bytes())
            for name in (_TRAIN, _HELD_OUT):
                count, path = int(content[name]["tokens"]), entry / name
                if path.stat().st_size != count * dtype.itemsize or self.facts.sha256(path) != content[name]["sha256"]:
                    return None
                found.append(map_tokens(path, dtype, count))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Entry(*found)

    def _write(self, folder: Path, texts: Sequence[Text], tokenizer: Tokenizer, held_out_one_in: int) -> None:
        """The files of an entry, durably. Raises DataError, OSError."""
        dtype = token_type(tokenizer.vocab_size)
        with _TokenFile(folder / _TRAIN, dtype) as train, _TokenFile(folder / _HELD_OUT, dtype) as held_out:
            for text in texts:
                self._add(text, tokenizer, train, held_out, held_out_one_in)
            sums = {file.path.name: file.finish() for file in (train, held_out)}
        write_durably(folder / _ENTRY, json.dumps(sums).encode())
        sync_directory(folder)

    def _add(
        self, text: Text, tokenizer: Tokenizer, train: _TokenFile, held_out: _TokenFile, held_out_one_in: int
    ) -> None:
        target = held_out if text.side == "held_out" else train
        begin = target.count
        for tokens in _tokens(text.pieces(), tokenizer):
            if not self.going_on():
                raise DataError(f"{text.name} was not read to its end: start again to read it.")
            target.append(tokens)
            if text.tokens_max is not None and target.count - begin >= text.tokens_max:
                target.shorten(begin + text.tokens_max)
                break
        if text.side == "tail":
            train.move_tail((train.count - begin) // held_out_one_in, held_out)

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A folder for what is being made. Those that killed processes left are removed: nobody holds their locks."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            with (self.folder / _LOCK).open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # so that nobody looks between the making of a folder and its lock
                for leftover in self.folder.glob(f"{_SCRATCH}*"):
                    with contextlib.suppress(OSError), _locked(leftover):
                        shutil.rmtree(leftover)
                scratch = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=self.folder))
                stack.enter_context(_locked(scratch))
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            yield scratch


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a folder. Raises BlockingIOError if another process does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


class _TokenFile:
    """Tokens on their way to the disk."""

    def __init__(self, path: Path, dtype: np.dtype[np.unsignedinteger]) -> None:
        self.path = path
        self.count = 0
        self._dtype = dtype
        self._file = path.open("xb+")

    def __enter__(self) -> _TokenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, tokens: Tokens) -> None:
        self._file.write(np.ascontiguousarray(tokens, self._dtype).data)
        self.count += len(tokens)

    def shorten(self, count: int) -> None:
        """Forget all but the first `count` tokens."""
        self._file.seek(count * self._dtype.itemsize)
        self._file.truncate()
        self.count = count

    def move_tail(self, count: int, other: _TokenFile) -> None:
        """Move the last `count` tokens to the end of another file, a block at a time."""
        rest = self.count - count
        for begin in range(rest, self.count, _BLOCK_TOKENS):
            self._file.seek(begin * self._dtype.itemsize)
            tokens = min(_BLOCK_TOKENS, self.count - begin)
            other.append(np.frombuffer(self._file.read(tokens * self._dtype.itemsize), self._dtype))
        self.shorten(rest)

    def finish(self) -> dict[str, object]:
        """Make it durable; what an entry says of it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(0)
        return {"tokens": self.count, "sha256": hashlib.file_digest(self._file, "sha256").hexdigest()}


def _tokens(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[Tokens]:
    """The tokens of documents, a separator after each, in blocks."""
    separator = np.array([tokenizer.separator], token_type(tokenizer.vocab_size))
    for batch in _batches(pieces):
        parts = list[Tokens]()
        for tokens, (_, ends) in zip(tokenizer.encode([text for text, _ in batch]), batch, strict=True):
            parts += [tokens, separator] if ends else [tokens]
        yield np.concatenate(parts)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch, characters = list[Piece](), 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0])
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
