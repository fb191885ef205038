"""Figures of a swarm, computed from what its daemons said while they ran; pure functions of the observations."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from braniac.node.control_pb2 import SlotRecord, StatusReply
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

    def restarted(self) -> None:
        """It was killed: step counts may go back."""
        self.steps.append((float("nan"), -1))
        self.lives += 1

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


@dataclass
class Splits:
    """Times in which nodes showed different bytes of a fragment for the same last slot.

    A moment of this is normal. Updates add up in any order, so a node that comes back may hold the newest certificate
    before an older one that it missed, or bring one that nobody else has: it heals when the other certificate has
    gone round. A split that outlives a window does not heal by certificates, and means that somebody has lost one.
    """

    slot_s: float
    window_s: float = 0.0
    durations_s: list[float] = field(default_factory=list)
    """Of every split that is over."""
    _since: dict[int, float] = field(default_factory=dict)
    _looked_at: float = 0.0

    def look(self, at: float, replies: Iterable[StatusReply]) -> None:
        """One look at all daemons."""
        self._looked_at = at
        shown: dict[tuple[int, int], set[bytes]] = defaultdict(set)
        for reply in replies:
            self.window_s = max(self.window_s, reply.fragments * self.slot_s)
            for state in reply.digests:
                shown[state.fragment, state.slot].add(state.digest)
        split = {fragment for (fragment, _), digests in shown.items() if len(digests) > 1}
        for fragment in split - self._since.keys():
            self._since[fragment] = at
        for fragment in self._since.keys() - split:
            self.durations_s.append(at - self._since.pop(fragment))

    def figures(self) -> dict[str, Any]:
        """Splits that outlived a window, the others, and the longest."""
        durations = [*self.durations_s, *(self._looked_at - since for since in self._since.values())]
        lasting = sum(duration > self.window_s for duration in durations)
        return {
            "disagreements": lasting,
            "disagreements_healed": len(durations) - lasting,
            "disagreement_s_max": round(max(durations, default=0.0), 3),
        }


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
    kills: Sequence[Mapping[str, Any]],
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
        "kills": len(kills),
        "killed": [dict(kill) for kill in kills],
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
