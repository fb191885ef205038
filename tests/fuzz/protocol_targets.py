"""Targets for what protocol/ reads: payloads, messages, signed statements, manifests, addresses of peers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
from google.protobuf.message import DecodeError

from braniac.protocol import codec, limits, statements, wire
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.codec import CodecRules
from braniac.protocol.errors import IdentityError, ManifestError, WireError
from braniac.protocol.identity import PeerId, peer_id_from_text, peer_id_text
from braniac.protocol.manifest import open_manifest, sign_manifest
from braniac.protocol.messages import Equivocation, Message
from braniac.protocol.tiles import Sparse, TileLayout
from tests.fuzz.target import Target
from tests.unit.swarm_harness import identity, make_manifest
from tests.unit.test_protocol_codec import assert_legal, vector_of
from tests.unit.test_protocol_wire import MESSAGES, PEOPLE, RUN, certificate, commitment, verdict

ME = PEOPLE[0]
LAYOUTS = (
    (TileLayout(((64, 2), (1, 2), (16, 1))), CodecRules(800, 2, 3)),
    (TileLayout(((4096, 2),)), CodecRules(64, 1, 4)),
    (TileLayout(((1, 9),)), CodecRules(4096, 4)),
)
KEYS = {person.peer_id: person for person in PEOPLE}


# --- payloads ------------------------------------------------------------------------------------------------------


def payload(data: bytes) -> bool:
    """The first byte chooses a layout. What was decoded is legal, and encoding it again loses nothing."""
    layout, rules = LAYOUTS[data[0] % len(LAYOUTS)] if data else LAYOUTS[0]
    try:
        sparse = codec.decode(layout, rules, data[1:])
    except WireError:
        return False
    assert_legal(layout, rules, sparse)
    written, sent = codec.encode(layout, rules, sparse)
    assert len(written) <= codec.payload_bytes_max(layout, rules)
    assert _same(sent, sparse)
    assert _same(codec.decode(layout, rules, written), sparse)
    assert codec.encode(layout, rules, sent)[0] == written, "the second encoding is the last one that changes bytes"
    return True


def _same(a: Sparse, b: Sparse) -> bool:
    return np.array_equal(a.positions, b.positions) and np.array_equal(a.values, b.values)


def payload_seeds() -> Iterable[bytes]:
    for number, (layout, rules) in enumerate(LAYOUTS):
        for kind in ("normal", "ties", "sparse", "zero", "extreme"):
            yield bytes([number]) + codec.encode_topk(layout, rules, vector_of(layout, 3, kind))[0]


# --- messages ------------------------------------------------------------------------------------------------------


def envelope(data: bytes) -> bool:
    """Bytes as they arrive. Only what its sender signed is taken, and it reads back from what we would send."""
    try:
        opened = wire.open_envelope(data, RUN)
    except WireError:
        return False
    assert opened.sender in KEYS
    _read_again(opened.message)
    return True


def content(data: bytes) -> bool:
    """A peer signs whatever it likes: the input is the inside of an envelope of a known peer."""
    head = pb.Content(run_id=RUN, sender=ME.peer_id, sequence=1).SerializeToString()
    try:
        opened = wire.open_envelope(_enveloped(head + data), RUN)
    except WireError:
        return False
    _read_again(opened.message)
    return True


def _enveloped(body: bytes) -> bytes:
    return pb.Envelope(content=body, signature=ME.sign(b"envelope", body)).SerializeToString()


def _read_again(message: Message) -> None:
    assert isinstance(message, Message)
    assert wire.open_envelope(wire.seal(ME, RUN, 5, message), RUN).message == message


def envelope_seeds() -> Iterable[bytes]:
    return [wire.seal(ME, RUN, 5, message) for message in MESSAGES.values()]


def content_seeds() -> Iterable[bytes]:
    for sealed in envelope_seeds():
        inside = pb.Content.FromString(pb.Envelope.FromString(sealed).content)
        for field in ("run_id", "sender", "sequence"):
            inside.ClearField(field)
        yield inside.SerializeToString()


# --- statements ----------------------------------------------------------------------------------------------------


def commitment_target(data: bytes) -> bool:
    """The input is the body of a commitment that a known peer signs."""
    head = pb.Commitment(run_id=RUN, peer=ME.peer_id).SerializeToString()
    try:
        found = statements.commitment_in(_signed(head + data), RUN)
    except WireError:
        return False
    assert found.peer == ME.peer_id
    assert 0 < found.weight <= limits.WEIGHT_MAX
    assert statements.commitment_in(statements.signed_out(found), RUN) == found
    return True


def _signed(body: bytes) -> pb.SignedCommitment:
    return pb.SignedCommitment(body=body, signature=ME.sign(b"commitment", body))


def verdict_target(data: bytes) -> bool:
    """The input is a verdict; commitments in it are signed anew by the peers that they name, if we have their keys."""
    try:
        body = pb.Verdict.FromString(data)
    except DecodeError:
        body = None
    try:
        found = statements.verdict_in(data if body is None else _with_signatures(body), RUN)
    except WireError:
        return False
    assert found.owner == found.committee[0]
    again = statements.make_verdict(
        RUN,
        found.slot,
        found.fragment,
        found.committee,
        found.shares,
        found.update_digest,
        found.update_bytes,
        found.refused,
    )
    assert statements.verdict_in(again.body, RUN) == again
    assert (again.shares, again.refused) == (found.shares, found.refused)
    return True


def certificate_target(data: bytes) -> bool:
    """The input is a certificate; its verdict is signed anew by the peers that it names, if we have their keys."""
    with suppress(DecodeError):
        message = pb.Certificate.FromString(data)
        digest = hashlib.sha256(message.verdict).digest()
        for signature in message.signatures:
            if (person := KEYS.get(PeerId(signature.peer))) is not None and len(signature.signature) == 64:
                signature.signature = statements.sign_verdict(person, digest)
        data = message.SerializeToString()
    try:
        found = statements.open_certificate(data, RUN)
    except WireError:
        return False
    assert len(found.signatures) > len(found.verdict.committee) // 2
    assert statements.open_certificate(statements.certificate_bytes(found), RUN) == found
    return True


def proofs(data: bytes) -> bool:
    """Proofs against peers, as a node keeps them."""
    try:
        found = statements.open_proofs(data, RUN)
    except WireError:
        return False
    assert all(proof.first.body != proof.second.body for proof in found)
    assert statements.open_proofs(statements.proofs_bytes(found), RUN) == found
    return True


def proofs_seeds() -> Iterable[bytes]:
    kinds = [message for message in MESSAGES.values() if isinstance(message, Equivocation)]
    return [statements.proofs_bytes(kinds), statements.proofs_bytes(kinds[:1])]


def verdict_seeds() -> Iterable[bytes]:
    refusing = verdict(refused=[commitment(2), commitment(3)])
    return [made.body for made in (verdict(), verdict(committee=(ME.peer_id,)), refusing)]


def _with_signatures(body: pb.Verdict) -> bytes:
    for signed in (*(share.commitment for share in body.shares), *body.refused):
        with suppress(DecodeError):
            inside = pb.Commitment.FromString(signed.body)
            if (person := KEYS.get(PeerId(inside.peer))) is not None:
                signed.signature = person.sign(b"commitment", signed.body)
    return body.SerializeToString()


def commitment_seeds() -> Iterable[bytes]:
    for made in (commitment(), commitment(slot=1 << 40, weight=limits.WEIGHT_MAX)):
        body = pb.Commitment.FromString(made.body)
        body.ClearField("run_id")
        body.ClearField("peer")
        yield body.SerializeToString()


# --- manifests and peer ids ----------------------------------------------------------------------------------------


def manifest(data: bytes) -> bool:
    """The input is a body that its founder signs. It has one spelling."""
    try:
        found = open_manifest(data, identity(0).sign(b"manifest", data))
    except ManifestError:
        return False
    assert found.body() == data
    for fragment, spec in enumerate(found.fragments):
        assert 0 < spec.layout.size <= limits.TILE_SIZE_MAX * limits.FRAGMENT_TILES_MAX
        assert found.contribution_bytes_max(fragment) > 0
    return True


def manifest_seeds() -> Iterable[bytes]:
    for changed in (make_manifest(), make_manifest(rings=(0, 1, 0, 2), name="é", model={"deep": [1, {"a": None}]})):
        yield sign_manifest(changed, identity(0))[0]


def peer_id(data: bytes) -> bool:
    """An id in text has one spelling."""
    text = data.decode("utf-8", errors="replace")
    try:
        found = peer_id_from_text(text)
    except IdentityError:
        return False
    assert peer_id_text(found) == text
    return True


TARGETS = {
    "payload": Target(payload, payload_seeds, 2048),
    "envelope": Target(envelope, envelope_seeds),
    "content": Target(content, content_seeds),
    "commitment": Target(commitment_target, commitment_seeds, 512),
    "verdict": Target(verdict_target, verdict_seeds, 2048),
    "certificate": Target(
        certificate_target,
        lambda: [statements.certificate_bytes(certificate(signers=signers)) for signers in ((0, 2), (0, 1, 2), (0,))],
        2048,
    ),
    "proofs": Target(proofs, proofs_seeds, 2048),
    "manifest": Target(manifest, manifest_seeds),
    "peer_id": Target(peer_id, lambda: [peer_id_text(person.peer_id).encode() for person in PEOPLE], 80),
}
