"""Bytes <-> messages. Every length, count and range is checked here, before anything else sees the message.

Statements that others must be able to check later (commitments, verdicts) are signed as the bytes they travel in and
keep those bytes; the envelope around a message proves who sent it, to whom it mattered, and that it is new.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from google.protobuf.message import DecodeError

from braniac.protocol import limits
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.errors import IdentityError, Refusal, WireError
from braniac.protocol.identity import SIGNATURE_BYTES, Identity, PeerId, parse_peer_id, verify

_ENVELOPE = b"envelope"
_COMMITMENT = b"commitment"
_VERDICT = b"verdict"
_SLOT_MAX = 1 << 52
_Statement = TypeVar("_Statement", pb.Commitment, pb.Verdict)


@dataclass(frozen=True)
class CertificateName:
    """Which certificate: its slot and the sha256 of its verdict."""

    slot: int
    digest: bytes


@dataclass(frozen=True)
class FragmentState:
    """An anchor by its hash."""

    fragment: int
    slot: int
    """Last slot merged into it, -1 for the initial weights."""
    digest: bytes


@dataclass(frozen=True)
class Heartbeat:
    """Who I am, what I hold, which certificates I have applied."""

    slot: int
    tier: int
    ready_slot: int
    """Since when its anchors are current and it may sit in committees, -1 while joining."""
    addresses: tuple[str, ...] = ()
    recent: tuple[CertificateName, ...] = ()
    anchors: tuple[FragmentState, ...] = ()
    tokens_per_s: float = 0.0


@dataclass(frozen=True)
class Commitment:
    """A peer's contribution to a slot by hash; `body` and `signature` are the portable statement."""

    peer: PeerId
    slot: int
    fragment: int
    payload_digest: bytes
    payload_bytes: int
    weight: int
    body: bytes = field(repr=False)
    signature: bytes = field(repr=False)


@dataclass(frozen=True)
class Share:
    """One contribution inside a verdict."""

    commitment: Commitment
    clip: int


@dataclass(frozen=True)
class Verdict:
    """What a committee signs: these contributions make this update."""

    slot: int
    fragment: int
    committee: tuple[PeerId, ...]
    shares: tuple[Share, ...]
    update_digest: bytes
    update_bytes: int
    body: bytes = field(repr=False)

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.body).digest()

    @property
    def owner(self) -> PeerId:
        return self.committee[0]

    def share_of(self, peer: PeerId) -> Share | None:
        """The share of `peer`, if it is in."""
        return next((share for share in self.shares if share.commitment.peer == peer), None)


@dataclass(frozen=True)
class Offer:
    commitment: Commitment


@dataclass(frozen=True)
class Proposal:
    verdict: Verdict


@dataclass(frozen=True)
class Vote:
    slot: int
    verdict_digest: bytes
    signature: bytes


@dataclass(frozen=True)
class Certificate:
    """A verdict with the signatures of a majority of its committee."""

    verdict: Verdict
    signatures: tuple[tuple[PeerId, bytes], ...]

    @property
    def name(self) -> CertificateName:
        return CertificateName(self.verdict.slot, self.verdict.digest)

    @property
    def weight(self) -> int:
        """Tokens behind it; ranks two certificates of one slot."""
        return sum(share.commitment.weight for share in self.verdict.shares)

    def rank(self) -> tuple[int, int, int]:
        """Of two certificates for one slot the higher rank stands: signatures, then weight, then the lower hash."""
        return (len(self.signatures), self.weight, -int.from_bytes(self.verdict.digest))


@dataclass(frozen=True)
class CertificateRequest:
    names: tuple[CertificateName, ...]


@dataclass(frozen=True)
class Goodbye:
    slot: int


