"""Single fields of messages, checked: what comes out is what it is called. Raises WireError."""

from __future__ import annotations

from collections.abc import Iterable

from braniac.protocol import limits
from braniac.protocol.errors import IdentityError, Refusal, WireError
from braniac.protocol.identity import SIGNATURE_BYTES, PeerId, parse_peer_id

_SLOT_MAX = 1 << 52


def peer_of(data: bytes) -> PeerId:
    try:
        return parse_peer_id(data)
    except IdentityError as error:
        raise WireError(Refusal.MALFORMED, str(error)) from None


def slot_of(value: int, lowest: int = 0) -> int:
    require(lowest <= value < _SLOT_MAX, "a slot out of range")
    return value


def digest_of(data: bytes) -> bytes:
    require(len(data) == 32, "a digest that is not 32 bytes")
    return data


def signature_of(data: bytes) -> bytes:
    require(len(data) == SIGNATURE_BYTES, "a signature that is not 64 bytes")
    return data


def addresses_of(texts: Iterable[str]) -> tuple[str, ...]:
    found = tuple(texts)
    require(len(found) <= limits.ADDRESSES_MAX, "too many addresses")
    require(all(len(a.encode()) <= limits.ADDRESS_BYTES_MAX for a in found), "an address is too long")
    return found


def require(good: bool, detail: str) -> None:
    if not good:
        raise WireError(Refusal.MALFORMED, detail)
