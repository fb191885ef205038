"""Signed statements that others must be able to check later: commitments, verdicts, certificates, proofs.

They are signed as the bytes they travel in and keep those bytes, so nothing has to be serialised twice in the same way.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from typing import TypeVar

from google.protobuf.message import DecodeError

from braniac.protocol import limits
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.fields import addresses_of, digest_of, peer_of, require, signature_of, slot_of
from braniac.protocol.identity import Identity, PeerId, verify
from braniac.protocol.messages import Certificate, Commitment, Equivocation, Presence, Share, SignedVerdict, Verdict

_COMMITMENT = b"commitment"
_VERDICT = b"verdict"
_PRESENCE = b"presence"
_Statement = TypeVar("_Statement", pb.Commitment, pb.Verdict, pb.Proofs, pb.Presence)


def make_commitment(
    identity: Identity, run_id: bytes, slot: int, fragment: int, payload_digest: bytes, payload_bytes: int, weight: int
) -> Commitment:
    """Sign one's own contribution."""
    body = pb.Commitment(
        run_id=run_id,
        peer=identity.peer_id,
        slot=slot,
        fragment=fragment,
        payload_digest=payload_digest,
        payload_bytes=payload_bytes,
        weight=weight,
    ).SerializeToString(deterministic=True)
    signature = identity.sign(_COMMITMENT, body)
    return Commitment(identity.peer_id, slot, fragment, payload_digest, payload_bytes, weight, body, signature)


def make_verdict(
    run_id: bytes,
    slot: int,
    fragment: int,
    committee: tuple[PeerId, ...],
    shares: Iterable[Share],
    update_digest: bytes,
    update_bytes: int,
    refused: Iterable[Commitment] = (),
) -> Verdict:
    """Write down what the committee is to sign; shares and what was refused are put in order of peer id."""
    ordered = tuple(sorted(shares, key=lambda share: share.commitment.peer))
    left_out = tuple(sorted(refused, key=lambda commitment: commitment.peer))
    body = pb.Verdict(
        run_id=run_id,
        slot=slot,
        fragment=fragment,
        committee=committee,
        shares=[pb.Share(commitment=signed_out(s.commitment), clip=s.clip) for s in ordered],
        update_digest=update_digest,
        update_bytes=update_bytes,
        refused=map(signed_out, left_out),
    ).SerializeToString(deterministic=True)
    return Verdict(slot, fragment, committee, ordered, update_digest, update_bytes, left_out, body)


def sign_verdict(identity: Identity, digest: bytes) -> bytes:
    """64-byte signature of a seat under a verdict's digest."""
    return identity.sign(_VERDICT, digest)


def verdict_signed_by(peer: PeerId, digest: bytes, signature: bytes) -> bool:
    """Whether `peer` signed the verdict with this digest."""
    return verify(peer, _VERDICT, digest, signature)


def certificate_bytes(certificate: Certificate) -> bytes:
    """A certificate as it travels and as it is stored."""
    return pb.Certificate(
        verdict=certificate.verdict.body,
        signatures=[pb.Signature(peer=peer, signature=signature) for peer, signature in certificate.signatures],
    ).SerializeToString()


def open_certificate(data: bytes, run_id: bytes) -> Certificate:
    """Parse a stored certificate. Raises WireError."""
    try:
        return certificate_in(pb.Certificate.FromString(data), run_id)
    except DecodeError as error:
        raise WireError(Refusal.MALFORMED, f"not a certificate ({error})") from None


def make_presence(
    identity: Identity,
    run_id: bytes,
    sequence: int,
    *,
    slot: int,
    tier: int,
    ready_slot: int,
    unreachable_slot: int,
    every: int,
    gone: bool,
    addresses: tuple[str, ...],
) -> Presence:
    """Sign what all are to know of oneself."""
    body = pb.Presence(
        peer=identity.peer_id,
        sequence=sequence,
        slot=slot,
        tier=tier,
        ready_slot=ready_slot,
        unreachable_slot=unreachable_slot,
        every=every,
        gone=gone,
        addresses=addresses,
    ).SerializeToString(deterministic=True)
    signature = identity.sign(_PRESENCE, run_id + body)
    return Presence(
        identity.peer_id, sequence, slot, tier, ready_slot, unreachable_slot, every, gone, addresses, body, signature
    )


