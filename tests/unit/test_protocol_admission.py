"""Places in a slot: many identities of one person get few of them, and a small or young swarm notices nothing."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from braniac.protocol import codec, limits, messages, statements
from braniac.protocol.admission import Places
from braniac.protocol.errors import Refusal
from braniac.protocol.identity import PeerId
from braniac.protocol.roster import Member
from tests.unit.swarm_checks import WINDOW, assert_flowing, owner_of, refusal_of
from tests.unit.swarm_harness import Peer, Swarm, identity

RUN = hashlib.sha256(b"run").digest()
AGE = limits.NEWCOMER_WINDOWS * WINDOW
SYBILS, HONEST = 64, 16


def member(number: int, *, known_slot: int = 0, network: str = "") -> Member:
    return Member(identity(number).peer_id, 0, 0, 100, known_slot=known_slot, network=network)


def admitted(members: list[Member], *, slot: int = 100, taken: tuple[PeerId, ...] = ()) -> set[PeerId]:
    places = Places(RUN, slot, WINDOW)
    return {m.peer for m in members if places.admit(m.peer, members, taken)}


def test_a_network_has_few_places_and_all_of_it_get_their_turn() -> None:
    crowd = [member(n, network="203.0.114.0/24") for n in range(12)]
    others = [member(n, network=f"198.51.{n}.0/24") for n in range(20, 30)]
    turns: Counter[PeerId] = Counter()
    for slot in range(100, 200):
        found = admitted(crowd + others, slot=slot)
        assert {m.peer for m in others} <= found
        assert len(found) == len(others) + limits.NETWORK_PLACES
        turns.update(found & {m.peer for m in crowd})
    assert all(15 < turns[m.peer] < 55 for m in crowd)  # 33 expected


def test_private_and_unknown_networks_are_not_limited() -> None:
    crowd = [member(n) for n in range(40)]
    assert len(admitted(crowd)) == 40


def test_newcomers_get_as_many_places_as_veterans() -> None:
    veterans = [member(n) for n in range(12)]
    newcomers = [member(n, known_slot=100 - AGE + 1) for n in range(100, 150)]
    found = admitted(veterans + newcomers)
    assert {m.peer for m in veterans} <= found
    assert len(found) == 24


@pytest.mark.parametrize("veterans", [1, 3])
def test_a_small_swarm_takes_all_newcomers(veterans: int) -> None:
    members = [member(n) for n in range(veterans)]
    members += [member(100 + n, known_slot=99) for n in range(limits.NEWCOMER_PLACES)]
    assert len(admitted(members)) == len(members)


def test_to_a_young_peer_nobody_is_new() -> None:
    members = [member(n, known_slot=95) for n in range(50)]
    assert len(admitted(members)) == 50


def test_who_announced_in_vain_comes_after_the_others() -> None:
    crowd = [member(n, network="203.0.114.0/24") for n in range(6)]
    crowd[0].undelivered = crowd[1].undelivered = 1
    for slot in range(100, 110):
        assert admitted(crowd, slot=slot) == {m.peer for m in crowd[2:]}


def test_what_is_announced_and_not_delivered_is_remembered_until_something_is() -> None:
    swarm = Swarm.running([0] * 3)
    miser = swarm.peers[2]
    honest_offer = miser._offer
    miser._offer = lambda slot, f: miser.engine.offer(slot, hashlib.sha256(b"%d" % slot).digest(), 9, 5)  # type: ignore
    swarm.run(6)
    counts = [peer.engine.roster.get(miser.id).undelivered for peer in swarm.peers[:2]]  # type: ignore[union-attr]
    assert sum(counts) > 0
    miser._offer = honest_offer  # type: ignore[method-assign]
    swarm.run(12)
    counts = [peer.engine.roster.get(miser.id).undelivered for peer in swarm.peers[:2]]  # type: ignore[union-attr]
    assert counts == [0, 0]


def test_who_has_a_place_keeps_it_when_others_turn_up() -> None:
    crowd = [member(n, network="203.0.114.0/24") for n in range(12)]
    places = Places(RUN, 100, WINDOW)
    first = {m.peer for m in crowd[:4] if places.admit(m.peer, crowd[:4], ())}
    assert len(first) == 4
    assert not any(places.admit(m.peer, crowd, first) for m in crowd[4:])
    assert all(places.admit(peer, crowd, first) for peer in first)


def test_places_are_given_away_a_few_times_only() -> None:
    """Whoever turns up in the middle of the slot with one new identity after another waits for the next slot."""
    places, members = Places(RUN, 100, WINDOW), [member(0)]
    for number in range(1, 20):
        members.append(member(number))
        assert places.admit(members[-1].peer, members, ()) == (number <= limits.ADMISSION_LOOKS)


# --- a swarm ---------------------------------------------------------------------------------------------------------


def sybil_payload(swarm: Swarm, slot: int, number: int) -> bytes:
    f = swarm.manifest.fragment_of(slot)
    layout = swarm.manifest.fragments[f].layout
    work = np.random.default_rng([number, slot]).integers(-(1 << 14), 1 << 14, layout.size)
    return codec.encode_topk(layout, swarm.manifest.up, work)[0]


def appear(swarm: Swarm) -> None:
    """All sybils say that they are there. They cannot be dialled, so they have no seats."""
    heartbeat = messages.Heartbeat(swarm.slot, 0, 1, unreachable_slot=1)
    for peer in swarm.peers:
        for n in range(SYBILS):
            assert refusal_of(peer, 1000 + n, heartbeat) is None
            peer.engine.roster.locate(identity(1000 + n).peer_id, "203.0.114.0/24")


def flood(swarm: Swarm, owner: Peer, slot: int) -> Counter[Refusal | None]:
    """Each sybil offers work of its own to the owner, who can have it from wherever it likes."""
    f, answers = swarm.manifest.fragment_of(slot), Counter[Refusal | None]()
    for n in range(SYBILS):
        sybil, payload = identity(1000 + n), sybil_payload(swarm, slot, n)
        digest = owner._put(payload)
        made = statements.make_commitment(sybil, swarm.manifest.run_id, slot, f, digest, len(payload), 1700)
        answers[refusal_of(owner, 1000 + n, messages.Offer(made))] += 1
    return answers


def test_64_sybils_of_one_network_among_16_honest_peers() -> None:
    """In every slot they have the few places of a network, nobody waits for the others, and the honest lose nothing."""
    swarm = Swarm.running([0] * HONEST)
    for peer in swarm.peers:
        for other in swarm.peers:
            peer.engine.roster.locate(other.id, f"198.51.{other.number}.0/24")
    first = swarm.slot + 1
    for slot in range(first, first + 2):
        swarm.run_until(swarm.manifest.slot_start(slot) - 0.3)
        appear(swarm)
        owner = owner_of(swarm, slot)
        swarm.run_until(swarm.manifest.slot_start(slot) + 0.001)
        answers = flood(swarm, owner, slot)
        assert answers == {None: limits.NETWORK_PLACES, Refusal.CROWDED: SYBILS - limits.NETWORK_PLACES}
        swarm.run(0.6)
        certificate = owner.settled[slot].certificate
        assert certificate is not None, "it waited for those that it had sent away"
        shares = certificate.verdict.shares
        assert {peer.id for peer in swarm.peers} <= {share.commitment.peer for share in shares}
        theirs = [s for s in shares if s.commitment.peer not in swarm.by_id]
        assert len(theirs) == limits.NETWORK_PLACES
        weight = sum(share.commitment.weight for share in theirs)
        assert weight / certificate.weight <= limits.NETWORK_PLACES / len(shares)
    assert_flowing(swarm, first, first)


def test_without_a_network_they_are_still_new() -> None:
    """The others have been there for some windows."""
    swarm = Swarm.running([0] * 6)
    for peer in swarm.peers:
        for other in peer.engine.roster:
            other.known_slot -= AGE
    appear(swarm)
    for peer in swarm.peers:
        for n in range(SYBILS):
            peer.engine.roster.locate(identity(1000 + n).peer_id, "")
    slot = swarm.slot + 1
    owner = owner_of(swarm, slot)
    swarm.run_until(swarm.manifest.slot_start(slot) + 0.001)
    assert flood(swarm, owner, slot)[None] == limits.NEWCOMER_PLACES
