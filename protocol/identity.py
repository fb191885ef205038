"""Who a peer is: an Ed25519 key whose public half is the libp2p peer id, and domain-separated signatures.

A peer id is the identity multihash of the protobuf `PublicKey{Ed25519, 32 bytes}`, 38 bytes, so it carries the key that
verifies its signatures (libp2p specs, peer-ids.md). In text it is base58btc and starts with 12D3KooW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from braniac.protocol.errors import IdentityError

PeerId = NewType("PeerId", bytes)

_PREFIX = bytes([0x00, 0x24, 0x08, 0x01, 0x12, 0x20])  # multihash(identity, 36) | PublicKey{type=Ed25519, 32 bytes}
PEER_ID_BYTES = len(_PREFIX) + 32
SIGNATURE_BYTES = 64
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def parse_peer_id(data: bytes) -> PeerId:
    """Check that `data` is an Ed25519 peer id. Raises IdentityError."""
    if len(data) != PEER_ID_BYTES or not data.startswith(_PREFIX):
        raise IdentityError("not an Ed25519 peer id: it must be 38 bytes and carry its public key")
    return PeerId(data)


def peer_id_text(peer: PeerId) -> str:
    """Base58btc form, as in a multiaddr's /p2p/ part."""
    number, digits = int.from_bytes(peer), ""
    while number:
        number, digit = divmod(number, 58)
        digits = _ALPHABET[digit] + digits
    return "1" * (len(peer) - len(peer.lstrip(b"\0"))) + digits


def peer_id_from_text(text: str) -> PeerId:
    """Inverse of `peer_id_text`. Raises IdentityError."""
    number = 0
    if len(text) > 64:
        raise IdentityError("not a peer id: too long")
    for char in text:
        digit = _ALPHABET.find(char)
        if digit < 0:
            raise IdentityError(f"not a peer id: {char!r} is not a base58 digit")
        number = number * 58 + digit
    zeros = len(text) - len(text.lstrip("1"))
    return parse_peer_id(b"\0" * zeros + number.to_bytes((number.bit_length() + 7) // 8))


def short_name(peer: PeerId) -> str:
    """The last six characters: enough to tell peers apart in a log."""
    return peer_id_text(peer)[-6:]


def verify(peer: PeerId, domain: bytes, content: bytes, signature: bytes) -> bool:
    """Whether `peer` signed `content` under `domain`."""
    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(bytes(peer[len(_PREFIX) :]))
        key.verify(signature, _message(domain, content))
    except (InvalidSignature, ValueError):
        return False
    return True


def _message(domain: bytes, content: bytes) -> bytes:
    # The length in front makes (domain, content) unambiguous, so a signature never counts for another domain.
    return b"braniac" + len(domain).to_bytes(1) + domain + content


@dataclass(frozen=True)
class Identity:
    """A private key, and the peer id it stands for."""

    private_key: ed25519.Ed25519PrivateKey
    peer_id: PeerId

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """Derive from 32 secret bytes. Raises IdentityError."""
        if len(seed) != 32:
            raise IdentityError("an Ed25519 seed must be 32 bytes")
        key = ed25519.Ed25519PrivateKey.from_private_bytes(seed)
        public = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return cls(key, PeerId(_PREFIX + public))

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes."""
        return self.private_key.private_bytes(
            serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
        )

    @property
    def public_key(self) -> bytes:
        """The 32 public bytes."""
        return bytes(self.peer_id[len(_PREFIX) :])

    def sign(self, domain: bytes, content: bytes) -> bytes:
        """64-byte signature of `content` under `domain`."""
        return self.private_key.sign(_message(domain, content))