def presence_out(presence: Presence) -> pb.SignedPresence:
    """A presence as it travels."""
    return pb.SignedPresence(body=presence.body, signature=presence.signature)


def presence_in(signed: pb.SignedPresence, run_id: bytes) -> Presence:
    """Check a signed presence. Raises WireError."""
    body = _parse(pb.Presence, signed.body)
    peer = peer_of(body.peer)
    require(body.tier <= limits.TIER_MAX, "no such tier")
    require(1 <= body.every <= limits.PRESENCE_SLOTS_MAX, "a peer that speaks too seldom")
    addresses = addresses_of(body.addresses)
    if not verify(peer, _PRESENCE, run_id + signed.body, signed.signature):
        raise WireError(Refusal.BAD_SIGNATURE, "a presence that its peer did not sign")
    return Presence(
        peer,
        body.sequence,
        slot_of(body.slot),
        body.tier,
        slot_of(body.ready_slot, -1),
        slot_of(body.unreachable_slot),
        body.every,
        body.gone,
        addresses,
        signed.body,
        signed.signature,
    )


def signed_out(commitment: Commitment) -> pb.SignedCommitment:
    """A commitment as it travels."""
    return pb.SignedCommitment(body=commitment.body, signature=commitment.signature)


def commitment_in(signed: pb.SignedCommitment, run_id: bytes) -> Commitment:
    """Check a signed commitment. Raises WireError."""
    body = _parse(pb.Commitment, signed.body)
    if body.run_id != run_id:
        raise WireError(Refusal.WRONG_RUN, "a commitment of another run")
    peer = peer_of(body.peer)
    require(0 < body.weight <= limits.WEIGHT_MAX, "a weight out of range")
    require(0 < body.payload_bytes <= limits.BLOB_BYTES_MAX, "a payload size out of range")
    require(body.fragment < limits.FRAGMENTS_MAX, "no such fragment")
    if not verify(peer, _COMMITMENT, signed.body, signed.signature):
        raise WireError(Refusal.BAD_SIGNATURE, "a commitment that its peer did not sign")
    return Commitment(
        peer,
        slot_of(body.slot),
        body.fragment,
        digest_of(body.payload_digest),
        body.payload_bytes,
        body.weight,
        signed.body,
        signed.signature,
    )


def verdict_in(data: bytes, run_id: bytes) -> Verdict:
    """Parse a verdict and check every contribution in it. Raises WireError."""
    body = _parse(pb.Verdict, data)
    if body.run_id != run_id:
        raise WireError(Refusal.WRONG_RUN, "a verdict of another run")
    slot = slot_of(body.slot)
    committee = tuple(map(peer_of, body.committee))
    require(1 <= len(committee) <= limits.COMMITTEE_SIZE, "a committee of the wrong size")
    require(len(set(committee)) == len(committee), "a peer with two seats")
    count = len(body.shares) + len(body.refused)
    require(1 <= len(body.shares) <= count <= limits.CONTRIBUTIONS_PER_SLOT_MAX, "no contribution, or too many")
    require(0 < body.update_bytes <= limits.BLOB_BYTES_MAX, "an update size out of range")
    shares = tuple(Share(commitment_in(share.commitment, run_id), share.clip) for share in body.shares)
    require(all(0 <= share.clip <= limits.CLIP_ONE for share in shares), "a clip factor out of range")
    refused = tuple(commitment_in(commitment, run_id) for commitment in body.refused)
    digest = digest_of(body.update_digest)
    verdict = Verdict(slot, body.fragment, committee, shares, digest, body.update_bytes, refused, data)
    require(all((c.slot, c.fragment) == (slot, body.fragment) for c in verdict.commitments), "of another slot")
    for group in ([share.commitment.peer for share in shares], [commitment.peer for commitment in refused]):
        require(all(a < b for a, b in itertools.pairwise(group)), "contributions out of order or doubled")
    require(len({c.peer for c in verdict.commitments}) == count, "a contribution both admitted and refused")
    return verdict


