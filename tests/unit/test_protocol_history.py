"""Which certificates stand, what is undone for a better one, and what survives a restart."""

from __future__ import annotations

import hashlib
import json

import pytest

from braniac.protocol import limits, statements
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.history import History
from braniac.protocol.messages import Certificate, CertificateName, Share
from tests.unit.swarm_harness import identity, make_manifest

MANIFEST = make_manifest(rings=(0, 0, 0))
WINDOW = MANIFEST.window
HORIZON = limits.HISTORY_WINDOWS * WINDOW
PEOPLE = [identity(n) for n in range(3)]


def certificate(slot: int, *, weight: int = 5, signers: int = 2, update: str = "") -> Certificate:
    fragment = MANIFEST.fragment_of(slot)
    run_id = MANIFEST.run_id
    share = Share(statements.make_commitment(PEOPLE[0], run_id, slot, fragment, payload(slot), 9, weight), 1)
    committee = tuple(person.peer_id for person in PEOPLE)
    digest = hashlib.sha256(f"update {slot} {update}".encode()).digest()
    verdict = statements.make_verdict(run_id, slot, fragment, committee, [share], digest, 9)
    signatures = tuple((p.peer_id, statements.sign_verdict(p, verdict.digest)) for p in PEOPLE[:signers])
    return Certificate(verdict, signatures)


def payload(slot: int) -> bytes:
    return hashlib.sha256(f"payload {slot}".encode()).digest()


def began(*fragments: int) -> History:
    history = History(MANIFEST)
    history.begin(fragments or MANIFEST.held(0))
    return history


def apply(history: History, given: Certificate, now_slot: int, own: bytes | None = None) -> None:
    """What engine and daemon do with a certificate that arrived."""
    news, loser = history.accept(given, now_slot)
    assert news
    if loser is not None:
        history.confirm(loser.certificate, loser.acknowledged, undo=True)
    entry = history.entry(given.verdict.slot)
    assert entry is not None
    entry.handed, entry.acknowledged = True, own
    history.confirm(given, own, undo=False)


def refusal(history: History, given: Certificate, now_slot: int) -> Refusal:
    with pytest.raises(WireError) as caught:
        history.accept(given, now_slot)
    return caught.value.refusal


def test_a_certificate_is_news_once() -> None:
    history = began()
    assert history.accept(certificate(4), 4) == (True, None)
    assert history.accept(certificate(4), 4) == (False, None)
    assert history.covered(certificate(4).name)
    assert not history.covered(CertificateName(4, bytes(32)))
    assert [c.name for c in history.missing_updates()] == [certificate(4).name]
    assert [e.certificate for e in history.waiting_for(certificate(4).verdict.update_digest)] == [certificate(4)]


@pytest.mark.parametrize("better_first", [True, False])
def test_the_better_certificate_stands_whatever_came_first(better_first: bool) -> None:
    pairs = [(certificate(4, weight=9), certificate(4)), (certificate(4, signers=3), certificate(4, weight=99))]
    by_hash = sorted([certificate(4), certificate(4, update="x")], key=lambda c: c.verdict.digest)
    for better, worse in [*pairs, (by_hash[0], by_hash[1])]:
        history = began()
        if better_first:
            apply(history, better, 4)
            assert refusal(history, worse, 4) is Refusal.CONFLICT
        else:
            apply(history, worse, 4, own=payload(4))
            news, loser = history.accept(better, 4)
            assert news
            assert loser is not None
            assert loser.certificate == worse
            assert loser.acknowledged == payload(4)
        entry = history.entry(4)
        assert entry is not None
        assert entry.certificate == better


def test_one_that_was_never_applied_needs_no_undoing() -> None:
    history = began()
    history.accept(certificate(4), 4)
    assert history.accept(certificate(4, weight=9, update="better"), 4) == (True, None)
    assert history.waiting_for(certificate(4).verdict.update_digest) == []


def test_after_a_window_a_slot_is_final() -> None:
    history = began()
    apply(history, certificate(4), 4)
    assert not history.final(4, 3 + WINDOW)
    assert history.final(4, 4 + WINDOW)
    assert refusal(history, certificate(4, weight=9), 4 + WINDOW) is Refusal.CONFLICT
    assert history.accept(certificate(5), 5 + WINDOW) == (True, None), "an empty slot may still be filled"


