"""Messages: whatever arrives is a checked message of this run, or a WireError with its reason."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braniac.protocol import limits, messages, statements, wire
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.messages import (
    Certificate,
    CertificateName,
    CertificateRequest,
    Commitment,
    Equivocation,
    FragmentState,
    Goodbye,
    Gossip,
    Heartbeat,
    Introduction,
    Message,
    Offer,
    Presence,
    Proposal,
    RosterRequest,
    Share,
    SignedVerdict,
    Verdict,
    Vote,
)
from tests.unit.swarm_harness import identity

RUN = hashlib.sha256(b"run").digest()
OTHER_RUN = hashlib.sha256(b"another run").digest()
PEOPLE = sorted((identity(n) for n in range(4)), key=lambda i: i.peer_id)
ME = PEOPLE[0]


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def commitment(peer: int = 0, **changes: Any) -> Commitment:
    values = {
        "run_id": RUN,
        "slot": 7,
        "fragment": 1,
        "payload_digest": digest(f"payload {peer}"),
        "payload_bytes": 99,
        "weight": 12,
    }
    return statements.make_commitment(PEOPLE[peer], **values | changes)


def verdict(**changes: Any) -> Verdict:
    values = {
        "run_id": RUN,
        "slot": 7,
        "fragment": 1,
        "committee": tuple(p.peer_id for p in PEOPLE[:3]),
        "shares": [Share(commitment(1), 1001), Share(commitment(0), 1)],
        "update_digest": digest("update"),
        "update_bytes": 55,
    }
    return statements.make_verdict(**values | changes)


def certificate(of: Verdict | None = None, signers: tuple[int, ...] = (0, 2)) -> Certificate:
    of = of or verdict()
    signatures = tuple((PEOPLE[n].peer_id, statements.sign_verdict(PEOPLE[n], of.digest)) for n in signers)
    return Certificate(of, signatures)


def signed_verdict(of: Verdict | None = None, signer: int = 0) -> SignedVerdict:
    of = of or verdict()
    signature = statements.sign_verdict(PEOPLE[signer], of.digest)
    return SignedVerdict(PEOPLE[signer].peer_id, of.slot, of.body, signature)


def presence(number: int, **changes: Any) -> Presence:
    values = {
        "slot": 7,
        "tier": 1,
        "ready_slot": -1,
        "unreachable_slot": 0,
        "every": 64,
        "gone": False,
        "addresses": (),
    }
    return statements.make_presence(PEOPLE[number], RUN, 5, **values | changes)


MESSAGES: dict[str, Message] = {
    "heartbeat": Heartbeat(
        slot=-1,
        tier=3,
        ready_slot=4,
        addresses=("/ip4/10.0.0.1/tcp/1", "/dns/é/tcp/2"),
        recent=(CertificateName(5, digest("c")), CertificateName(2, digest("d"))),
        anchors=(FragmentState(0, -1, digest("a")), FragmentState(9, 5, digest("b"))),
        tokens_per_s=12.5,
        loss=0.0,
        version="1.0.dev3+local",
        parts=27,
    ),
    "plain heartbeat": Heartbeat(0, 0, -1),
    "offer": Offer(commitment()),
    "proposal": Proposal(verdict()),
    "proposal with refusals": Proposal(verdict(refused=[commitment(2), commitment(3)])),
    "vote": Vote(7, digest("verdict"), b"s" * 64),
    "certificate": certificate(),
    "request": CertificateRequest((CertificateName(5, digest("c")),)),
    "goodbye": Goodbye(8),
    "gossip": Gossip((presence(0), presence(3, gone=True, addresses=("/ip4/10.0.0.1/tcp/1",)))),
    "roster request": RosterRequest(),
    "equivocation": Equivocation(commitment(), commitment(weight=13)),
    "equivocation of a seat": Equivocation(signed_verdict(), signed_verdict(verdict(update_bytes=56))),
}


def sealed(message: Message, sequence: int = 5) -> bytes:
    return wire.seal(ME, RUN, sequence, message)


def refusal_of(action: Callable[[], object]) -> Refusal:
    with pytest.raises(WireError) as caught:
        action()
    return caught.value.refusal


@pytest.mark.parametrize("name", MESSAGES)
def test_round_trip(name: str) -> None:
    opened = wire.open_envelope(sealed(MESSAGES[name], sequence=1 << 40), RUN)
    assert opened == messages.Opened(ME.peer_id, 1 << 40, MESSAGES[name])


def test_a_stored_certificate_comes_back() -> None:
    assert statements.open_certificate(statements.certificate_bytes(certificate()), RUN) == certificate()


SLOTS = st.integers(0, (1 << 52) - 1)
DIGESTS = st.binary(min_size=32, max_size=32)
NAMES = st.lists(st.builds(CertificateName, SLOTS, DIGESTS), max_size=4).map(tuple)
ADDRESSES = st.lists(st.text(st.characters(codec="utf-8"), max_size=64), max_size=limits.ADDRESSES_MAX).map(tuple)
PEERS = st.sampled_from(range(4))
SEATS = st.lists(PEERS, min_size=1, max_size=3, unique=True)
ANCHORS = st.lists(st.builds(FragmentState, st.integers(0, 4095), st.integers(-1, 99), DIGESTS), max_size=4).map(tuple)
HEARTBEATS = st.builds(
    Heartbeat,
    slot=st.integers(-1, 1 << 50),
    tier=st.integers(0, 15),
    ready_slot=st.integers(-1, 1 << 50),
    addresses=ADDRESSES,
    recent=NAMES,
    anchors=ANCHORS,
    tokens_per_s=st.floats(0, 1e12, exclude_max=True).map(abs),  # no -0.0, which is equal and reads back as 0.0
    unreachable_slot=SLOTS,
    parts=st.integers(1, limits.HEARTBEAT_PARTS_MAX),
    every=st.integers(1, limits.PRESENCE_SLOTS_MAX),
    known=st.integers(0, (1 << 32) - 1),
)
COMMITMENTS = st.builds(
    commitment,
    PEERS,
    fragment=st.integers(0, limits.FRAGMENTS_MAX - 1),
    slot=SLOTS,
    payload_digest=DIGESTS,
    payload_bytes=st.integers(1, limits.BLOB_BYTES_MAX),
    weight=st.integers(1, limits.WEIGHT_MAX),
)


@st.composite
def verdicts(draw: st.DrawFn) -> tuple[Verdict, list[int]]:
    """A verdict, and who sits in its committee."""
    slot, fragment, seats = draw(SLOTS), draw(st.integers(0, limits.FRAGMENTS_MAX - 1)), draw(SEATS)
    clips = st.integers(0, limits.CLIP_ONE)
    shares = [Share(commitment(n, slot=slot, fragment=fragment), draw(clips)) for n in draw(SEATS)]
    size = draw(st.integers(1, limits.BLOB_BYTES_MAX))
    committee = tuple(PEOPLE[n].peer_id for n in seats)
    made = verdict(slot=slot, fragment=fragment, committee=committee, shares=shares, update_bytes=size)
    return made, seats


PRESENCES = st.builds(
    presence,
    PEERS,
    slot=SLOTS,
    tier=st.integers(0, limits.TIER_MAX),
    ready_slot=st.integers(-1, 1 << 50),
    unreachable_slot=SLOTS,
    every=st.integers(1, limits.PRESENCE_SLOTS_MAX),
    gone=st.booleans(),
    addresses=ADDRESSES,
)
ANY_MESSAGE = st.one_of(
    HEARTBEATS,
    st.builds(Gossip, st.lists(PRESENCES, min_size=1, max_size=4).map(tuple)),
    st.builds(Offer, COMMITMENTS),
    verdicts().map(lambda made: Proposal(made[0])),
    st.builds(Vote, SLOTS, DIGESTS, st.binary(min_size=64, max_size=64)),
    verdicts().map(lambda made: certificate(made[0], tuple(made[1]))),
    st.builds(CertificateRequest, NAMES),
    st.builds(Goodbye, SLOTS),
    st.builds(Introduction, st.lists(st.tuples(PEERS.map(lambda n: PEOPLE[n].peer_id), ADDRESSES)).map(tuple)),
)


@given(message=ANY_MESSAGE, sequence=st.integers(0, (1 << 64) - 1))
@settings(max_examples=150)
def test_any_legal_message_comes_back(message: Message, sequence: int) -> None:
    assert wire.open_envelope(sealed(message, sequence), RUN) == messages.Opened(ME.peer_id, sequence, message)


@given(data=st.binary(max_size=300))
@settings(max_examples=300)
def test_any_bytes_are_refused(data: bytes) -> None:
    for read in (wire.open_envelope, statements.open_certificate):
        with pytest.raises(WireError):
            read(data, RUN)


@given(content=st.binary(max_size=200), kind=st.integers(4, 14))
@settings(max_examples=200)
def test_any_signed_nonsense_is_a_message_or_refused(content: bytes, kind: int) -> None:
    """A peer may sign whatever it likes: the signature is right, the inside is not."""
    head = pb.Content(run_id=RUN, sender=ME.peer_id, sequence=1).SerializeToString()
    body = head + bytes([kind << 3 | 2]) + (bytes([len(content) & 127 | 128, len(content) >> 7])) + content
    data = pb.Envelope(content=body, signature=ME.sign(b"envelope", body)).SerializeToString()
    try:
        opened = wire.open_envelope(data, RUN)
    except WireError:
        return
    assert opened.sender == ME.peer_id
    assert isinstance(opened.message, Message)


@pytest.mark.parametrize("name", MESSAGES)
def test_bit_flips_are_refused(name: str) -> None:
    data = sealed(MESSAGES[name])
    for bit in range(0, 8 * len(data), 1 if len(data) < 200 else 13):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            wire.open_envelope(bytes(flipped), RUN)


def test_bit_flips_of_a_stored_certificate_are_refused() -> None:
    data = statements.certificate_bytes(certificate())
    for bit in range(0, 8 * len(data), 11):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            statements.open_certificate(bytes(flipped), RUN)


def test_truncated_messages_are_refused() -> None:
    data = sealed(MESSAGES["certificate"])
    for length in range(0, len(data), 5):
        with pytest.raises(WireError):
            wire.open_envelope(data[:length], RUN)


def test_messages_of_another_run() -> None:
    assert refusal_of(lambda: wire.open_envelope(sealed(Goodbye(1)), OTHER_RUN)) is Refusal.WRONG_RUN
    for smuggled in (
        Offer(commitment(run_id=OTHER_RUN)),
        Proposal(verdict(run_id=OTHER_RUN)),
        Proposal(verdict(shares=[Share(commitment(run_id=OTHER_RUN), 1)])),
        certificate(verdict(run_id=OTHER_RUN)),
    ):
        assert refusal_of(lambda message=smuggled: wire.open_envelope(sealed(message), RUN)) is Refusal.WRONG_RUN


def test_a_message_that_its_sender_did_not_sign() -> None:
    content = pb.Envelope.FromString(sealed(Goodbye(1))).content
    for signature in (PEOPLE[1].sign(b"envelope", content), ME.sign(b"verdict", content), b"", b"x" * 64):
        data = pb.Envelope(content=content, signature=signature).SerializeToString()
        assert refusal_of(lambda data=data: wire.open_envelope(data, RUN)) is Refusal.BAD_SIGNATURE


def test_statements_that_their_peer_did_not_sign() -> None:
    forged = replace(commitment(), signature=commitment(1).signature)
    assert refusal_of(lambda: wire.open_envelope(sealed(Offer(forged)), RUN)) is Refusal.BAD_SIGNATURE
    signed_for_another = Certificate(verdict(), certificate(verdict(update_bytes=56)).signatures)
    assert refusal_of(lambda: wire.open_envelope(sealed(signed_for_another), RUN)) is Refusal.BAD_SIGNATURE
    invented = replace(presence(1), signature=presence(2).signature)
    assert refusal_of(lambda: wire.open_envelope(sealed(Gossip((presence(0), invented))), RUN)) is Refusal.BAD_SIGNATURE
    in_a_share = verdict(shares=[Share(forged, 1)])
    assert refusal_of(lambda: wire.open_envelope(sealed(Proposal(in_a_share)), RUN)) is Refusal.BAD_SIGNATURE


def test_certificates_need_a_majority_of_their_own_committee() -> None:
    def read(message: Certificate) -> Callable[[], object]:
        return lambda: wire.open_envelope(sealed(message), RUN)

    assert refusal_of(read(certificate(signers=(0,)))) is Refusal.NO_MAJORITY
    assert refusal_of(read(certificate(signers=()))) is Refusal.NO_MAJORITY
    assert refusal_of(read(certificate(signers=(0, 3)))) is Refusal.NOT_COMMITTEE
    assert refusal_of(read(certificate(signers=(0, 0)))) is Refusal.MALFORMED
    assert refusal_of(read(certificate(signers=(0, 1, 2, 2)))) is Refusal.MALFORMED
    alone = verdict(committee=(ME.peer_id,))
    assert wire.open_envelope(sealed(certificate(alone, (0,))), RUN).message == certificate(alone, (0,))


MALFORMED: dict[str, Message] = {
    "gossip of nobody": Gossip(()),
    "gossip of too many": Gossip((presence(0),) * (limits.GOSSIP_PRESENCES_MAX + 1)),
    "a presence of no tier": Gossip((presence(0, tier=limits.TIER_MAX + 1),)),
    "a presence of a slot before all slots": Gossip((presence(0, slot=-1),)),
    "a presence for ever": Gossip((presence(0, every=limits.PRESENCE_SLOTS_MAX + 1),)),
    "a presence for no time": Gossip((presence(0, every=0),)),
    "a presence with too many addresses": Gossip((presence(0, addresses=("a",) * (limits.ADDRESSES_MAX + 1)),)),
    "a heartbeat once in an age": Heartbeat(0, 0, -1, every=limits.PRESENCE_SLOTS_MAX + 1),
    "lists in too many parts": Heartbeat(0, 0, -1, parts=limits.HEARTBEAT_PARTS_MAX + 1),
    "an anchor of no fragment": Heartbeat(0, 0, -1, anchors=(FragmentState(limits.FRAGMENTS_MAX, 0, digest("a")),)),
    "too many addresses": Heartbeat(0, 0, -1, addresses=("a",) * (limits.ADDRESSES_MAX + 1)),
    "a long address": Heartbeat(0, 0, -1, addresses=("a" * (limits.ADDRESS_BYTES_MAX + 1),)),
    "a tier": Heartbeat(0, 17, -1),
    "a slot before all slots": Heartbeat(-2, 0, -1),
    "a slot after all slots": Goodbye(1 << 52),
    "a speed": Heartbeat(0, 0, -1, tokens_per_s=float("nan")),
    "a negative speed": Heartbeat(0, 0, -1, tokens_per_s=-1.0),
    "a loss": Heartbeat(0, 0, -1, loss=float("nan")),
    "a negative loss": Heartbeat(0, 0, -1, loss=-1.0),
    "a version": Heartbeat(0, 0, -1, version='1"\n'),
    "a long version": Heartbeat(0, 0, -1, version="1" * (limits.VERSION_LENGTH_MAX + 1)),
    "a short digest": Heartbeat(0, 0, -1, anchors=(FragmentState(0, 0, b"short"),)),
    "too many fragments": Heartbeat(0, 0, -1, anchors=(FragmentState(0, 0, digest("a")),) * (limits.FRAGMENTS_MAX + 1)),
    "too many names": CertificateRequest((CertificateName(0, digest("a")),) * (limits.RECENT_CERTIFICATES_MAX + 1)),
    "a negative slot in a name": CertificateRequest((CertificateName(-1, digest("a")),)),
    "a short signature": Vote(1, digest("v"), b"s" * 63),
    "no weight": Offer(commitment(weight=0)),
    "too much weight": Offer(commitment(weight=limits.WEIGHT_MAX + 1)),
    "an empty payload": Offer(commitment(payload_bytes=0)),
    "a huge payload": Offer(commitment(payload_bytes=limits.BLOB_BYTES_MAX + 1)),
    "a fragment": Offer(commitment(fragment=limits.FRAGMENTS_MAX)),
    "no shares": Proposal(verdict(shares=[])),
    "a share twice": Proposal(verdict(shares=[Share(commitment(), 1)] * 2)),
    "a clip": Proposal(verdict(shares=[Share(commitment(), limits.CLIP_ONE + 1)])),
    "a share of another slot": Proposal(verdict(shares=[Share(commitment(slot=8), 1)])),
    "a share of another fragment": Proposal(verdict(shares=[Share(commitment(fragment=2), 1)])),
    "a refusal of another slot": Proposal(verdict(refused=[commitment(2, slot=8)])),
    "a refusal twice": Proposal(verdict(refused=[commitment(2), commitment(2)])),
    "a share that was refused": Proposal(verdict(refused=[commitment(1)])),
    "an empty committee": Proposal(verdict(committee=())),
    "a crowded committee": Proposal(verdict(committee=tuple(p.peer_id for p in PEOPLE))),
    "two seats for one": Proposal(verdict(committee=(ME.peer_id, ME.peer_id))),
    "a stranger to the format in the committee": Proposal(verdict(committee=(b"nobody",))),
    "an empty update": Proposal(verdict(update_bytes=0)),
    "one commitment twice": Equivocation(commitment(), commitment()),
    "commitments of two peers": Equivocation(commitment(0), commitment(1)),
    "commitments to two slots": Equivocation(commitment(), commitment(slot=8)),
    "one verdict twice": Equivocation(signed_verdict(), signed_verdict()),
    "verdicts of two seats": Equivocation(signed_verdict(), signed_verdict(verdict(update_bytes=56), signer=1)),
    "verdicts on two slots": Equivocation(
        signed_verdict(), signed_verdict(verdict(slot=8, shares=[Share(commitment(slot=8), 1)]))
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_fields_out_of_bounds(name: str) -> None:
    assert refusal_of(lambda: wire.open_envelope(sealed(MALFORMED[name]), RUN)) is Refusal.MALFORMED


def test_a_proof_with_a_verdict_that_its_seat_did_not_sign() -> None:
    other = replace(signed_verdict(verdict(update_bytes=56)), signature=signed_verdict().signature)
    proof = sealed(Equivocation(signed_verdict(), other))
    assert refusal_of(lambda: wire.open_envelope(proof, RUN)) is Refusal.BAD_SIGNATURE


def test_a_proof_of_another_run() -> None:
    there = signed_verdict(verdict(run_id=OTHER_RUN, shares=[]))
    assert refusal_of(lambda: wire.open_envelope(sealed(Equivocation(there, there)), RUN)) is Refusal.WRONG_RUN


def test_shares_out_of_order() -> None:
    """Order is part of the meaning: the same contributions must have one verdict, with one hash."""
    body = pb.Verdict.FromString(verdict().body)
    shares = list(body.shares)
    del body.shares[:]
    body.shares.extend(shares[::-1])
    unsorted = replace(verdict(), body=body.SerializeToString())
    assert refusal_of(lambda: wire.open_envelope(sealed(Proposal(unsorted)), RUN)) is Refusal.MALFORMED


def test_an_envelope_with_nothing_known_in_it() -> None:
    content = pb.Content(run_id=RUN, sender=ME.peer_id, sequence=1).SerializeToString()
    data = pb.Envelope(content=content, signature=ME.sign(b"envelope", content)).SerializeToString()
    assert refusal_of(lambda: wire.open_envelope(data, RUN)) is Refusal.MALFORMED


def test_a_message_that_is_too_long() -> None:
    assert refusal_of(lambda: wire.open_envelope(bytes(limits.MESSAGE_BYTES_MAX + 1), RUN)) is Refusal.OVERSIZE


def test_rank_is_signatures_then_weight_then_the_lower_hash() -> None:
    few, many = certificate(), certificate(signers=(0, 1, 2))
    light = certificate(verdict(shares=[Share(commitment(), 1)]))
    other = certificate(verdict(update_bytes=56))
    assert many.rank() > few.rank() > light.rank()
    assert few.weight == other.weight == 24
    assert (few.rank() > other.rank()) == (few.verdict.digest < other.verdict.digest)


def test_the_largest_heartbeat_fits_a_message() -> None:
    names = tuple(CertificateName(n, digest(str(n))) for n in range(limits.RECENT_CERTIFICATES_MAX))
    anchors = tuple(FragmentState(n, n, digest(str(n))) for n in range(limits.FRAGMENTS_MAX))
    heartbeat = Heartbeat(1, 0, 1, ("a" * limits.ADDRESS_BYTES_MAX,) * limits.ADDRESSES_MAX, names, anchors, 1.0)
    assert wire.open_envelope(sealed(heartbeat), RUN).message == heartbeat


def test_the_largest_certificate_fits_a_message() -> None:
    signed = statements.signed_out(commitment(weight=limits.WEIGHT_MAX))
    share = len(pb.Share(commitment=signed, clip=1).SerializeToString())
    assert (share + 4) * limits.CONTRIBUTIONS_PER_SLOT_MAX + 1000 < limits.MESSAGE_BYTES_MAX
