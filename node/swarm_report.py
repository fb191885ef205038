"""Figures of a swarm, computed from what its daemons said while they ran; pure functions of the observations."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from braniac.node.control_pb2 import SlotRecord, StatusReply
from braniac.node.splits import Splits
from braniac.node.swarm_options import SwarmOptions


@dataclass
class Observations:
    """What one daemon was heard to say, over all its lives."""

    peer_id: str = ""
    slots: dict[int, SlotRecord] = field(default_factory=dict)
    steps: list[tuple[float, int]] = field(default_factory=list)
    """(local time, inner steps done)"""
    lag_p99_s: float = 0.0
    join_bytes: tuple[int, int] = (0, 0)
    """Received until the first training step, and the size of the fragments."""
    last: StatusReply | None = None
    next_slot: int = 0
    lives: int = 1

    def note(self, at: float, reply: StatusReply) -> None:
        """One more answer."""
        self.peer_id = reply.peer_id
        for record in reply.slots:
            self.slots[record.slot] = record
            self.next_slot = max(self.next_slot, record.slot - 8)  # a certificate may settle an earlier slot late
        self.last = reply
        if reply.state in ("training", "degraded"):
            self.steps.append((at, reply.steps))
            self.lag_p99_s = max(self.lag_p99_s, reply.loop_lag_p99_s if reply.uptime_s > 20 else 0.0)
            if self.lives == 1:
                self.join_bytes = (reply.join_bytes_received, reply.join_bytes_needed)

    def interrupted(self, *, restarted: bool) -> None:
        """It does not train for a while and that is no stall; after a restart step counts may go back."""
        self.steps.append((float("nan"), -1))
        self.lives += restarted

    def stall_s_max(self, began: float) -> float:
        """Longest time without an inner step while it ran."""
        longest, since, done = 0.0, None, -1
        for at, steps in self.steps:
            if steps < 0 or at < began:
                since, done = None, -1
            elif since is None or steps > done:
                since, done = at, steps
            else:
                longest = max(longest, at - since)
        return longest


def look_for_splits(splits: Splits, at: float, replies: Sequence[StatusReply], slot_s: float) -> None:
    """One look at all daemons."""
    splits.window_s = max([splits.window_s, *(reply.fragments * slot_s for reply in replies)])
    splits.look(at, (state for reply in replies for state in reply.digests))


def compare(replies: Iterable[StatusReply]) -> dict[int, dict[str, Any]]:
    """One look at all daemons: per fragment, whether all whose tier holds it show it, with the same slot and bytes."""
    replies = list(replies)
    held: dict[int, set[tuple[int, bytes]]] = defaultdict(set)
    holders: dict[int, int] = defaultdict(int)
    for reply in replies:
        for state in reply.digests:
            held[state.fragment].add((state.slot, state.digest))
            holders[state.fragment] += 1
    rings = {state.fragment: state.ring for reply in replies for state in reply.digests}
    due = {f: sum(ring <= reply.tiers - 1 - reply.tier for reply in replies) for f, ring in rings.items()}
    return {
        fragment: {
            "agree": len(states) == 1 and holders[fragment] == due[fragment],
            "slot": max(slot for slot, _ in states),
            "holders": holders[fragment],
        }
        for fragment, states in sorted(held.items())
    }


def keep_agreement(seen: dict[int, dict[str, Any]], looks: Mapping[int, dict[str, Any]]) -> None:
    """Add one look to what was seen: per fragment the newest look at which all agreed, else the newest.

    Fragments are not judged in one and the same look, because in every slot one of them is on its way.
    """
    for fragment, look in looks.items():
        if look["agree"] or not seen.get(fragment, look)["agree"]:
            seen[fragment] = look


def build(
    options: SwarmOptions,
    observations: Mapping[int, Observations],
    done: Sequence[Mapping[str, Any]],
    agreed: Mapping[int, Mapping[str, Any]],
    splits: Splits,
    losses: Mapping[str, Mapping[str, float]],
    exit_codes: Sequence[int],
    began: float,
) -> dict[str, Any]:
    """The swarm's report."""
    lasts = [o.last for o in observations.values() if o.last is not None]
    gap_s, certificates, slots = certificate_gap(observations.values())
    joins = [o.join_bytes for o in observations.values() if o.join_bytes[1]]
    result: dict[str, Any] = {
        "nodes": options.nodes,
        "tiers": list(options.tiers),
        "seconds": options.seconds,
        "slot_s": options.slot_s,
        "faults": [dict(fault) for fault in done],
        "kills": sum(fault["kind"] == "kill" for fault in done),
        "killed": [node for fault in done if fault["kind"] == "kill" for node in fault["nodes"]],
        "certificates": certificates,
        "slots": slots,
        "certificate_gap_s_max": round(gap_s, 3),
        "digests_agree": bool(agreed) and all(look["agree"] for look in agreed.values()),
        **splits.figures(),
        "final_slots": {str(fragment): look["slot"] for fragment, look in agreed.items()},
        "loss_start": losses["start"],
        "loss_end": losses["end"],
        "loss_end_own_weights": losses["own"],
        "tokens": sum(reply.tokens for reply in lasts),
        "uplink_peak_to_mean": round(max(map(peak_to_mean, observations.values())), 3),
        "bits_per_param_per_window": round(bits_per_parameter(observations.values()), 4),
        "contributions_merged": sum(reply.contributions_merged for reply in lasts),
        "forfeited": _sum(reply.forfeited for reply in lasts),
        "refused": _sum(reply.refused for reply in lasts),
        "training_stall_s_max": round(max(o.stall_s_max(began) for o in observations.values()), 3),
        "loop_lag_p99_s_max": round(max(o.lag_p99_s for o in observations.values()), 4),
        "join_bytes_ratio_max": round(max((got / need for got, need in joins), default=0.0), 4),
        "exit_codes": list(exit_codes),
    }
    result["checks"] = checks(result)
    result["ok"] = all(result["checks"].values())
    return result


