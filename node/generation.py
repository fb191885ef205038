"""A generation, and the manifest file that stands for it: canonical JSON that carries its own SHA-256.

{"content": {...}, "number": 7, "refs": ["<64 hex>", ...], "sha256": "<64 hex> of the canonical JSON of the others"}
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TypeAlias

JSON: TypeAlias = "str | int | float | bool | list[JSON] | dict[str, JSON] | None"

_HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Generation:
    """One consistent state of the node: what it says (`content`), and the digests of the blobs it consists of."""

    number: int
    content: dict[str, JSON]
    refs: tuple[bytes, ...]


def _canonical(document: dict[str, JSON]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def encode_manifest(generation: Generation) -> bytes:
    """The manifest's bytes. AssertionError if `content` is not plain JSON."""
    refs: list[JSON] = [digest.hex() for digest in generation.refs]
    document: dict[str, JSON] = {"number": generation.number, "content": generation.content, "refs": refs}
    data = _canonical(document | {"sha256": hashlib.sha256(_canonical(document)).hexdigest()})
    assert decode_manifest(generation.number, data) == generation, "content must survive JSON: no tuples, for one"
    return data


def decode_manifest(number: int, data: bytes) -> Generation:
    """Inverse of `encode_manifest`. Raises ValueError for anything that it would not have written."""
    try:
        document = json.loads(data)
        if not isinstance(document, dict) or document.keys() != {"number", "content", "refs", "sha256"}:
            raise ValueError("not a manifest")
        # Some damage, such as that to an escape's upper or lower case, does not change what the JSON says.
        if _canonical(document) != data:
            raise ValueError("not in canonical form")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    claimed = document.pop("sha256")
    if hashlib.sha256(_canonical(document)).hexdigest() != claimed:
        raise ValueError("its hash does not match")
    content, refs = document["content"], document["refs"]
    if document["number"] != number or not isinstance(content, dict) or not isinstance(refs, list):
        raise ValueError("its fields are not those of this generation")
    if not all(isinstance(ref, str) and _HEX_DIGEST.fullmatch(ref) for ref in refs):
        raise ValueError("it names something that is not a digest")
    return Generation(number, content, tuple(bytes.fromhex(ref) for ref in refs))
