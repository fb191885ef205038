"""The swarm's figures, computed from answers that were made up to know the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from braniac.node import swarm_report as report
from braniac.node.control_pb2 import SlotRecord, StatusReply
from braniac.node.splits import Splits
from braniac.node.swarm_options import SwarmOptions
from braniac.node.swarm_report import Observations

OPTIONS = SwarmOptions(
    nodes=2, tiers=(0, 3), seconds=10, seed=0, preset="tiny", slot_s=1.0, sets=(), keep_dir=Path(), json=True
)
GOOD = {"start": {"0": 5.5}, "end": {"0": 2.0}, "own": {"0": 1.9}}
AGREED = {0: {"agree": True, "slot": 9, "holders": 2}}


def record(slot: int, at_s: float, *, certificate: bytes = b"c", **fields: Any) -> SlotRecord:
    return SlotRecord(slot=slot, at_s=at_s, certificate=certificate, **fields)


def reply(*records: SlotRecord, digests: dict[int, tuple[int, bytes]] | None = None, **fields: Any) -> StatusReply:
    values = {"peer_id": "p", "state": "training", "parameters": 1000, "fragments": 4, "steps": 1, **fields}
    status = StatusReply(slots=records, **values)
    for fragment, (slot, digest) in (digests or {}).items():
        status.digests.add(fragment=fragment, slot=slot, digest=digest)
    return status


def observed(*replies: StatusReply) -> Observations:
    observations = Observations()
    for second, one in enumerate(replies):
        observations.note(float(second), one)
    return observations


def build(
    *observations: Observations,
    codes: tuple[int, ...] = (0, 0),
    agreed: Any = None,
    splits: Splits | None = None,
) -> dict[str, Any]:
    numbered = dict(enumerate(observations))
    looks, apart = AGREED if agreed is None else agreed, splits or Splits()
    return report.build(OPTIONS, numbered, [{"kind": "kill", "nodes": [1]}], looks, apart, GOOD, codes, 0.0)


def steady(**fields: Any) -> Observations:
    """A node that saw a certificate every second and did a step per look."""
    records = [record(slot, 100.0 + slot, payload_bytes=50, bytes_sent=1000) for slot in range(8)]
    return observed(reply(*records[:4], steps=1, **fields), reply(*records[4:], steps=2, **fields))


def test_a_healthy_swarm_passes_every_check() -> None:
    result = build(steady(), steady())
    assert result["ok"], result["checks"]
    assert (result["certificates"], result["slots"], result["certificate_gap_s_max"]) == (8, 8, 1.0)
    assert result["uplink_peak_to_mean"] == 1.0
    assert result["bits_per_param_per_window"] == 8 * 8 * 50 / 1000 / 2
    assert result["kills"] == 1


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("digests_agree", {"agreed": {0: {"agree": False, "slot": 9, "holders": 2}}}),
        ("digests_agree", {"agreed": {}}),
        ("all_left_cleanly", {"codes": (0, 7)}),
    ],
)
def test_a_check_can_fail(check: str, change: dict[str, Any]) -> None:
    result = build(steady(), steady(), **change)
    assert not result["ok"]
    assert [name for name, good in result["checks"].items() if not good] == [check]


def test_slow_loops_greedy_joins_and_gaps_are_found() -> None:
    lagging = steady(loop_lag_p99_s=0.06, uptime_s=30)
    assert not build(lagging)["checks"]["loop_lag_p99_below_50_ms"]
    assert build(steady(loop_lag_p99_s=0.06, uptime_s=5))["checks"]["loop_lag_p99_below_50_ms"]  # while it imports
    greedy = steady(join_bytes_received=120, join_bytes_needed=100)
    assert build(greedy)["join_bytes_ratio_max"] == 1.2
    assert not build(greedy)["checks"]["joined_within_110_percent"]
    gap = observed(reply(record(0, 100.0), record(1, 112.0)))
    assert not build(gap)["checks"]["certificate_gap_at_most_10_slots"]
    assert build(observed(reply()))["certificate_gap_s_max"] == float("inf")


def test_a_certificate_counts_when_the_first_node_has_it() -> None:
    early, late = observed(reply(record(1, 10.0), record(3, 14.0))), observed(reply(record(1, 13.0), record(3, 13.5)))
    gap, count, slots = report.certificate_gap([early, late])
    assert (gap, count, slots) == (3.5, 2, 3)
    nothing = observed(reply(record(5, 20.0, certificate=b"")))
    assert report.certificate_gap([nothing]) == (float("inf"), 0, 0)


def test_stalls_are_measured_from_the_last_step_and_not_over_a_kill() -> None:
    observations = Observations()
    for at, steps in ((0.0, 5), (1.0, 6), (4.0, 6), (5.0, 7)):
        observations.note(at, reply(steps=steps))
    assert observations.stall_s_max(0.0) == 3.0
    assert observations.stall_s_max(2.0) == 0.0
    observations.interrupted(restarted=True)
    for at, steps in ((50.0, 2), (50.5, 3)):  # back to the last generation
        observations.note(at, reply(steps=steps))
    assert observations.stall_s_max(0.0) == 3.0
    assert observations.lives == 2


def look(tier: int, digests: dict[int, tuple[int, bytes]]) -> StatusReply:
    """What a node of two tiers shows: fragment 0 is of the core, fragment 1 of the ring that only tier 0 holds."""
    found = reply(digests=digests, tier=tier, tiers=2)
    for state in found.digests:
        state.ring = state.fragment
    return found


def test_a_look_compares_what_all_hold_now() -> None:
    a, b = look(0, {0: (4, b"x"), 1: (5, b"y")}), look(1, {0: (4, b"x")})
    assert report.compare([a, b]) == {
        0: {"agree": True, "slot": 4, "holders": 2},
        1: {"agree": True, "slot": 5, "holders": 1},
    }
    c = look(0, {0: (4, b"z"), 1: (6, b"y")})
    assert [one["agree"] for one in report.compare([a, b, c]).values()] == [False, False]


def test_fragments_may_agree_in_different_looks() -> None:
    seen: dict[int, Any] = {}
    one, other = {"agree": True, "slot": 4, "holders": 2}, {"agree": False, "slot": 5, "holders": 2}
    report.keep_agreement(seen, {0: one, 1: other})
    assert seen == {0: one, 1: other}
    later = {0: {**one, "agree": False, "slot": 6}, 1: {**other, "agree": True}}
    report.keep_agreement(seen, later)
    assert seen == {0: one, 1: later[1]}
    report.keep_agreement(seen, {1: {**other, "agree": False, "slot": 9}})
    assert seen == {0: one, 1: later[1]}
    report.keep_agreement(seen, {0: {**one, "slot": 12}})
    assert seen[0]["slot"] == 12


def test_a_node_that_lacks_what_its_tier_holds_does_not_agree() -> None:
    whole, downloading = look(0, {0: (4, b"x"), 1: (5, b"y")}), look(0, {0: (4, b"x")})
    assert [one["agree"] for one in report.compare([whole, downloading]).values()] == [True, False]


def test_a_swarm_that_stops_is_a_gap() -> None:
    stopped = observed(reply(record(0, 100.0), record(1, 101.0), record(2, 130.0, certificate=b"")))
    assert report.certificate_gap([stopped]) == (29.0, 2, 2)
    assert not build(stopped)["checks"]["certificate_gap_at_most_10_slots"]


def splits(*looks: tuple[float, bytes, bytes], slots: tuple[int, int] = (4, 4)) -> dict[str, Any]:
    """What is said of two nodes that showed these bytes at these times; a window is 4 s."""
    found = Splits()
    for at, first, second in looks:
        replies = [reply(digests={0: (slots[0], first)}), reply(digests={0: (slots[1], second)})]
        report.look_for_splits(found, at, replies, OPTIONS.slot_s)
    return found.figures()


def test_a_split_that_heals_within_a_window_is_told_but_no_disagreement() -> None:
    quiet = {"disagreements": 0, "disagreements_healed": 0, "disagreement_s_max": 0.0}
    assert splits((0.0, b"x", b"x"), (9.0, b"y", b"y")) == quiet
    assert splits((0.0, b"x", b"z"), slots=(4, 5)) == quiet  # another last slot says nothing
    healed = {"disagreements": 0, "disagreements_healed": 1, "disagreement_s_max": 3.5}
    assert splits((0.0, b"x", b"x"), (1.0, b"x", b"z"), (4.5, b"x", b"x")) == healed


def test_a_split_that_outlives_a_window_fails_the_swarm() -> None:
    lasting = {"disagreements": 1, "disagreements_healed": 0, "disagreement_s_max": 4.5}
    assert splits((1.0, b"x", b"z"), (5.5, b"x", b"x")) == lasting
    assert splits((1.0, b"x", b"z"), (5.5, b"y", b"z")) == lasting  # still there at the end
    found = Splits()
    for at in (1.0, 5.5):
        replies = [reply(digests={0: (4, b"x")}), reply(digests={0: (4, b"z")})]
        report.look_for_splits(found, at, replies, OPTIONS.slot_s)
    checks = build(steady(), steady(), splits=found)["checks"]
    assert [name for name, good in checks.items() if not good] == ["no_disagreement_outlived_a_window"]


def test_counts_of_all_nodes_are_added() -> None:
    result = build(
        steady(forfeited={"too_old": 2}, tokens=10), steady(forfeited={"too_old": 1, "clipped": 4}, tokens=5)
    )
    assert result["forfeited"] == {"clipped": 4, "too_old": 3}
    assert result["tokens"] == 15


def test_only_recent_slots_are_asked_for_again() -> None:
    observations = observed(reply(*(record(slot, float(slot)) for slot in range(20))))
    assert observations.next_slot == 11
    observations.note(1.0, reply(record(12, 12.0, contributors=3)))  # it settled anew
    assert observations.slots[12].contributors == 3
    assert observations.next_slot == 11
