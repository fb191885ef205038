"""Finding and reading training text: files, folders, .jsonl, .bin token shards, streams, or Python's standard library.

One sixteenth is held out for evaluation, by a rule that needs no coordination: a file is held out if the first byte of
the SHA-256 of its path (relative to the folder that was named) is a multiple of 16. Where that would leave one side
empty, as for a single file, the last sixteenth of every file is held out instead; of a stream always the last
sixteenth. All text makes one array of tokens, in the order of its files, kept in a cache on disk; shards are used where
they lie.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from braniac.model.documents import Piece, cut, read_pieces
from braniac.model.errors import DataError
from braniac.model.file_facts import FileFacts
from braniac.model.shards import BadShard, MappedTokens, Shard, Tokens, read_shard
from braniac.model.token_cache import Side, Text, TokenCache
from braniac.model.tokenizer import ByteTokenizer, Tokenizer

_Result = TypeVar("_Result")

BadShards = Literal["refuse", "skip"]
"""What to do about a shard that is damaged or of another vocabulary."""

HELD_OUT_ONE_IN = 16
TEXT_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("txt", "text", "md", "rst", "org", "tex", "srt", "csv", "tsv", "json", "jsonl", "xml", "htm", "html"),
        *("py", "pyi", "c", "h", "cc", "cpp", "hpp", "go", "rs", "java", "kt", "scala", "swift", "js", "ts", "css"),
        *("lua", "php", "pl", "rb", "r", "jl", "sh", "bash", "sql", "cfg", "ini", "toml", "yaml", "yml"),
    )
)
# Tests, installed packages and build records differ between machines; character tables are no language.
STDLIB_SKIPPED = frozenset(
    ("__pycache__", "dist-packages", "encodings", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo")
)


class Stream(Protocol):
    """Documents from elsewhere, the same in the same order each time."""

    @property
    def name(self) -> str:
        """What to call it in messages."""

    @property
    def tokens_max(self) -> int:
        """How many tokens to take."""

    def identity(self, facts: FileFacts) -> str:
        """What decides its documents. Raises DataError."""

    def documents(self) -> Iterator[str]:
        """Their texts. Raises DataError."""


@dataclass(frozen=True)
class Corpus:
    """Token arrays, uint8, uint16 or uint32; a training window never spans two of them."""

    name: str
    """What to call it in messages."""
    train: tuple[Tokens, ...]
    held_out: tuple[Tokens, ...]
    mappings: tuple[MappedTokens, ...] = ()
    """Of the arrays that are on disk."""
    skipped: tuple[str, ...] = ()
    """A sentence for each shard that was left out."""

    def release(self) -> None:
        """Give the memory of what was read back; reading it again costs a look at the disk, or at the kernel's copy."""
        for mapping in self.mappings:
            mapping.release()