@dataclass(frozen=True)
class Introduction:
    """Peers a newcomer should greet, with the addresses they gave."""

    peers: tuple[tuple[PeerId, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Equivocation:
    """Two different commitments that one peer signed for one slot."""

    first: Commitment
    second: Commitment

    @property
    def peer(self) -> PeerId:
        return self.first.peer


Message = Heartbeat | Offer | Proposal | Vote | Certificate | CertificateRequest | Goodbye | Equivocation | Introduction


@dataclass(frozen=True)
class Opened:
    """A message whose sender is proven."""

    sender: PeerId
    sequence: int
    message: Message


# --- writing ---------------------------------------------------------------------------------------------------------


def seal(identity: Identity, run_id: bytes, sequence: int, message: Message) -> bytes:
    """A signed envelope around `message`."""
    content = pb.Content(run_id=run_id, sender=identity.peer_id, sequence=sequence)
    match message:
        case Heartbeat():
            content.heartbeat.CopyFrom(_heartbeat_out(message))
        case Offer():
            content.offer.commitment.CopyFrom(_signed_out(message.commitment))
        case Proposal():
            content.proposal.verdict = message.verdict.body
        case Vote():
            content.vote.slot, content.vote.verdict_digest = message.slot, message.verdict_digest
            content.vote.signature = message.signature
        case Certificate():
            content.certificate.ParseFromString(certificate_bytes(message))
        case CertificateRequest():
            content.certificate_request.names.extend(_names_out(message.names))
        case Goodbye():
            content.goodbye.slot = message.slot
        case Introduction():
            for peer, addresses in message.peers:
                content.introduction.peers.add(peer=peer, addresses=addresses)
        case Equivocation():
            content.equivocation.first.CopyFrom(_signed_out(message.first))
            content.equivocation.second.CopyFrom(_signed_out(message.second))
    data = content.SerializeToString()
    return pb.Envelope(content=data, signature=identity.sign(_ENVELOPE, data)).SerializeToString()


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
) -> Verdict:
    """Write down what the committee is to sign; shares are put in order of peer id."""
    ordered = tuple(sorted(shares, key=lambda share: share.commitment.peer))
    body = pb.Verdict(
        run_id=run_id,
        slot=slot,
        fragment=fragment,
        committee=committee,
        shares=[pb.Share(commitment=_signed_out(s.commitment), clip=s.clip) for s in ordered],
        update_digest=update_digest,
        update_bytes=update_bytes,
    ).SerializeToString(deterministic=True)
    return Verdict(slot, fragment, committee, ordered, update_digest, update_bytes, body)


def sign_verdict(identity: Identity, digest: bytes) -> bytes:
    return identity.sign(_VERDICT, digest)


def verdict_signed_by(peer: PeerId, digest: bytes, signature: bytes) -> bool:
    return verify(peer, _VERDICT, digest, signature)


def certificate_bytes(certificate: Certificate) -> bytes:
    """A certificate as it travels and as it is stored."""
    return pb.Certificate(
        verdict=certificate.verdict.body,
        signatures=[pb.Signature(peer=peer, signature=signature) for peer, signature in certificate.signatures],
    ).SerializeToString()


def _heartbeat_out(message: Heartbeat) -> pb.Heartbeat:
    return pb.Heartbeat(
        slot=message.slot,
        tier=message.tier,
        ready_slot=message.ready_slot,
        addresses=message.addresses,
        recent=_names_out(message.recent),
        anchors=[pb.FragmentState(fragment=s.fragment, slot=s.slot, digest=s.digest) for s in message.anchors],
        tokens_per_s=message.tokens_per_s,
    )


def _names_out(names: Iterable[CertificateName]) -> list[pb.CertificateName]:
    return [pb.CertificateName(slot=name.slot, digest=name.digest) for name in names]


def _signed_out(commitment: Commitment) -> pb.SignedCommitment:
    return pb.SignedCommitment(body=commitment.body, signature=commitment.signature)


# --- reading ---------------------------------------------------------------------------------------------------------


def open_envelope(data: bytes, run_id: bytes) -> Opened:
    """Check signature, run and bounds of a message. Raises WireError, and nothing else, for any byte string."""
    if len(data) > limits.MESSAGE_BYTES_MAX:
        raise WireError(Refusal.OVERSIZE, f"a message of {len(data)} bytes")
    try:
        envelope = pb.Envelope.FromString(data)
        content = pb.Content.FromString(envelope.content)
        sender = parse_peer_id(content.sender)
    except (DecodeError, IdentityError) as error:
        raise WireError(Refusal.MALFORMED, f"not a message ({error})") from None
    if content.run_id != run_id:
        raise WireError(Refusal.WRONG_RUN, "a message of another run")
    if not verify(sender, _ENVELOPE, envelope.content, envelope.signature):
        raise WireError(Refusal.BAD_SIGNATURE, "an envelope that its sender did not sign")
    return Opened(sender, content.sequence, _message_in(content, run_id))


def _message_in(content: pb.Content, run_id: bytes) -> Message:
    match content.WhichOneof("body"):
        case "heartbeat":
            return _heartbeat_in(content.heartbeat)
        case "offer":
            return Offer(_commitment_in(content.offer.commitment, run_id))
        case "proposal":
            return Proposal(_verdict_in(content.proposal.verdict, run_id))
        case "vote":
            vote = content.vote
            return Vote(_slot(vote.slot), _digest(vote.verdict_digest), _signature(vote.signature))
        case "certificate":
            return _certificate_in(content.certificate, run_id)
        case "certificate_request":
            return CertificateRequest(_names_in(content.certificate_request.names))
        case "goodbye":
            return Goodbye(_slot(content.goodbye.slot))
        case "introduction":
            return _introduction_in(content.introduction)
        case "equivocation":
            return _equivocation_in(content.equivocation, run_id)
    raise WireError(Refusal.MALFORMED, "an envelope without a known message in it")


def open_certificate(data: bytes, run_id: bytes) -> Certificate:
    """Parse a stored certificate. Raises WireError."""
    try:
        return _certificate_in(pb.Certificate.FromString(data), run_id)
    except DecodeError as error:
        raise WireError(Refusal.MALFORMED, f"not a certificate ({error})") from None


def _heartbeat_in(message: pb.Heartbeat) -> Heartbeat:
    _require(len(message.anchors) <= limits.FRAGMENTS_MAX, "too many fragments")
    _require(message.tier < 16, "no such tier")
    _require(0 <= message.tokens_per_s < 1e12, "a speed out of range")
    anchors = tuple(FragmentState(f.fragment, _slot(f.slot, -1), _digest(f.digest)) for f in message.anchors)
    return Heartbeat(
        _slot(message.slot, -1),
        message.tier,
        _slot(message.ready_slot, -1),
        _addresses(message.addresses),
        _names_in(message.recent),
        anchors,
        message.tokens_per_s,
    )


def _introduction_in(message: pb.Introduction) -> Introduction:
    _require(len(message.peers) <= limits.INTRODUCED_MAX, "too many peers at once")
    return Introduction(tuple((_peer(p.peer), _addresses(p.addresses)) for p in message.peers))


def _addresses(texts: Iterable[str]) -> tuple[str, ...]:
    found = tuple(texts)
    _require(len(found) <= limits.ADDRESSES_MAX, "too many addresses")
    _require(all(len(a.encode()) <= limits.ADDRESS_BYTES_MAX for a in found), "an address is too long")
    return found


def _names_in(names: Iterable[pb.CertificateName]) -> tuple[CertificateName, ...]:
    found = tuple(CertificateName(_slot(name.slot), _digest(name.digest)) for name in names)
    _require(len(found) <= limits.RECENT_CERTIFICATES_MAX, "too many certificate names")
    return found


def _commitment_in(signed: pb.SignedCommitment, run_id: bytes) -> Commitment:
    body = _parse(pb.Commitment, signed.body)
    if body.run_id != run_id:
        raise WireError(Refusal.WRONG_RUN, "a commitment of another run")
    peer = _peer(body.peer)
    _require(0 < body.weight <= limits.WEIGHT_MAX, "a weight out of range")
    _require(0 < body.payload_bytes <= limits.BLOB_BYTES_MAX, "a payload size out of range")
    _require(body.fragment < limits.FRAGMENTS_MAX, "no such fragment")
    if not verify(peer, _COMMITMENT, signed.body, signed.signature):
        raise WireError(Refusal.BAD_SIGNATURE, "a commitment that its peer did not sign")
    return Commitment(
        peer,
        _slot(body.slot),
        body.fragment,
        _digest(body.payload_digest),
        body.payload_bytes,
        body.weight,
        signed.body,
        signed.signature,
    )


def _equivocation_in(message: pb.Equivocation, run_id: bytes) -> Equivocation:
    first, second = _commitment_in(message.first, run_id), _commitment_in(message.second, run_id)
    _require((first.peer, first.slot) == (second.peer, second.slot), "commitments that have nothing to do with another")
    _require(first.body != second.body, "the same commitment twice")
    return Equivocation(first, second)


def _verdict_in(data: bytes, run_id: bytes) -> Verdict:
    body = _parse(pb.Verdict, data)
    if body.run_id != run_id:
        raise WireError(Refusal.WRONG_RUN, "a verdict of another run")
    slot = _slot(body.slot)
    committee = tuple(map(_peer, body.committee))
    _require(1 <= len(committee) <= limits.COMMITTEE_SIZE, "a committee of the wrong size")
    _require(len(set(committee)) == len(committee), "a peer with two seats")
    _require(1 <= len(body.shares) <= limits.CONTRIBUTIONS_PER_SLOT_MAX, "no contribution, or too many")
    _require(0 < body.update_bytes <= limits.BLOB_BYTES_MAX, "an update size out of range")
    shares = tuple(Share(_commitment_in(share.commitment, run_id), share.clip) for share in body.shares)
    peers = [share.commitment.peer for share in shares]
    _require(all(a < b for a, b in itertools.pairwise(peers)), "contributions out of order or doubled")
    for share in shares:
        _require(0 <= share.clip <= limits.CLIP_ONE, "a clip factor out of range")
        same = share.commitment.slot == slot and share.commitment.fragment == body.fragment
        _require(same, "a contribution to another slot")
    return Verdict(slot, body.fragment, committee, shares, _digest(body.update_digest), body.update_bytes, data)


def _certificate_in(message: pb.Certificate, run_id: bytes) -> Certificate:
    _require(len(message.signatures) <= limits.COMMITTEE_SIZE, "too many signatures")
    verdict = _verdict_in(message.verdict, run_id)
    signatures = tuple((_peer(s.peer), _signature(s.signature)) for s in message.signatures)
    signers = [peer for peer, _ in signatures]
    _require(len(set(signers)) == len(signers), "a peer signed twice")
    if not set(signers) <= set(verdict.committee):
        raise WireError(Refusal.NOT_COMMITTEE, "a signature from outside the committee")
    if len(signers) < len(verdict.committee) // 2 + 1:
        raise WireError(Refusal.NO_MAJORITY, f"{len(signers)} signatures of {len(verdict.committee)} seats")
    for peer, signature in signatures:
        if not verdict_signed_by(peer, verdict.digest, signature):
            raise WireError(Refusal.BAD_SIGNATURE, "a verdict that its signer did not sign")
    return Certificate(verdict, signatures)


def _parse(kind: type[_Statement], data: bytes) -> _Statement:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise WireError(Refusal.MALFORMED, f"not a statement ({error})") from None


def _peer(data: bytes) -> PeerId:
    try:
        return parse_peer_id(data)
    except IdentityError as error:
        raise WireError(Refusal.MALFORMED, str(error)) from None


def _slot(value: int, lowest: int = 0) -> int:
    _require(lowest <= value < _SLOT_MAX, "a slot out of range")
    return value


def _digest(data: bytes) -> bytes:
    _require(len(data) == 32, "a digest that is not 32 bytes")
    return data


def _signature(data: bytes) -> bytes:
    _require(len(data) == SIGNATURE_BYTES, "a signature that is not 64 bytes")
    return data


def _require(good: bool, detail: str) -> None:
    if not good:
        raise WireError(Refusal.MALFORMED, detail)