def checks(result: Mapping[str, Any]) -> dict[str, bool]:
    """What a swarm promises, each true or false."""
    start, end = result["loss_start"], result["loss_end"]
    return {
        "digests_agree": result["digests_agree"],
        "no_disagreement_outlived_a_window": result["disagreements"] == 0,
        "certificate_gap_at_most_10_slots": result["certificate_gap_s_max"] <= 10 * result["slot_s"],
        "loss_fell_at_every_tier": all(end[tier] < start[tier] - 0.5 for tier in start),
        "loop_lag_p99_below_50_ms": result["loop_lag_p99_s_max"] < 0.05,
        "joined_within_110_percent": result["join_bytes_ratio_max"] <= 1.1,
        "nobody_stalled": result["training_stall_s_max"] <= 10 * result["slot_s"],
        "all_left_cleanly": not any(result["exit_codes"]),
    }


def certificate_gap(observations: Iterable[Observations]) -> tuple[float, int, int]:
    """Longest time without a certificate anywhere in the swarm, how many there were, and slots from first to last.

    The time from the last certificate to the last thing anybody reported counts too: a swarm that stops is a gap.
    """
    first: dict[int, float] = {}
    end = float("-inf")
    for observed in observations:
        for record in observed.slots.values():
            end = max(end, record.at_s)
            if record.certificate:
                first[record.slot] = min(record.at_s, first.get(record.slot, record.at_s))
    times = [*sorted(first.values()), end] if first else []
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    slots = max(first) - min(first) + 1 if first else 0
    return max(gaps, default=float("inf")), len(first), slots


def peak_to_mean(observed: Observations) -> float:
    """Bytes sent in the busiest slot against the mean slot, without the downloads of joiners."""
    sent = [record.bytes_sent for record in observed.slots.values() if record.bytes_sent]
    return max(sent) / max(1.0, statistics.fmean(sent)) if sent else 0.0


def bits_per_parameter(observations: Iterable[Observations]) -> float:
    """Payload bits a peer offered per parameter it holds and window; the mean over peers."""
    found = []
    for observed in observations:
        if observed.last is None or not observed.slots:
            continue
        windows = len(observed.slots) / observed.last.fragments
        payload = sum(record.payload_bytes for record in observed.slots.values())
        found.append(8 * payload / observed.last.parameters / windows)
    return statistics.fmean(found) if found else 0.0


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = defaultdict(int)
    for one in counts:
        for key, count in one.items():
            total[key] += count
    return dict(sorted(total.items()))
