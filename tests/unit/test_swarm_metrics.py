"""An observer's engine and its figures, over a swarm of real engines in virtual time."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from prometheus_client.parser import text_string_to_metric_families

from braniac.node.clock import FakeClock, SwarmClock
from braniac.node.splits import Splits
from braniac.node.swarm_metrics import SwarmCollector, SwarmMetrics
from braniac.protocol import messages, statements
from braniac.protocol.errors import Refusal
from braniac.protocol.messages import Heartbeat
from tests.unit.swarm_checks import assert_flowing, converge, forge, refusal_of
from tests.unit.swarm_harness import Peer, Swarm

RINGS = (0, 1, 2)


class Observed:
    """A swarm of one peer per tier, and an observer that joined it."""

    def __init__(self, *, slots: int = 8) -> None:
        self.swarm = Swarm.running(RINGS, rings=RINGS)
        self.observer: Peer = self.swarm.add(self.swarm.manifest.observer_tier)
        self.observer.join()
        self.engine = self.observer.engine
        self.first_slot = self.swarm.slot + 1
        self.splits = Splits(window_s=self.swarm.manifest.window * self.swarm.manifest.slot_s)
        self.clock = FakeClock()
        self.swarm_clock = SwarmClock(self.clock)
        self.swarm.run(slots)

    def figures(self) -> dict[tuple[str, ...], float]:
        """Name and label values -> value, of all that the observer would tell now."""
        metrics = SwarmMetrics("test", 1)
        for event in self.observer.log:
            metrics.note(event, self.engine)
        metrics.registry.register(SwarmCollector(self.engine, self.splits, self.clock, self.swarm_clock))
        families = text_string_to_metric_families(metrics.exposition().decode())
        return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}

    def hear(self, number: int, **changes: object) -> None:
        """A heartbeat of a peer of the swarm that says something else than the real one."""
        member = self.engine.roster.get(self.swarm.peers[number].id)
        assert member is not None
        said = Heartbeat(
            self.engine.slot,
            member.tier,
            member.ready_slot,
            recent=tuple(member.recent),
            anchors=tuple(member.anchors.values()),
        )
        assert refusal_of(self.observer, number, dataclasses.replace(said, **changes)) is None  # type: ignore[arg-type]


def test_an_observer_hears_everything_and_has_no_say() -> None:
    observed = Observed()
    swarm, observer = observed.swarm, observed.observer
    last = swarm.slot - 3
    assert_flowing(swarm, observed.first_slot, last)
    certified = swarm.certified(observed.first_slot, last)
    assert {slot for slot, event in observer.settled.items() if event.certificate is not None} >= certified.keys()
    assert not observer.engine.ready
    assert observer.engine.anchors() == {}
    for peer in swarm.peers[:3]:
        assert observer.id not in {member.peer for member in peer.engine.live_peers()}
        assert observer.id in {member.peer for member in peer.engine.roster.live(peer.engine.slot)}
        assert len(peer.engine.live_peers()) == 2
        settled = [event.certificate for event in peer.settled.values() if event.certificate is not None]
        assert not [c for c in settled if observer.id in c.verdict.committee]
    assert len(observer.engine.live_peers()) == 3
    converge(swarm, 2)
    assert [error for _, error in swarm.refusals if error.refusal is not Refusal.UNKNOWN_PEER] == []


def test_an_observer_cannot_become_ready() -> None:
    observed = Observed(slots=2)
    with pytest.raises(AssertionError):
        observed.engine.set_ready()
    tier, slot = observed.swarm.manifest.observer_tier, observed.swarm.slot
    for heartbeat in (Heartbeat(slot, tier, slot), Heartbeat(slot, tier + 1, -1)):
        assert refusal_of(observed.swarm.peers[0], 7, heartbeat) is Refusal.MALFORMED
    assert refusal_of(observed.swarm.peers[0], 7, Heartbeat(slot, tier, -1)) is None


def test_an_observer_refuses_a_certificate_of_peers_that_could_not_decide() -> None:
    observed = Observed()
    swarm = observed.swarm
    strangers = [swarm.add(0) for _ in range(2)]
    slot = swarm.slot - 1
    while swarm.manifest.fragment_of(slot) != 0:
        slot -= 1
    forged = forge(swarm, slot, strangers, strangers, swarm.peers[:2])
    before = observed.figures()["braniac_swarm_slots_total", "certified"]
    assert refusal_of(observed.observer, 0, forged) is Refusal.NOT_COMMITTEE
    assert observed.figures()["braniac_swarm_slots_total", "certified"] == before


def test_the_counts_are_those_of_the_swarm() -> None:
    observed = Observed()
    swarm, found = observed.swarm, observed.figures()
    for tier, state in itertools.product(range(3), ("ready", "joining", "silent", "gone")):
        assert found["braniac_swarm_peers", state, str(tier)] == (state == "ready")
    assert found["braniac_swarm_slot",] == swarm.slot
    assert found["braniac_swarm_window_seconds",] == len(RINGS)
    assert found["braniac_swarm_churn_total", "joined"] == 3
    certificates = [e.certificate for e in observed.observer.settled.values() if e.certificate is not None]
    assert found["braniac_swarm_slots_total", "certified"] == len(certificates) > 3
    shares = [share for certificate in certificates for share in certificate.verdict.shares]
    merged = sum(v for key, v in found.items() if key[0] == "braniac_swarm_contributions_total")
    assert merged == len(shares)
    assert found["braniac_swarm_tokens_total",] == sum(share.commitment.weight for share in shares)
    sizes = sum(share.commitment.payload_bytes for share in shares)
    assert found["braniac_swarm_certified_bytes_total", "contribution"] == sizes
    assert found["braniac_swarm_lag_slots_max",] <= 1
    assert found["braniac_swarm_observers",] == 0


def test_who_leaves_falls_silent_or_comes_back_is_counted() -> None:
    observed = Observed()
    swarm = observed.swarm
    swarm.peers[1].rest()
    swarm.peers[2].kill()
    swarm.run(8)
    found = observed.figures()
    assert found["braniac_swarm_peers", "gone", "1"] == found["braniac_swarm_peers", "silent", "2"] == 1
    assert found["braniac_swarm_churn_total", "left"] == found["braniac_swarm_churn_total", "silent"] == 1
    swarm.peers[2].restart()
    swarm.run(2)
    found = observed.figures()
    assert found["braniac_swarm_peers", "silent", "2"] == 0
    assert found["braniac_swarm_churn_total", "joined"] == 4


def test_what_peers_say_of_themselves() -> None:
    observed = Observed()
    observed.hear(0, loss=2.0, version="1.0", tokens_per_s=10.0)
    observed.hear(1, loss=9.0, version="0.9", tokens_per_s=5.0, tier=0)
    observed.hear(2, loss=3.0, version="1.0", tier=0, unreachable_slot=1, slot=observed.engine.slot - 2)
    found = observed.figures()
    assert found["braniac_swarm_loss_nats_per_byte", "0"] == 3.0  # the median
    assert ("braniac_swarm_loss_nats_per_byte", "1") not in found
    assert found["braniac_swarm_peer_versions", "1.0"] == 2
    assert found["braniac_swarm_tokens_per_second",] == 15.0
    assert found["braniac_swarm_unreachable_peers",] == 1


def test_any_number_of_versions_makes_few_series() -> None:
    observed = Observed()
    for number in range(20):
        slot = observed.engine.slot
        assert refusal_of(observed.observer, 100 + number, Heartbeat(slot, 0, -1, version=f"{number}.0")) is None
    found = observed.figures()
    versions = {key[1]: value for key, value in found.items() if key[0] == "braniac_swarm_peer_versions"}
    assert len(versions) == 9
    assert sum(versions.values()) == 23
    assert versions["unknown"] == 3
    assert versions["other"] == 13


def test_a_banned_peer_and_another_observer() -> None:
    observed = Observed()
    liar, swarm = observed.swarm.peers[2], observed.swarm
    fragment, slot = swarm.manifest.fragment_of(swarm.slot), swarm.slot
    first, second = (
        statements.make_commitment(liar.identity, swarm.manifest.run_id, slot, fragment, bytes([n] * 32), 9, 5)
        for n in (1, 2)
    )
    assert refusal_of(observed.observer, 0, messages.Equivocation(first, second)) is None
    assert refusal_of(observed.observer, 50, Heartbeat(slot, swarm.manifest.observer_tier, -1)) is None
    found = observed.figures()
    assert found["braniac_swarm_bans_total",] == 1
    assert found["braniac_swarm_observers",] == 1
    assert sum(v for key, v in found.items() if key[0] == "braniac_swarm_peers") == 2


def test_other_bytes_after_the_same_slot_are_a_split() -> None:
    observed = Observed()
    member = observed.engine.roster.get(observed.swarm.peers[0].id)
    assert member is not None

    def look(at_s: float) -> None:
        shown = [state for m in observed.engine.live_peers() for state in m.anchors.values()]
        observed.splits.look(at_s, shown)

    look(1.0)
    assert observed.figures()["braniac_swarm_split_fragments",] == 0
    states = [dataclasses.replace(state, digest=bytes(32)) for state in member.anchors.values() if state.fragment == 0]
    observed.hear(0, anchors=tuple(states))
    look(2.0)
    look(6.5)
    found = observed.figures()
    assert found["braniac_swarm_split_fragments",] == 1
    assert found["braniac_swarm_split_seconds",] == 4.5 > found["braniac_swarm_window_seconds",]


def test_the_age_of_the_last_certificate_and_the_spread_of_clocks() -> None:
    observed = Observed(slots=2)
    collector = SwarmCollector(observed.engine, observed.splits, observed.clock, observed.swarm_clock)
    observed.clock.advance(7.0)
    for number, ahead_s in enumerate((0.0, 0.0, 2.5)):
        now = observed.clock.monotonic()
        observed.swarm_clock.observe(observed.swarm.peers[number].id, observed.swarm_clock.now() + ahead_s, now, now)
    found = {family.name: family.samples[0].value for family in collector.collect() if family.samples}
    assert found["braniac_swarm_certificate_age_seconds"] == 7.0
    assert found["braniac_swarm_clock_spread_seconds"] == 2.5