def test_beyond_the_horizon_it_is_too_late() -> None:
    history = began()
    assert refusal(history, certificate(4), 4 + HORIZON) is Refusal.STALE
    assert history.accept(certificate(4), 3 + HORIZON) == (True, None)


def test_an_undone_certificate_keeps_its_blob_until_the_undo_is_confirmed() -> None:
    history = began()
    worse, better = certificate(4), certificate(4, weight=9, update="better")
    apply(history, worse, 4)
    history.accept(better, 4)
    assert {worse.verdict.update_digest, better.verdict.update_digest} <= history.blobs()
    history.confirm(worse, None, undo=True)
    assert worse.verdict.update_digest not in history.blobs()
    assert history.last[1] == 4, "the last slot never goes back (I3)"


def test_fragments_that_are_not_here_are_nobodys_business() -> None:
    history = began(0)
    assert history.covered(certificate(4).name)
    assert history.accept(certificate(4), 4) == (False, None)
    assert history.missing_updates() == []


def test_a_downloaded_anchor_covers_earlier_slots_and_no_later_ones() -> None:
    history = began()
    history.offers = {1: payload(1), 2: payload(2), 4: payload(4)}
    for slot in (1, 4, 7):
        apply(history, certificate(slot), 7, own=payload(slot))
    history.lose(1)
    assert history.missing_updates() == []
    history.restore(1, 4)
    assert history.last[1] == history.floor[1] == 4
    assert history.covered(CertificateName(4, bytes(32))), "whatever the certificate, it is in the anchor or not"
    assert [c.verdict.slot for c in history.missing_updates()] == [7]
    assert history.offers == {2: payload(2)}, "the weights were replaced: nothing of these offers is in them"
    assert [n.slot for n in history.recent(7)] == [4, 1], "others may still ask for them"
    assert history.to_json()["entries"] == []


def test_recent_names_what_can_be_served_newest_first() -> None:
    history = began()
    for slot in (3, 5, 4):
        apply(history, certificate(slot), 5)
    history.accept(certificate(6), 6)
    assert [name.slot for name in history.recent(6)] == [5, 4, 3]
    assert [name.slot for name in history.recent(3 + HORIZON)] == [5, 4]


def test_pruning_forgets_what_is_beyond_the_horizon() -> None:
    history = began()
    history.offers = {3: payload(3), 5: payload(5)}
    for slot in (3, 5):
        apply(history, certificate(slot), 5)
    history.prune(3 + HORIZON)
    assert history.entry(3) is None
    assert history.offers == {5: payload(5)}
    assert history.blobs() == {certificate(5).verdict.update_digest, payload(5)}
    assert history.confirmed_blobs() == history.blobs()
    assert history.last[0] == 3


def test_only_what_is_in_the_weights_is_stored() -> None:
    history = began()
    history.offers = {3: payload(3), 4: payload(4)}
    apply(history, certificate(3), 5, own=payload(3))
    handed_over = certificate(4)
    history.accept(handed_over, 5)
    entry = history.entry(4)
    assert entry is not None
    entry.handed = True  # the daemon has it and has not said that it was applied
    history.accept(certificate(5), 5)  # its update is still being fetched
    stored = json.loads(json.dumps(history.to_json()))
    again = History.from_json(MANIFEST, stored)
    assert [name.slot for name in again.recent(5)] == [3]
    assert (again.offers, again.last, again.floor) == (history.offers, history.last, history.floor)
    assert again.acknowledged() == 1
    assert again.to_json() == history.to_json()
    assert again.accept(handed_over, 5) == (True, None)


def test_a_better_certificate_after_a_restart_undoes_the_stored_one() -> None:
    history = began()
    apply(history, certificate(4), 4, own=payload(4))
    again = History.from_json(MANIFEST, history.to_json())
    _, loser = again.accept(certificate(4, weight=9), 4)
    assert loser is not None
    assert loser.acknowledged == payload(4)


def test_damaged_state_is_refused() -> None:
    history = began()
    apply(history, certificate(4), 4)
    good = history.to_json()
    flipped = good["entries"][0]["certificate"].replace("0", "1", 3)
    for damage in (
        {"entries": [{"certificate": flipped, "acknowledged": None}]},
        {"entries": [{"certificate": "zz", "acknowledged": None}]},
        {"offers": {"four": "00"}},
        {"last": {"0": "?"}},
    ):
        with pytest.raises((WireError, KeyError, ValueError)):
            History.from_json(MANIFEST, good | damage)
    with pytest.raises(KeyError):
        History.from_json(MANIFEST, {})