def certificate_in(message: pb.Certificate, run_id: bytes) -> Certificate:
    """Check a certificate: a majority of its own committee signed its verdict. Raises WireError."""
    require(len(message.signatures) <= limits.COMMITTEE_SIZE, "too many signatures")
    verdict = verdict_in(message.verdict, run_id)
    signatures = tuple((peer_of(s.peer), signature_of(s.signature)) for s in message.signatures)
    signers = [peer for peer, _ in signatures]
    require(len(set(signers)) == len(signers), "a peer signed twice")
    if not set(signers) <= set(verdict.committee):
        raise WireError(Refusal.NOT_COMMITTEE, "a signature from outside the committee")
    if len(signers) < len(verdict.committee) // 2 + 1:
        raise WireError(Refusal.NO_MAJORITY, f"{len(signers)} signatures of {len(verdict.committee)} seats")
    for peer, signature in signatures:
        if not verdict_signed_by(peer, verdict.digest, signature):
            raise WireError(Refusal.BAD_SIGNATURE, "a verdict that its signer did not sign")
    return Certificate(verdict, signatures)


def equivocation_out(proof: Equivocation) -> pb.Equivocation:
    """A proof as it travels and as it is stored."""
    match proof:
        case Equivocation(Commitment() as first, Commitment() as second):
            return pb.Equivocation(first=signed_out(first), second=signed_out(second))
        case Equivocation(SignedVerdict() as first, SignedVerdict() as second):
            return pb.Equivocation(first_verdict=_signed_verdict_out(first), second_verdict=_signed_verdict_out(second))
    raise AssertionError("a proof is of two statements of one kind")


def equivocation_in(message: pb.Equivocation, run_id: bytes) -> Equivocation:
    """Check a proof: two different statements of one kind and one peer on one slot, signed by it. Raises WireError."""
    first: Commitment | SignedVerdict
    second: Commitment | SignedVerdict
    if message.HasField("first_verdict"):
        first = _signed_verdict_in(message.first_verdict, run_id)
        second = _signed_verdict_in(message.second_verdict, run_id)
    else:
        first, second = commitment_in(message.first, run_id), commitment_in(message.second, run_id)
    require((first.peer, first.slot) == (second.peer, second.slot), "statements that have nothing to do with another")
    require(first.body != second.body, "the same statement twice")
    return Equivocation(first, second)


def proofs_bytes(proofs: Iterable[Equivocation]) -> bytes:
    """Proofs as they are stored."""
    return pb.Proofs(proofs=map(equivocation_out, proofs)).SerializeToString()


def open_proofs(data: bytes, run_id: bytes) -> list[Equivocation]:
    """Inverse of `proofs_bytes`; each is checked again. Raises WireError."""
    require(len(data) <= 2 * limits.PROOFS_BYTES_MAX, "too many proofs")
    return [equivocation_in(proof, run_id) for proof in _parse(pb.Proofs, data).proofs]


def _signed_verdict_out(signed: SignedVerdict) -> pb.SignedVerdict:
    return pb.SignedVerdict(verdict=signed.body, signature=pb.Signature(peer=signed.peer, signature=signed.signature))


def _signed_verdict_in(message: pb.SignedVerdict, run_id: bytes) -> SignedVerdict:
    """Check who signed a verdict, not the verdict: it convicts its signer also if it is nonsense. Raises WireError."""
    body = _parse(pb.Verdict, message.verdict)
    if body.run_id != run_id:
        raise WireError(Refusal.WRONG_RUN, "a verdict of another run")
    peer, digest = peer_of(message.signature.peer), hashlib.sha256(message.verdict).digest()
    if not verdict_signed_by(peer, digest, message.signature.signature):
        raise WireError(Refusal.BAD_SIGNATURE, "a verdict that its signer did not sign")
    return SignedVerdict(peer, slot_of(body.slot), message.verdict, message.signature.signature)


def _parse(kind: type[_Statement], data: bytes) -> _Statement:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise WireError(Refusal.MALFORMED, f"not a statement ({error})") from None
