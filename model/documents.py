"""Documents of text files, read as streams: no file is ever in memory as a whole.

A plain file is one document; each line of a `.jsonl` file holds one under "text". What comes out are pieces of at most
`PIECE_CHARACTERS`, cut after a line end where there is one, because tokenizers want their text in one string and a
document may be as large as the disk. Where a piece ends depends on the text alone.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from braniac.model.errors import DataError
from braniac.model.tokenizer import sound

PIECE_CHARACTERS = 1 << 16
_BLOCK_BYTES = 1 << 16
_LINE_BYTES_MAX = 64 << 20

Piece = tuple[str, bool]
"""Some text, never empty, and whether its document ends with it."""


def read_pieces(path: Path) -> Iterator[Piece]:
    """All documents of a text file. Raises DataError for a line of `.jsonl` that holds none, OSError."""
    with path.open("rb") as file:
        if path.suffix == ".jsonl":
            for document in _jsonl_documents(path, file):
                yield from cut([document])
        else:
            yield from cut(_decoded(file))


def cut(blocks: Iterable[str]) -> Iterator[Piece]:
    """One document that comes in blocks of any size, as `sound` pieces."""
    text = ""
    for block in blocks:
        text += sound(block)
        begin = 0
        while len(text) - begin > PIECE_CHARACTERS:
            end = text.rfind("\n", begin, begin + PIECE_CHARACTERS) + 1 or begin + PIECE_CHARACTERS
            yield text[begin:end], False
            begin = end
        text = text[begin:]
    if text:
        yield text, True


def _decoded(file: BinaryIO) -> Iterator[str]:
    """Bytes that are not UTF-8 become U+FFFD, so that no file can hold what separates documents."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while block := file.read(_BLOCK_BYTES):
        yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def _jsonl_documents(path: Path, file: BinaryIO) -> Iterator[str]:
    number = 0
    while raw := file.readline(_LINE_BYTES_MAX + 1):
        number += 1
        if len(raw) > _LINE_BYTES_MAX:
            raise DataError(f"{path} line {number} is longer than {_LINE_BYTES_MAX} bytes: split that document.")
        line = raw.decode("utf-8", errors="replace")
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
        yield record["text"]
