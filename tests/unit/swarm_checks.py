"""What tests ask of a swarm, and what its liars do; see swarm_harness.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from braniac.protocol import codec, committee, events, messages, statements, wire
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.manifest import Manifest
from braniac.protocol.merge import Contribution, Merged, merge
from braniac.protocol.tiles import Sparse
from tests.unit.swarm_harness import Peer, Swarm, identity

WINDOW = 3  # fragments in the harness's default run


def converge(swarm: Swarm, slots: float, late: int = 0) -> None:
    """Let time pass until just before the end of a slot, and check everything.

    In a large swarm what somebody missed may take a slot more to come around: they agree at the end of one of `late`.
    """
    swarm.run(slots)
    swarm.run_until(swarm.manifest.slot_start(swarm.slot + 1) - 0.001)
    while late and swarm.disputed():
        swarm.run(1)
        late -= 1
    swarm.check()


def owner_of(swarm: Swarm, slot: int) -> Peer:
    """Who will own a slot if all live peers are ready."""
    ready = [peer.id for peer in swarm.live]
    return swarm.by_id[committee.committee(swarm.manifest.run_id, slot, ready)[0]]


def seats_of(swarm: Swarm, slot: int) -> tuple[bytes, ...]:
    return committee.committee(swarm.manifest.run_id, slot, [peer.id for peer in swarm.live])


def assert_flowing(swarm: Swarm, first: int, last: int) -> None:
    missing = [slot for slot, digest in swarm.certified(first, last).items() if digest is None]
    assert not missing, f"slots without a certificate: {missing}"


def acknowledged_and_listed(swarm: Swarm) -> None:
    """Every applied certificate that lists a peer has taken exactly that peer's listed payload from it."""
    checked = 0
    for peer in swarm.live:
        for entry in peer.engine.history._confirmed.values():
            share = entry.certificate.verdict.share_of(peer.id)
            listed = share.commitment.payload_digest if share else None
            assert entry.acknowledged == listed
            assert listed in (None, peer.offered.get(entry.certificate.verdict.slot))
            checked += listed is not None
    assert checked > 0


def banned_by(peer: Peer) -> set[bytes]:
    return set(peer.engine.roster.banned)


def reached(phase: str, owner: Peer, slot: int) -> bool:
    """Whether the owner stands in that phase of its slot."""
    seen = [type(event) for event in owner.log if getattr(event, "slot", None) == slot]
    current = owner.engine._rounds._rounds.get(slot)
    match phase:
        case "before it begins":
            return True
        case "due":
            return events.FragmentDue in seen
        case "collecting":
            return current is not None and bool(current.commitments)
        case "merging":
            return events.MergeDue in seen
        case "proposed":
            return current is not None and current.verdict is not None
    return slot in owner.settled


def stop_certificates(swarm: Swarm) -> Callable[[], None]:
    """No owner proposes until the returned function is called."""
    for peer in swarm.peers:
        peer._merge = lambda due: None  # type: ignore[method-assign]

    def go_on() -> None:
        for peer in swarm.peers:
            del peer.__dict__["_merge"]

    return go_on


def forge(swarm: Swarm, slot: int, seats: list[Peer], signers: list[Peer], sharers: list[Peer]) -> messages.Certificate:
    """A certificate of a committee that saw another roster: real contributions, a real merge, real signatures."""
    manifest, f = swarm.manifest, swarm.manifest.fragment_of(slot)
    commitments, contributions = {}, []
    for peer in sharers:
        payload = peer.blobs[peer.offered[slot]]
        weight = swarm.tokens(peer.number)
        commitments[peer.id] = statements.make_commitment(
            peer.identity, manifest.run_id, slot, f, peer.offered[slot], len(payload), weight
        )
        contributions.append(Contribution(peer.id, weight, payload))
    merged = merge(manifest, f, contributions)
    assert merged is not None
    for peer in seats:
        peer.blobs[merged.digest] = merged.update
    verdict = statements.make_verdict(
        manifest.run_id,
        slot,
        f,
        tuple(peer.id for peer in seats),
        [messages.Share(commitments[peer], clip) for peer, clip in merged.admitted],
        merged.digest,
        len(merged.update),
    )
    signatures = tuple((peer.id, statements.sign_verdict(peer.identity, verdict.digest)) for peer in signers)
    return messages.Certificate(verdict, signatures)


def one_more(manifest: Manifest, fragment: int, merged: Merged) -> Merged:
    """A merge in which one level of the update is larger than it should be."""
    layout, rules = manifest.fragments[fragment].layout, manifest.down
    update = codec.decode(layout, rules, merged.update)
    values = update.values.copy()
    values[values == values[0]] += np.int32(np.sign(values[0]) << 12)
    return dataclasses.replace(merged, update=codec.encode(layout, rules, Sparse(update.positions, values))[0])


SEQUENCE = iter(range(1 << 40, 1 << 41))


def announce(liar: Peer, slot: int, payload: bytes, to: Peer) -> None:
    """Put a payload into the liar's store and promise it to one peer."""
    digest = liar._put(payload)
    f = liar.swarm.manifest.fragment_of(slot)
    commitment = statements.make_commitment(liar.identity, liar.swarm.manifest.run_id, slot, f, digest, len(payload), 7)
    data = wire.seal(liar.identity, liar.swarm.manifest.run_id, next(SEQUENCE), messages.Offer(commitment))
    liar.swarm.send(liar, to.id, data)


def two_payloads(swarm: Swarm, slot: int) -> tuple[bytes, bytes]:
    f = swarm.manifest.fragment_of(slot)
    layout = swarm.manifest.fragments[f].layout
    payloads = [codec.encode_topk(layout, swarm.manifest.up, swarm.initial(f) * sign)[0] for sign in (1, -1)]
    return payloads[0], payloads[1]


def refusal_of(peer: Peer, sender: int, message: messages.Message, sequence: int | None = None) -> Refusal | None:
    """What the peer says to a message; None if it takes it."""
    number = next(SEQUENCE) if sequence is None else sequence
    data = wire.seal(identity(sender), peer.swarm.manifest.run_id, number, message)
    try:
        peer.engine.receive(data, peer.swarm.now)
    except WireError as error:
        return error.refusal
    finally:
        peer.pump()
    return None