@dataclass(frozen=True)
class TextSource:
    """Where training text comes from; no paths and no streams means the standard library of the running Python."""

    cache_dir: Path
    """Where the tokens of texts are kept."""
    paths: tuple[Path, ...] = ()
    streams: tuple[Stream, ...] = ()
    tokenizer: Tokenizer | None = field(default_factory=ByteTokenizer)
    """None: it is not at hand, and only shards can be read."""
    bad_shards: BadShards = "refuse"

    def load(self, vocab_size: int, going_on: Callable[[], bool] = lambda: True) -> Corpus:
        """Find everything, and tokenise what is not in the cache; stops with an error if `going_on` says no.

        All tokens of a shard are compared with the vocabulary here, once for every version of its file, a block at a
        time. Raises DataError.
        """
        facts = FileFacts(self.cache_dir)
        files, skipped = self._usable(vocab_size, facts)
        held = [_is_held_out(key) for key, _ in files]
        tails = all(held) or not any(held)
        sides: list[Side] = ["tail" if tails else "held_out" if is_held else "train" for is_held in held]
        sided = [(found, side) for (_, found), side in zip(files, sides, strict=True)]
        texts: list[Text] = [FileText(found, side) for found, side in sided if isinstance(found, Path)]
        texts += map(StreamText, self.streams)
        train, held_out, mappings = list[Tokens](), list[Tokens](), list[MappedTokens]()
        if texts:
            tokenizer = self._checked_tokenizer(texts[0], vocab_size)
            entry = TokenCache(self.cache_dir, facts, going_on).open(texts, tokenizer, HELD_OUT_ONE_IN)
            train, held_out, mappings = [entry.train.tokens], [entry.held_out.tokens], [entry.train, entry.held_out]
        for shard, side in ((found, side) for found, side in sided if isinstance(found, Shard)):
            mapping = _reading(shard.path, shard.map)
            kept = {"train": shard.count, "held_out": 0, "tail": shard.count - shard.count // HELD_OUT_ONE_IN}[side]
            train.append(mapping.tokens[:kept])
            held_out.append(mapping.tokens[kept:])
            mappings.append(mapping)
        facts.save()
        return Corpus(self.name, _filled(train), _filled(held_out), tuple(mappings), tuple(skipped))

    @property
    def name(self) -> str:
        """The paths and streams as one would read them out."""
        named = [*map(str, self.paths), *(stream.name for stream in self.streams)]
        return ", ".join(named) or "the Python standard library"

    def _usable(self, vocab_size: int, facts: FileFacts) -> tuple[list[tuple[str, Path | Shard]], list[str]]:
        """(key for the held-out rule, text file or shard), and what is wrong with each shard that is left out."""
        files, skipped = list[tuple[str, Path | Shard]](), list[str]()
        for key, path in self._files():
            try:
                files.append((key, _checked_shard(path, vocab_size, facts) if path.suffix == ".bin" else path))
            except BadShard as error:
                if self.bad_shards == "refuse":
                    remedy = "make it again or take it away, or leave it out with data.bad_shards=skip"
                    raise DataError(f"{error}: {remedy}.") from None
                skipped.append(str(error))
        if not files and not self.streams and skipped:
            raise DataError(f"{self.name} holds no shard that can be used: {skipped[0]}.")
        if not files and not self.streams:
            raise DataError(
                f"no readable text files in {self.name}: name files, or folders with .txt, .md or .py files."
            )
        return files, skipped

    def _files(self) -> Iterator[tuple[str, Path]]:
        """(key for the held-out rule, file), in an order that depends on names alone."""
        if not self.paths and not self.streams:
            root = Path(sysconfig.get_paths()["stdlib"])
            yield from _walk(root, frozenset({".py"}), STDLIB_SKIPPED)
        for path in self.paths:
            if path.is_dir():
                yield from _walk(path, TEXT_SUFFIXES | {".bin"}, frozenset({"__pycache__"}))
            elif path.exists():
                yield path.name, path
            else:
                raise DataError(f"{path} does not exist: give the path of a text file or of a folder with some.")

    def _checked_tokenizer(self, text: Text, vocab_size: int) -> Tokenizer:
        if self.tokenizer is None:
            raise DataError(
                f"{text.name} is text, and this model's tokenizer is not here: set data.tokenizer to the file that the "
                "run's founder has or that lies beside the model, or give .bin shards of its tokens."
            )
        if self.tokenizer.vocab_size > vocab_size:
            raise DataError(
                f"{text.name} is text, and its tokenizer has {self.tokenizer.vocab_size} tokens: this model's "
                f"vocabulary ends at {vocab_size - 1}."
            )
        return self.tokenizer


@dataclass(frozen=True, slots=True)
class FileText:
    """A text file."""

    path: Path
    side: Side

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.path)

    @property
    def tokens_max(self) -> None:
        """All of it."""

    def identity(self, facts: FileFacts) -> str:
        """How it is read, and its content. Raises DataError."""
        return f"{self.path.suffix == '.jsonl'} {_reading(self.path, lambda: facts.sha256(self.path))}"

    def pieces(self) -> Iterator[Piece]:
        """Its documents. Raises DataError."""
        pieces = read_pieces(self.path)
        while (piece := _reading(self.path, lambda: next(pieces, None))) is not None:
            yield piece


@dataclass(frozen=True, slots=True)
class StreamText:
    """A stream; its last sixteenth is held out."""

    stream: Stream

    @property
    def name(self) -> str:
        """For messages."""
        return self.stream.name

    @property
    def side(self) -> Side:
        """Both."""
        return "tail"

    @property
    def tokens_max(self) -> int:
        """As configured."""
        return self.stream.tokens_max

    def identity(self, facts: FileFacts) -> str:
        """What decides its documents. Raises DataError."""
        return self.stream.identity(facts)

    def pieces(self) -> Iterator[Piece]:
        """Its documents. Raises DataError."""
        for document in self.stream.documents():
            yield from cut([document])


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


def _checked_shard(path: Path, vocab_size: int, facts: FileFacts) -> Shard:
    """The shard in a file, if it is whole and of this vocabulary. Raises BadShard, DataError."""
    shard = _reading(path, lambda: read_shard(path))
    largest = _reading(path, lambda: facts.ask(path, "largest token", shard.largest))
    if int(largest) >= vocab_size:
        _reading(path, lambda: shard.refuse_beyond(vocab_size))
    return shard


def _reading(path: Path, read: Callable[[], _Result]) -> _Result:
    try:
        return read()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): check its permissions.") from error


def _filled(arrays: Sequence[Tokens]) -> tuple[Tokens, ...]:
    return tuple(tokens for tokens in arrays if len(tokens))
