"""Identities: peer ids carry their key, signatures count for one purpose only."""

from __future__ import annotations

import pytest

from braniac.protocol.errors import IdentityError
from braniac.protocol.identity import (
    PEER_ID_BYTES,
    SIGNATURE_BYTES,
    Identity,
    PeerId,
    parse_peer_id,
    peer_id_from_text,
    peer_id_text,
    short_name,
    verify,
)

# The Ed25519 example of the libp2p specification (peer-ids.md): private key seed || public key, and its peer id.
SPEC_SEED = bytes.fromhex("7e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d")
SPEC_PUBLIC = bytes.fromhex("1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")


def test_the_keys_of_the_libp2p_specification() -> None:
    identity = Identity.from_seed(SPEC_SEED)
    assert identity.public_key == SPEC_PUBLIC
    assert identity.seed == SPEC_SEED
    assert identity.peer_id == bytes.fromhex("002408011220") + SPEC_PUBLIC
    assert peer_id_text(identity.peer_id).startswith("12D3KooW")


def test_text_round_trip() -> None:
    for n in range(20):
        peer = Identity.from_seed(bytes([n]) * 32).peer_id
        assert len(peer) == PEER_ID_BYTES
        assert peer_id_from_text(peer_id_text(peer)) == peer
        assert peer_id_text(peer).endswith(short_name(peer))


@pytest.mark.parametrize(
    "text", ["", "1", "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N", "12D3KooW", "0OIl", "12D3KooWé", "z" * 65]
)
def test_text_that_is_no_peer_id(text: str) -> None:
    with pytest.raises(IdentityError):
        peer_id_from_text(text)


@pytest.mark.parametrize("data", [b"", bytes(38), b"\x00\x24\x08\x01\x12\x20" + bytes(31), b"\x12\x20" + bytes(32)])
def test_bytes_that_are_no_peer_id(data: bytes) -> None:
    with pytest.raises(IdentityError):
        parse_peer_id(data)


def test_signatures_bind_peer_domain_and_content() -> None:
    alice, bob = Identity.from_seed(b"a" * 32), Identity.from_seed(b"b" * 32)
    signature = alice.sign(b"vote", b"content")
    assert len(signature) == SIGNATURE_BYTES
    assert verify(alice.peer_id, b"vote", b"content", signature)
    assert not verify(bob.peer_id, b"vote", b"content", signature)
    assert not verify(alice.peer_id, b"offer", b"content", signature)
    assert not verify(alice.peer_id, b"vote", b"Content", signature)
    assert not verify(alice.peer_id, b"votec", b"ontent", signature)
    for bad in (b"", signature[:-1], signature + b"\0", bytes(64), b"\xff" * 64):
        assert not verify(alice.peer_id, b"vote", b"content", bad)


def test_a_peer_id_whose_key_is_no_point_verifies_nothing() -> None:
    for key in (bytes(32), b"\xff" * 32, b"\x02" + bytes(31)):
        peer = PeerId(b"\x00\x24\x08\x01\x12\x20" + key)
        assert not verify(parse_peer_id(peer), b"vote", b"content", b"\1" * 64)


def test_a_seed_of_the_wrong_length() -> None:
    with pytest.raises(IdentityError):
        Identity.from_seed(b"short")
