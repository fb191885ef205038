"""What a node says about itself: the record of every slot, its state and why, and that all of it is JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from braniac.node import status as status_module
from braniac.node.answers import Answers
from braniac.node.clock import FakeClock, SwarmClock
from braniac.node.commands import json_text, message_dict
from braniac.node.config import CapsSection, NetworkSection, NodeConfig, StateSection
from braniac.node.exchange import Exchange
from braniac.node.governor import Governor
from braniac.node.joiner import DownloadBar
from braniac.node.metrics import EventLoopLag, Metrics
from braniac.node.network import Network
from braniac.node.policy import Policy
from braniac.node.replies import peers_text, status_text
from braniac.node.sensors import Sample, Sensors
from braniac.node.startup import Equipment
from braniac.node.status import Status
from braniac.node.throttle import Throttle
from braniac.protocol import events, limits
from braniac.protocol.identity import peer_id_text
from braniac.protocol.wire import Heartbeat
from tests.unit.node_harness import identity
from tests.unit.solo_node import MANIFEST, ME, Node

PEER = f"/ip4/203.0.113.7/tcp/4001/p2p/{peer_id_text(identity(1).peer_id)}"


class Watched:
    """A lone node with a status, fed as the daemon feeds it."""

    def __init__(self, root: Path) -> None:
        self.node = Node(root)
        clock, metrics = FakeClock(), Metrics("test", 1)
        swarm_clock = SwarmClock(clock)
        config = NodeConfig(network=NetworkSection(peers=(PEER,)), state=StateSection(dir=root))
        network = Network(config.network, root / "identity.key", ME, clock)
        exchange = Exchange(self.node.store, metrics, clock, swarm_clock, 10.0)
        self.equipment = Equipment(config, clock, swarm_clock, metrics, self.node.store, ME, network, exchange)
        self.left: list[bool] = []
        lag = EventLoopLag(metrics.event_loop_lag, clock)
        self.governor = Governor(Policy(), Sensors(), self.equipment.clock, sample_s=5.0)
        self.status = Status(self.equipment)
        self.answers = Answers(self.equipment, self.status, lag, self.governor, lambda *, now: self.left.append(now))

    async def slot(self) -> None:
        for event in await self.node.slot():
            if isinstance(event, events.SlotBegan):
                self.status.slot_began(event)
            if isinstance(event, events.SlotSettled):
                self.status.report(event)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.equipment.metrics.registry.get_sample_value(name, labels)


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    watched = Watched(tmp_path)
    yield watched
    await asyncio.to_thread(watched.node.close)


def is_json(watched: Watched) -> bool:
    """Whether both replies can be printed, as JSON and for people."""
    status, peers = watched.answers.status(0), watched.answers.peers()
    assert status_text(status)
    assert peers_text(peers)
    return all(json.loads(json_text(message_dict(reply))) for reply in (status, peers))


def test_before_a_run_there_is_little_to_say(watched: Watched) -> None:
    reply = watched.answers.status(0)
    assert (reply.peer_id, reply.state, reply.run_id) == (peer_id_text(ME.peer_id), "starting", "")
    assert reply.state_reason == "0 peers"
    assert not reply.HasField("train_loss")
    watched.equipment.network.failures[PEER] = "nobody listens there"
    assert watched.answers.status(0).state_reason == f"0 peers ({PEER}: nobody listens there)"
    assert is_json(watched)


async def test_every_slot_leaves_one_record(watched: Watched) -> None:
    watched.status.take_part(watched.node.engine, watched.node.replica)
    for _ in range(10):
        await watched.slot()
    reply = watched.answers.status(0)
    slots = [record.slot for record in reply.slots]
    assert len(slots) == len(set(slots)) >= 7
    merged = [record for record in reply.slots if record.outcome == "merged"]
    assert merged
    for record in reply.slots:
        assert record.fragment == MANIFEST.fragment_of(record.slot)
        assert record.outcome in ("merged", "no_certificate")
        assert bool(record.certificate) == (record.outcome == "merged")
    assert {(r.contributors, r.owner) for r in merged} == {(1, peer_id_text(ME.peer_id))}
    assert [r.slot for r in watched.answers.status(5).slots] == [slot for slot in slots if slot >= 5]
    assert watched.metric("braniac_slot_outcomes_total", outcome="merged") == len(merged)
    assert watched.metric("braniac_contributions_total", outcome="merged") == len(merged)
    assert watched.metric("braniac_slot") == watched.node.engine.slot
    assert reply.contributions_merged == watched.node.replica.totals.merged == len(merged)
    assert reply.contributions_unacknowledged == len(reply.slots) - len(merged)  # offered before anybody had a seat
    assert (reply.tier, reply.tiers, reply.fragments) == (0, MANIFEST.tiers, MANIFEST.window)
    assert {state.fragment: state.digest for state in reply.digests} == {
        f: state.digest for f, state in watched.node.replica.anchors.items()
    }
    assert is_json(watched)


@pytest.mark.parametrize(
    ("certified", "merged", "outcome"),
    [(False, False, "no_certificate"), (True, False, "missed"), (True, True, "merged")],
)
async def test_outcomes(watched: Watched, certified: bool, merged: bool, outcome: str) -> None:
    watched.status.take_part(watched.node.engine, watched.node.replica)
    seen: list[events.Event] = []
    for _ in range(4):
        seen += await watched.node.slot()
    [certificate, *_] = [e.certificate for e in seen if isinstance(e, events.SlotSettled) and e.certificate]
    slot = certificate.verdict.slot
    watched.status.offered(slot, 77)
    event = events.SlotSettled(slot, MANIFEST.fragment_of(slot), certificate if certified else None, True, merged)
    watched.status.report(event)
    [record] = watched.answers.status(0).slots
    assert (record.outcome, record.payload_bytes) == (outcome, 77)
    assert watched.metric("braniac_slot_outcomes_total", outcome=outcome) == 1
    result = "merged" if merged else "unacknowledged"
    assert watched.metric("braniac_contributions_total", outcome=result) == 1


async def test_bytes_are_told_per_slot_without_the_downloads_of_joiners(watched: Watched) -> None:
    watched.status.take_part(watched.node.engine, watched.node.replica)
    sent = watched.equipment.exchange.sent
    for _ in range(8):
        sent["message"] += 100
        sent["blob"] += 20
        sent["anchor"] += 100_000
        await watched.slot()
    assert {record.bytes_sent for record in watched.answers.status(0).slots[:-1]} == {120}
    assert watched.answers.status(0).bytes_sent == 8 * 100_120


async def test_troubles_degrade_a_node_and_pass(watched: Watched) -> None:
    watched.status.take_part(watched.node.engine, watched.node.replica)
    metrics = watched.equipment.metrics
    metrics.set_state("training")
    await watched.slot()
    assert metrics.state == "degraded"
    assert watched.answers.status(0).state_reason == "0 peers"
    heartbeat = Heartbeat(watched.node.engine.slot, 3, 0, (PEER,), (), (), 0.0)
    watched.node.engine.roster.hear(identity(1).peer_id, heartbeat, watched.node.engine.slot, 1)
    await watched.slot()
    assert metrics.state == "training"
    watched.status.trouble("disk", "the disk is full")
    await watched.slot()
    assert (metrics.state, watched.answers.status(0).state_reason) == ("degraded", "the disk is full")
    watched.status.trouble("disk", "")
    await watched.slot()
    assert metrics.state == "training"
    metrics.set_state("leaving")
    watched.status.trouble("disk", "the disk is full")
    await watched.slot()
    assert metrics.state == "leaving"  # nothing calls it back
    [peer] = watched.answers.peers().peers
    assert (peer.state, peer.tier, list(peer.addresses)) == ("live", 3, [PEER])
    assert is_json(watched)


def test_forfeits_and_the_download_are_told(watched: Watched) -> None:
    watched.status.take_part(watched.node.engine, watched.node.replica)
    watched.status.forfeit("too_old")
    watched.status.forfeit("too_old")
    watched.status.bar = DownloadBar(5000)
    watched.equipment.exchange.received["anchor"] = 3000
    reply = watched.answers.status(0)
    assert dict(reply.forfeited) == {"too_old": 2}
    assert (reply.join_bytes_received, reply.join_bytes_needed) == (3000, 5000)
    assert watched.metric("braniac_forfeited_total", reason="too_old") == 2
    watched.equipment.exchange.received["anchor"] = 5100
    watched.status.training_began()
    watched.equipment.exchange.received["blob"] = 10_000
    assert watched.answers.status(0).join_bytes_received == 5100


async def test_the_traffic_of_a_slot_is_without_downloads(watched: Watched) -> None:
    exchange = watched.equipment.exchange
    watched.status.take_part(watched.node.engine, watched.node.replica)
    for _ in range(3):
        await watched.slot()
    busy = watched.node.engine.slot
    exchange.received.update(message=30, blob=400, anchor=5000)
    exchange.sent.update(message=7, blob=80, anchor=900)
    for _ in range(3):
        await watched.slot()
    told = {record.slot: (record.bytes_received, record.bytes_sent) for record in watched.answers.status(0).slots}
    assert told.pop(busy) == (430, 87)
    assert set(told.values()) == {(0, 0)}


async def test_what_is_remembered_is_bounded(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "_RECORDS_MAX", 5)
    watched.status.take_part(watched.node.engine, watched.node.replica)
    for slot in (1, 2, 50, 51, 99, 200, 201):
        watched.status.offered(slot, slot)
        watched.status.slot_began(events.SlotBegan(slot, 0))
    assert list(watched.status._payload_bytes) == [50, 51, 99, 200, 201]
    assert len(watched.status._sent_bytes) == 5


async def test_leave_is_passed_on(watched: Watched) -> None:
    await watched.answers.leave(True)
    await watched.answers.leave(False)
    assert watched.left == [True, False]


# --- contributions and reachability ----------------------------------------------------------------------------------


async def test_contributions_are_those_of_the_certificates(watched: Watched) -> None:
    assert not watched.answers.contributions().contributors
    watched.status.take_part(watched.node.engine, watched.node.replica)
    for _ in range(8):
        await watched.slot()
    reply, status = watched.answers.contributions(), watched.answers.status(0)
    (mine,) = reply.contributors
    assert (mine.peer_id, mine.tier, mine.me) == (peer_id_text(ME.peer_id), 0, True)
    assert mine.contributions == reply.certificates == status.contributions_merged > 0
    assert mine.tokens == status.tokens_merged > 0
    assert reply.first_slot == min(record.slot for record in status.slots if record.outcome == "merged")
    assert watched.metric("braniac_tokens_merged") == mine.tokens


async def test_contributions_survive_a_restart(tmp_path: Path) -> None:
    first = Watched(tmp_path)
    first.status.take_part(first.node.engine, first.node.replica)
    for _ in range(8):
        await first.slot()
    await first.node.commit()
    before = first.answers.contributions()
    await asyncio.to_thread(first.node.close)
    again = Watched(tmp_path)
    again.status.take_part(again.node.engine, again.node.replica)
    assert again.answers.contributions() == before
    assert again.answers.status(0).tokens_merged == before.contributors[0].tokens
    await asyncio.to_thread(again.node.close)


async def test_reachability_before_a_run(watched: Watched) -> None:
    reply = await watched.answers.reachability()
    assert (reply.reachability, reply.detail) == ("unknown", "this node has not joined a run yet")
    assert watched.answers.status(0).reachability == "unknown"


def test_the_newest_protocol_that_was_heard(watched: Watched) -> None:
    assert watched.answers.status(0).newest_protocol == limits.PROTOCOL_VERSION
    watched.equipment.exchange.hear_version(limits.PROTOCOL_VERSION + 1)
    assert watched.answers.status(0).newest_protocol == limits.PROTOCOL_VERSION + 1


async def test_caps_are_told_with_what_is_used_of_them(watched: Watched) -> None:
    caps = watched.answers.status(0).caps
    assert (caps.threads, caps.duty_fraction, caps.daily_bytes, caps.disk_bytes) == (1, 1.0, 0, 0)
    assert (caps.daily_bytes_used, caps.disk_bytes_used, caps.memory_bytes_used) == (0, 0, 0)
    watched.equipment.exchange.throttle.meter.add(700.0, 300.0)
    watched.governor.sample = Sample(disk_used_bytes=5, memory_bytes=6)
    sections = CapsSection(
        duty_percent=25, upload_kib_per_s=2, download_kib_per_s=3, daily_mib=0.5, disk_mib=7, memory_mib=8
    )
    throttle = Throttle(sections, watched.equipment.clock, watched.equipment.exchange.throttle.meter)
    watched.equipment.exchange.throttle = throttle
    watched.equipment.config = watched.equipment.config.model_copy(update={"caps": sections})
    caps = watched.answers.status(0).caps
    assert (caps.duty_fraction, caps.upload_bytes_per_s, caps.download_bytes_per_s) == (0.25, 2048, 3072)
    assert (caps.daily_bytes, caps.daily_bytes_used) == (1 << 19, 1000)
    assert (caps.disk_bytes, caps.disk_bytes_used) == (7 << 20, 5)
    assert (caps.memory_bytes, caps.memory_bytes_used) == (8 << 20, 6)


async def test_throttled_time_reaches_the_metrics(watched: Watched) -> None:
    watched.status.take_part(watched.node.engine, watched.node.replica)
    watched.node.replica.trainer.throttled_s = 12.5
    watched.status.slot_began(events.SlotBegan(1, 0))
    watched.status.slot_began(events.SlotBegan(2, 0))
    assert watched.metric("braniac_cpu_throttled_seconds_total") == 12.5
