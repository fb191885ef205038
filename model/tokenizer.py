"""Bytes as tokens: 256 of them, nothing to download, and every peer agrees by construction."""

from __future__ import annotations

from collections.abc import Iterable

# 0xFF occurs in no UTF-8 text, so between documents it cannot be mistaken for anything else.
SEPARATOR = 0xFF


class ByteTokenizer:
    """Text <-> the bytes of its UTF-8 form."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes; half of a surrogate pair, which UTF-8 cannot hold, becomes a question mark."""
        return list(text.encode("utf-8", errors="replace"))

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of the tokens; separators vanish, bytes that are not UTF-8 become U+FFFD."""
        return bytes(token for token in tokens if token != SEPARATOR).decode("utf-8", errors="replace")
