"""Join links: which run, and where it can be reached, in one line that can be pasted or photographed.

    braniac://<run id, 64 hex digits>@<multiaddr>,<multiaddr>,...

Characters that a link, a shell or a list could misread are percent-encoded in the addresses. There is exactly one text
for a run id and a list of addresses, and the parser accepts nothing else, so two links are the same or differ visibly.
The run id pins the run: whoever runs the addresses cannot put another one in its place.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

from braniac.node.errors import ConfigError
from braniac.node.transport import parse_address
from braniac.protocol.limits import ADDRESSES_MAX

SCHEME = "braniac://"
LINK_CHARACTERS_MAX = 2900  # what a QR code holds
_LOOPBACK = ("/ip4/127.", "/ip6/::1/")
_PLAIN = "/:"  # beside letters, digits and _.-~
_RUN_ID = re.compile(r"[0-9a-f]{64}")
_SHOWN = 60


@dataclass(frozen=True)
class JoinLink:
    """A run and ways into it."""

    run_id: str
    """64 hex digits."""
    addresses: tuple[str, ...]
    """Multiaddrs, each ending in /p2p/<peer id>."""

    def __str__(self) -> str:
        return f"{SCHEME}{self.run_id}@{','.join(quote(address, safe=_PLAIN) for address in self.addresses)}"


def link_for(run_id: str, addresses: Iterable[str]) -> JoinLink:
    """A link to a node: as many of its addresses as a link may hold, loopback only if there is nothing else."""
    every = [address for address in dict.fromkeys(addresses) if _dialable(address)]
    reachable = [address for address in every if not address.startswith(_LOOPBACK)] or every
    link = JoinLink(run_id, tuple(reachable[:ADDRESSES_MAX]))
    while len(str(link)) > LINK_CHARACTERS_MAX:
        link = JoinLink(run_id, link.addresses[:-1])
    return link


def parse_link(text: str) -> JoinLink:
    """What a link says. Raises ConfigError."""
    text = text.strip()
    if not text.startswith(SCHEME):
        raise _refused(text, f"it does not begin with {SCHEME}")
    if len(text) > LINK_CHARACTERS_MAX:
        raise _refused(text, f"it is longer than {LINK_CHARACTERS_MAX} characters")
    run_id, at, rest = text.removeprefix(SCHEME).partition("@")
    if not at or not rest:
        raise _refused(text, "it names no address after an @")
    if not _RUN_ID.fullmatch(run_id):
        raise _refused(text, "its run id is not 64 hexadecimal digits in lower case")
    try:
        addresses = tuple(unquote_to_bytes(part).decode() for part in rest.split(","))
    except UnicodeError:  # also of what the shell handed over, if that was no text
        raise _refused(text, "an address in it is not text") from None
    if len(addresses) > ADDRESSES_MAX:
        raise _refused(text, f"it names more than {ADDRESSES_MAX} addresses")
    for address in addresses:
        try:
            parse_address(address)
        except ConfigError as error:
            raise _refused(text, str(error).partition("; write it like")[0]) from None
    link = JoinLink(run_id, addresses)
    if str(link) != text or len(set(addresses)) < len(addresses):
        raise _refused(text, "it is not written as braniac-node writes it")
    return link


def with_link(text: str, run_id: str | None, addresses: Iterable[str] | None) -> tuple[str, list[str]]:
    """A link beside `--run-id` and `--peers`: the run id and all addresses. Raises ConfigError."""
    link = parse_link(text)
    if run_id not in (None, link.run_id):
        raise ConfigError(
            f"the join link is for run {link.run_id[:12]}..., not for --run-id {run_id}: give one of the two"
        )
    return link.run_id, list(dict.fromkeys([*link.addresses, *(addresses or ())]))


def qr_text(link: JoinLink) -> str:
    """The link as a QR code of block characters, for a terminal."""
    import segno

    out = io.StringIO()
    segno.make(str(link), error="l", micro=False).terminal(out, compact=True)
    return out.getvalue()


def _dialable(address: str) -> bool:
    try:
        parse_address(address)
    except ConfigError:
        return False
    return True


def _refused(text: str, why: str) -> ConfigError:
    shown = text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    return ConfigError(f"{shown!r} is not a join link: {why}; copy the whole line that `braniac-node link` prints")
