"""Bytes <-> messages. Every length, count and range is checked here, before anything else sees the message.

Statements that others must be able to check later (commitments, verdicts) are signed as the bytes they travel in and
keep those bytes; the envelope around a message proves who sent it, to whom it mattered, and that it is new.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from google.protobuf.message import DecodeError

from braniac.protocol import limits, statements
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.errors import IdentityError, Refusal, WireError
from braniac.protocol.fields import addresses_of, digest_of, peer_of, require, signature_of, slot_of
from braniac.protocol.identity import Identity, parse_peer_id, verify
from braniac.protocol.messages import (
    Certificate,
    CertificateName,
    CertificateRequest,
    Equivocation,
    FragmentState,
    Goodbye,
    Gossip,
    Heartbeat,
    Introduction,
    Message,
    Offer,
    Opened,
    Proposal,
    RosterRequest,
    Vote,
)

_ENVELOPE = b"envelope"
_VERSION = re.compile(rf"[0-9A-Za-z.+!_-]{{0,{limits.VERSION_LENGTH_MAX}}}")


# --- writing ---------------------------------------------------------------------------------------------------------


def seal(identity: Identity, run_id: bytes, sequence: int, message: Message) -> bytes:
    """A signed envelope around `message`."""
    content = pb.Content(run_id=run_id, sender=identity.peer_id, sequence=sequence)
    match message:
        case Heartbeat():
            content.heartbeat.CopyFrom(_heartbeat_out(message))
        case Offer():
            content.offer.commitment.CopyFrom(statements.signed_out(message.commitment))
        case Proposal():
            content.proposal.verdict = message.verdict.body
        case Vote():
            content.vote.slot, content.vote.verdict_digest = message.slot, message.verdict_digest
            content.vote.signature = message.signature
        case Certificate():
            content.certificate.ParseFromString(statements.certificate_bytes(message))
        case CertificateRequest():
            content.certificate_request.CopyFrom(pb.CertificateRequest(names=_names_out(message.names)))
        case Goodbye():
            content.goodbye.slot = message.slot
        case Introduction():
            peers = [pb.Acquaintance(peer=peer, addresses=addresses) for peer, addresses in message.peers]
            content.introduction.CopyFrom(pb.Introduction(peers=peers))
        case Gossip(presences):
            content.gossip.CopyFrom(pb.Gossip(presences=map(statements.presence_out, presences)))
        case RosterRequest():
            content.roster_request.SetInParent()
        case Equivocation():
            content.equivocation.CopyFrom(statements.equivocation_out(message))
    data = content.SerializeToString()
    return pb.Envelope(content=data, signature=identity.sign(_ENVELOPE, data)).SerializeToString()


def _heartbeat_out(message: Heartbeat) -> pb.Heartbeat:
    return pb.Heartbeat(
        slot=message.slot,
        tier=message.tier,
        ready_slot=message.ready_slot,
        addresses=message.addresses,
        recent=_names_out(message.recent),
        anchors=[pb.FragmentState(fragment=s.fragment, slot=s.slot, digest=s.digest) for s in message.anchors],
        tokens_per_s=message.tokens_per_s,
        unreachable_slot=message.unreachable_slot,
        loss=message.loss,
        version=message.version,
        parts=message.parts,
        every=message.every,
        known=message.known,
    )


def _names_out(names: Iterable[CertificateName]) -> list[pb.CertificateName]:
    return [pb.CertificateName(slot=name.slot, digest=name.digest) for name in names]


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
            return Offer(statements.commitment_in(content.offer.commitment, run_id))
        case "proposal":
            return Proposal(statements.verdict_in(content.proposal.verdict, run_id))
        case "vote":
            vote = content.vote
            return Vote(slot_of(vote.slot), digest_of(vote.verdict_digest), signature_of(vote.signature))
        case "certificate":
            return statements.certificate_in(content.certificate, run_id)
        case "certificate_request":
            return CertificateRequest(_names_in(content.certificate_request.names))
        case "goodbye":
            return Goodbye(slot_of(content.goodbye.slot))
        case "introduction":
            return _introduction_in(content.introduction)
        case "gossip":
            return _gossip_in(content.gossip, run_id)
        case "roster_request":
            return RosterRequest()
        case "equivocation":
            return statements.equivocation_in(content.equivocation, run_id)
    raise WireError(Refusal.MALFORMED, "an envelope without a known message in it")


def _heartbeat_in(message: pb.Heartbeat) -> Heartbeat:
    require(len(message.anchors) <= limits.FRAGMENTS_MAX, "too many fragments")
    require(message.tier <= limits.TIER_MAX, "no such tier")
    require(0 <= message.tokens_per_s < 1e12, "a speed out of range")
    require(0 <= message.loss < 1e6, "a loss out of range")
    require(_VERSION.fullmatch(message.version) is not None, "a version that is none")
    require(message.parts <= limits.HEARTBEAT_PARTS_MAX, "lists in too many parts")
    require(message.every <= limits.PRESENCE_SLOTS_MAX, "a peer that speaks too seldom")
    require(all(f.fragment < limits.FRAGMENTS_MAX for f in message.anchors), "no such fragment")
    anchors = tuple(FragmentState(f.fragment, slot_of(f.slot, -1), digest_of(f.digest)) for f in message.anchors)
    return Heartbeat(
        slot_of(message.slot, -1),
        message.tier,
        slot_of(message.ready_slot, -1),
        addresses_of(message.addresses),
        _names_in(message.recent),
        anchors,
        message.tokens_per_s,
        slot_of(message.unreachable_slot),
        message.loss if message.HasField("loss") else None,
        message.version,
        message.parts or 1,
        message.every or 1,
        message.known,
    )


def _gossip_in(message: pb.Gossip, run_id: bytes) -> Gossip:
    require(1 <= len(message.presences) <= limits.GOSSIP_PRESENCES_MAX, "no presence, or too many")
    return Gossip(tuple(statements.presence_in(signed, run_id) for signed in message.presences))


def _introduction_in(message: pb.Introduction) -> Introduction:
    require(len(message.peers) <= limits.INTRODUCED_MAX, "too many peers at once")
    return Introduction(tuple((peer_of(p.peer), addresses_of(p.addresses)) for p in message.peers))


def _names_in(names: Iterable[pb.CertificateName]) -> tuple[CertificateName, ...]:
    found = tuple(CertificateName(slot_of(name.slot), digest_of(name.digest)) for name in names)
    require(len(found) <= limits.RECENT_CERTIFICATES_MAX, "too many certificate names")
    return found
