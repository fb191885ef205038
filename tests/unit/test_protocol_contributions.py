"""The record of who contributed how much: each standing certificate counted once, whoever counts."""

from __future__ import annotations

import copy
import json

import pytest

from braniac.protocol import limits, messages, statements
from braniac.protocol.contributions import Contributions, Total
from braniac.protocol.errors import IdentityError
from braniac.protocol.history import History
from braniac.protocol.identity import PeerId
from tests.unit.swarm_checks import WINDOW, converge
from tests.unit.swarm_harness import Peer, Swarm, identity


def certificate(slot: int, weights: dict[int, int], signatures: int = 2, update: bytes = b"u") -> messages.Certificate:
    """Of a committee of peers 0, 1, 2, with so many tokens of each contributor."""
    run_id = bytes(32)
    shares = []
    for number, weight in sorted(weights.items(), key=lambda item: identity(item[0]).peer_id):
        commitment = statements.make_commitment(identity(number), run_id, slot, 0, bytes(32), 10, weight)
        shares.append(messages.Share(commitment, limits.CLIP_ONE))
    committee = tuple(identity(n).peer_id for n in range(3))
    verdict = statements.make_verdict(run_id, slot, 0, committee, shares, update * 32, 10)
    signed = tuple((peer, bytes(64)) for peer in committee[:signatures])
    return messages.Certificate(verdict, signed)


def totals(record: Contributions) -> dict[PeerId, Total]:
    return dict(record.ranking())


def of(record: Contributions, number: int) -> tuple[int, int]:
    total = record.of(identity(number).peer_id)
    return total.contributions, total.tokens


def test_each_certificate_counts_once() -> None:
    record = Contributions()
    first = certificate(5, {1: 100, 2: 30})
    for _ in range(3):
        record.note(first)
    record.note(certificate(6, {2: 50}))
    assert (of(record, 1), of(record, 2), of(record, 3)) == ((1, 100), (2, 80), (0, 0))
    assert (record.certificates, record.first_slot) == (2, 5)
    assert [peer for peer, _ in record.ranking()] == [identity(1).peer_id, identity(2).peer_id]


def test_a_better_certificate_replaces_the_one_that_was_counted() -> None:
    two, three = certificate(5, {1: 100}, signatures=2), certificate(5, {2: 7}, signatures=3)
    for order in ((two, three), (three, two)):
        record = Contributions()
        for one in order:
            record.note(one)
        assert totals(record) == {identity(2).peer_id: Total(1, 7)}
        assert record.certificates == 1


def test_a_slot_that_is_final_is_counted_for_good() -> None:
    record = Contributions()
    record.note(certificate(5, {1: 100}, signatures=2))
    record.prune(final_slot=5, horizon_slot=-1)
    record.note(certificate(5, {2: 7}, signatures=3))
    assert totals(record) == {identity(1).peer_id: Total(1, 100)}
    record.prune(final_slot=20, horizon_slot=5)
    assert not record._closed
    assert not record._open


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONTRIBUTORS_MAX", 3)
    record = Contributions()
    for number, weight in ((1, 50), (2, 10), (3, 70), (4, 20)):
        record.note(certificate(number, {number: weight}))
    assert {peer for peer, _ in record.ranking()} == {identity(n).peer_id for n in (1, 3, 4)}
    record.note(certificate(2, {5: 1000}, signatures=3))  # replaces what was of the one that was dropped
    assert of(record, 2) == (0, 0)
    assert len(record.ranking()) == 3


def test_it_survives_a_restart() -> None:
    record = Contributions()
    record.note(certificate(5, {1: 100, 2: 30}))
    record.prune(final_slot=5, horizon_slot=0)
    record.note(certificate(9, {1: 1}))
    again = Contributions.from_json(json.loads(json.dumps(record.to_json())))
    assert totals(again) == totals(record)
    for one in (record, again):
        one.note(certificate(5, {1: 100, 2: 30}))
        one.note(certificate(9, {2: 1}, signatures=3))
    assert totals(again) == totals(record) == {identity(1).peer_id: Total(1, 100), identity(2).peer_id: Total(2, 31)}
    assert again.to_json() == record.to_json()


@pytest.mark.parametrize("damage", ["totals", "open", "closed", "certificates"])
def test_damage_is_noticed(damage: str) -> None:
    record = Contributions()
    record.note(certificate(5, {1: 100}))
    stored = record.to_json()
    stored[damage] = {"nobody": [1]} if damage in ("totals", "open") else "x"
    with pytest.raises((IdentityError, KeyError, TypeError, ValueError)):
        Contributions.from_json(stored)


# --- in a swarm ------------------------------------------------------------------------------------------------------


