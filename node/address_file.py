"""Addresses in a file: how nodes that share a folder find one that has only just come to be.

A founder's address holds its peer id, which nobody knows before its first start. It writes its addresses into its
`network.address_file`; the others name that file among their peers, as in `--peers @/run/braniac/addresses`, and wait
until it is there. One multiaddr per line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from braniac.node.errors import ResourceError

_MARK = "@"


def is_reference(text: str) -> bool:
    """Whether a peer of the settings is a file with addresses rather than an address."""
    return text.startswith(_MARK)


def write(path: Path, addresses: Sequence[str]) -> None:
    """Replace the file by one with these addresses; who reads it sees the old ones or the new. Raises ResourceError."""
    draft = path.with_name(path.name + ".new")
    try:
        draft.write_text("".join(f"{address}\n" for address in addresses), encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise ResourceError(
            f"cannot write network.address_file {path} ({error.strerror}): name a file in a folder of this user"
        ) from None


def read(reference: str) -> list[str]:
    """The addresses in the file of "@FILE". Raises OSError as long as there is none."""
    text = Path(reference.removeprefix(_MARK)).expanduser().read_text(encoding="utf-8", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]
