"""Token shards: modded-nanogpt's `.bin` files, checked in blocks and mapped into memory.

A mapping costs address space, not memory: the kernel reads the pages that a window touches and nothing around them, and
`MappedTokens.release` gives them back, so that a node's resident memory does not grow with the text that it has seen.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from braniac.model.errors import DataError

Tokens = npt.NDArray[np.uint8 | np.uint16 | np.uint32]

# 256 int32 (magic, version, tokens, zeros), then the tokens, all little-endian.
HEADER_BYTES = 256 * 4
_FORMATS: dict[tuple[int, int], np.dtype[np.unsignedinteger]] = {
    (20240520, 1): np.dtype("<u2"),  # of GPT-2's tokens
    (20240801, 7): np.dtype("<u4"),  # of Llama 3's
}
_BLOCK_BYTES = 1 << 20


class BadShard(DataError):
    """A `.bin` file that is no whole shard, or not of this vocabulary; the message names the file and the byte.

    Whether that is the end, and so the remedy, is for the caller to say.
    """


@dataclass(frozen=True, slots=True)
class MappedTokens:
    """A file of tokens as an array that stays on disk."""

    tokens: Tokens
    pages: mmap.mmap | None
    """None for a file without tokens, which cannot be mapped."""

    def release(self) -> None:
        """Give the pages that were read back to the kernel, which keeps them while it has room."""
        if self.pages is not None:
            self.pages.madvise(mmap.MADV_DONTNEED)


def map_tokens(path: Path, dtype: np.dtype[np.unsignedinteger], count: int, offset_bytes: int = 0) -> MappedTokens:
    """`count` tokens from `offset_bytes` on. Raises OSError, ValueError if the file is shorter."""
    if count == 0:
        return MappedTokens(np.zeros(0, dtype), None)
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), offset_bytes + count * dtype.itemsize, access=mmap.ACCESS_READ)
    pages.madvise(mmap.MADV_RANDOM)  # no reading ahead: the next window is somewhere else
    return MappedTokens(np.frombuffer(pages, dtype, count, offset_bytes), pages)


@dataclass(frozen=True, slots=True)
class Shard:
    """A `.bin` file whose header fits its size."""

    path: Path
    dtype: np.dtype[np.unsignedinteger]
    count: int
    """Tokens."""

    def map(self) -> MappedTokens:
        """Its tokens. Raises OSError, ValueError."""
        return map_tokens(self.path, self.dtype, self.count, HEADER_BYTES)

    def largest(self) -> int:
        """The largest token, 0 if there is none; reads the file once, a block at a time. Raises OSError."""
        return max((int(block.max()) for block in self._blocks()), default=0)

    def refuse_beyond(self, vocab_size: int) -> None:
        """Name the first token that a vocabulary does not have, if there is one. Raises BadShard, OSError."""
        begin = HEADER_BYTES
        for block in self._blocks():
            beyond = np.flatnonzero(block >= vocab_size)
            if len(beyond):
                where = begin + int(beyond[0]) * self.dtype.itemsize
                raise BadShard(
                    f"{self.path} holds token {block[beyond[0]]} at byte {where}, and this model's vocabulary ends at "
                    f"{vocab_size - 1}"
                )
            begin += block.nbytes

    def _blocks(self) -> Iterator[Tokens]:
        with self.path.open("rb") as file:
            file.seek(HEADER_BYTES)
            left = self.count
            while left:
                block = np.fromfile(file, self.dtype, min(left, _BLOCK_BYTES // self.dtype.itemsize))
                if not len(block):
                    raise BadShard(f"{self.path} ends at byte {file.tell()} although it was longer before")
                yield block
                left -= len(block)


def read_shard(path: Path) -> Shard:
    """The shard in a file, by its header. Raises BadShard, OSError."""
    size_bytes = path.stat().st_size
    if size_bytes < HEADER_BYTES:
        raise BadShard(f"{path} ends at byte {size_bytes}, inside the header of {HEADER_BYTES} bytes")
    magic, version, count = np.fromfile(path, "<i4", 3).tolist()
    if (magic, version) not in _FORMATS:
        known = " or ".join(f"{known} and {number}" for known, number in _FORMATS)
        raise BadShard(f"{path} begins at byte 0 with magic {magic} and version {version} where {known} are known")
    dtype = _FORMATS[magic, version]
    end = HEADER_BYTES + count * dtype.itemsize
    if (size_bytes - HEADER_BYTES) % dtype.itemsize:
        raise BadShard(f"{path} ends at byte {size_bytes}, in the middle of a token of {dtype.itemsize} bytes")
    if end != size_bytes:
        raise BadShard(
            f"{path} ends at byte {size_bytes}, and by the {count} tokens of its header (byte 8) at byte {end}"
        )
    return Shard(path, dtype, count)
