"""Text <-> tokens: bytes by default, or whatever a Hugging Face `tokenizer.json` says.

Peers of a run must read text alike, so a tokenizer has a name that goes into the run's manifest: "bytes", which every
peer agrees on by construction, or the SHA-256 of its file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from braniac.model.errors import DataError
from braniac.model.shards import Tokens

# 0xFF occurs in no UTF-8 text, so between documents it cannot be mistaken for anything else.
SEPARATOR = 0xFF

BYTES = "bytes"
FILE_NAME = "tokenizer.json"
"""What a tokenizer's file is called beside a model."""
_LOADER_NAME = "tokenizer_config.json"  # without it, transformers does not know how to load the other
_NAME = re.compile(r"bytes|sha256:[0-9a-f]{64}")
# What the usual families call the token that ends a document.
_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")
_FILE_BYTES_MAX = 64 << 20


def is_name(text: str) -> bool:
    """Whether `text` has the form of a tokenizer's name."""
    return _NAME.fullmatch(text) is not None


def sound(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which UTF-8 cannot hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


class Tokenizer(Protocol):
    """Text <-> tokens."""

    @property
    def name(self) -> str:
        """What peers that read text alike agree on."""

    @property
    def vocab_size(self) -> int:
        """All tokens are below it."""

    @property
    def separator(self) -> int:
        """The token between documents, which no text contains."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """What lies beside a model, by file name, so that others read text alike."""

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text, of `token_type(vocab_size)`; texts are `sound`."""

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens, without separators and what the tokenizer does not know."""

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The same in pieces, as soon as whole characters are there."""


def token_type(vocab_size: int) -> np.dtype[np.unsignedinteger]:
    """The smallest type, little-endian, that holds all tokens of a vocabulary."""
    return np.dtype("u1" if vocab_size <= 1 << 8 else "<u2" if vocab_size <= 1 << 16 else "<u4")


class ByteTokenizer:
    """Text <-> the bytes of its UTF-8 form."""

    name = BYTES
    vocab_size = 256
    separator = SEPARATOR
    files: Mapping[str, bytes] = {}

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """The UTF-8 bytes of each text, uint8."""
        return [np.frombuffer(text.encode("utf-8"), np.uint8) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens; bytes that are not UTF-8 become U+FFFD."""
        return bytes(token for token in tokens if token < SEPARATOR).decode("utf-8", errors="replace")

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The same in pieces, as soon as whole characters are there."""
        pending: list[int] = []
        for token in tokens:
            pending.append(token)
            text = self.decode(pending)
            if not text.endswith("\ufffd") or len(pending) >= 4:  # wait for the rest of a UTF-8 character
                yield text
                pending = []
        yield self.decode(pending)


class FileTokenizer:
    """What a Hugging Face `tokenizer.json` says, through the `tokenizers` package."""

    def __init__(self, data: bytes, origin: str) -> None:
        """`data` is the file, `origin` its name in messages. Raises DataError."""
        try:
            import tokenizers
            from tokenizers.decoders import DecodeStream
        except ImportError as error:
            raise DataError(
                f"{origin} needs the tokenizers package: install it with pip install 'braniac-node[tokenizers]'."
            ) from error
        try:
            self._inner = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the package raises nothing narrower
            raise DataError(f"{origin} is no tokenizer.json of Hugging Face ({error}): give such a file.") from None
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True  # a text that spells a special token must not become one
        self._decode_stream = DecodeStream
        self.name = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.vocab_size = 1 + max(self._inner.get_vocab(with_added_tokens=True).values(), default=0)  # ids leave gaps
        added = self._inner.get_added_tokens_decoder().items()
        special = {token.content: number for number, token in added if token.special}
        end = next((name for name in _ENDS if name in special), None)
        if end is None:
            raise DataError(f"{origin} has no special token that ends a document: add one of {', '.join(_ENDS)} to it.")
        self.separator = special[end]
        loader = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
        self.files: Mapping[str, bytes] = {FILE_NAME: data, _LOADER_NAME: json.dumps(loader, indent=2).encode()}

    @classmethod
    def read(cls, path: Path) -> FileTokenizer:
        """The tokenizer in a file. Raises DataError."""
        try:
            with path.open("rb") as file:
                data = file.read(_FILE_BYTES_MAX + 1)
        except OSError as error:
            raise DataError(f"the tokenizer {path} cannot be read ({error.strerror}): check data.tokenizer.") from None
        if len(data) > _FILE_BYTES_MAX:
            raise DataError(f"{path} is larger than {_FILE_BYTES_MAX} bytes: it is no tokenizer.json.")
        return cls(data, str(path))

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text, without any that mark its beginning or end."""
        dtype = token_type(self.vocab_size)
        found = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, dtype) for each in found]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens."""
        return self._inner.decode(self._known(tokens), skip_special_tokens=True)

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The same in pieces, as soon as whole characters are there."""
        stream, seen, characters = self._decode_stream(skip_special_tokens=True), list[int](), 0
        for token in tokens:
            for known in self._known([token]):
                seen.append(known)
                if text := stream.step(self._inner, known):
                    characters += len(text)
                    yield text
        yield self.decode(seen)[characters:]  # a character that no token completed, as U+FFFD

    def _known(self, tokens: Iterable[int]) -> list[int]:
        """A model's vocabulary may be larger than its tokenizer's, to be a round number."""
        return [token for token in tokens if token < self.vocab_size and token != self.separator]