def difference(peer: Peer, before: dict[PeerId, Total]) -> dict[PeerId, Total]:
    return {
        other: Total(now.contributions - before.get(other, Total()).contributions, now.tokens - was)
        for other, now in peer.engine.history.contributions.ranking()
        for was in [before.get(other, Total()).tokens]
    }


@pytest.mark.parametrize(("tiers", "loss"), [((0, 0, 0), 0.2), ((0, 1, 1), 0.0)])
def test_two_nodes_come_to_the_same_totals(tiers: tuple[int, ...], loss: float) -> None:
    """Also those that hold other fragments, and those that joined later, over the slots that they were there."""
    swarm = Swarm.running(tiers, rings=(0, 0, 1) if len(set(tiers)) > 1 else (0, 0, 0), seed=5)
    converge(swarm, 2)
    before = [dict(peer.engine.history.contributions.ranking()) for peer in swarm.peers]
    swarm.loss = loss
    swarm.run(2 * WINDOW)
    swarm.loss = 0.0
    converge(swarm, 3)
    found = [difference(peer, was) for peer, was in zip(swarm.peers, before, strict=True)]
    assert found[0] == found[1] == found[2]
    assert set(found[0]) == {peer.id for peer in swarm.peers}
    for peer in swarm.peers:
        total = found[0][peer.id]
        assert total.tokens == total.contributions * swarm.tokens(peer.number) > 0


def test_the_totals_are_those_of_the_certificates() -> None:
    swarm = Swarm.running([0] * 3, slots=10)
    converge(swarm, 1)
    founder = swarm.peers[0]
    expected: dict[PeerId, int] = {}
    standing = [event.certificate for event in founder.settled.values() if event.certificate]
    for one in standing:
        for share in one.verdict.shares:
            expected[share.commitment.peer] = expected.get(share.commitment.peer, 0) + share.commitment.weight
    record = founder.engine.history.contributions
    assert {peer: total.tokens for peer, total in record.ranking()} == expected
    assert record.certificates == len(standing)


def test_a_certificate_that_is_undone_is_taken_back() -> None:
    """Two committees for one slot, as in a partition: everybody's record is that of the certificates that stand."""
    swarm = Swarm.running([0] * 3)
    converge(swarm, 2)
    first, before = swarm.slot, [dict(peer.engine.history.contributions.ranking()) for peer in swarm.peers]
    swarm.cut((0,), (1, 2))
    swarm.run(limits.ROSTER_LIVE_SLOTS + 1.5)  # until the lone one decides alone
    lone = swarm.peers[0]
    alone = set(lone.engine.history.contributions._open)
    swarm.cuts.clear()
    swarm.run(3)
    assert alone
    assert lone.undone
    for peer, was in zip(swarm.peers, before, strict=True):
        expected: dict[PeerId, int] = {}
        for slot in range(first + 1, swarm.slot + 1):
            if (entry := peer.engine.history.entry(slot)) is not None:
                for share in entry.certificate.verdict.shares:
                    expected[share.commitment.peer] = expected.get(share.commitment.peer, 0) + share.commitment.weight
        assert {other: total.tokens for other, total in difference(peer, was).items()} == expected


def test_an_old_certificate_of_a_fragment_that_is_not_held_is_not_counted_again() -> None:
    swarm = Swarm.running([0, 1, 0], rings=(0, 0, 1), slots=4)
    small, record = swarm.peers[1], swarm.peers[1].engine.history.contributions
    old = next(e.certificate for e in small.settled.values() if e.fragment == 2 and e.certificate is not None)
    swarm.run(5 * small.engine.manifest.window)
    before = copy.deepcopy(totals(record))
    small.engine._certificates.take(old, swarm.slot)
    assert totals(record) == before


def test_kill_and_restart_count_nothing_twice() -> None:
    swarm = Swarm.running([0] * 3, slots=5)
    peer = swarm.peers[2]
    peer.kill()
    swarm.run(2)
    peer.restart()
    converge(swarm, 8)
    founder = swarm.peers[0].engine.history.contributions
    mine = peer.engine.history.contributions
    missed = {slot for slot in swarm.peers[0].settled if mine.first_slot is not None and slot < mine.first_slot}
    before = sum(
        share.commitment.weight
        for slot in missed
        if (found := swarm.peers[0].settled[slot].certificate) is not None
        for share in found.verdict.shares
        if share.commitment.peer == peer.id
    )
    assert mine.of(peer.id).tokens == founder.of(peer.id).tokens - before


def test_a_state_of_a_version_that_did_not_count_is_read() -> None:
    swarm = Swarm.running([0] * 2, slots=4)
    stored = swarm.peers[0].engine.state()
    del stored["contributions"]
    history = History.from_json(swarm.manifest, stored)
    assert history.contributions.certificates == len(stored["entries"]) > 0
