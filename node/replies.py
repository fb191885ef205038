"""What the daemon's answers look like to people: text of one line or of several, and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from braniac.node.commands import bytes_text, duration_text, table_text
from braniac.node.errors import NodeError

if TYPE_CHECKING:  # grpc loads only for the commands that talk to a daemon
    from braniac.node.control_client import ControlClient
    from braniac.node.control_pb2 import ContributionsReply, PeersReply, StatusReply


def status_text(reply: StatusReply) -> str:
    """What a person wants to know about a running node, a line per subject."""
    loss = f"loss {reply.train_loss:.3f} nats/byte" if reply.HasField("train_loss") else "no loss yet"
    joined = ""
    if reply.join_bytes_received < reply.join_bytes_needed:
        joined = f", joining {bytes_text(reply.join_bytes_received)} of {bytes_text(reply.join_bytes_needed)}"
    rows = {
        "state": f"{reply.state}{joined}" + (f": {reply.state_reason}" if reply.state_reason else ""),
        "reasons": "\n           ".join(reason_texts(reply)) or "none to rest",
        "run": reply.run_id,
        "peer": reply.peer_id,
        "model": f"tier {reply.tier} of 0..{max(reply.tiers, 1) - 1}, {reply.parameters:,} parameters",
        "swarm": f"slot {reply.slot:,} of {reply.slot_s:g} s, window {reply.window:,}, {live_peers_text(reply)}, "
        f"clock {reply.clock_offset_s * 1e3:+.0f} ms",
        "training": f"{loss}, {reply.steps:,} steps, {reply.tokens:,} tokens, {reply.tokens_per_s:,.0f} tokens/s",
        "merged": f"{reply.certificates:,} certificates, {reply.contributions_merged:,} own contributions in them, "
        f"{reply.contributions_unacknowledged:,} not acknowledged",
        "record": f"{reply.tokens_merged:,} tokens of this node merged, over all its lives",
        "forfeited": _counts(reply.forfeited),
        "refused": _counts(reply.refused),
        "traffic": f"{bytes_text(reply.bytes_sent)} sent, {bytes_text(reply.bytes_received)} received",
        "caps": ", ".join(cap_texts(reply)) or "none",
        "reachable": reachability_text(reply),
        "health": f"up {duration_text(reply.uptime_s)}, generation {reply.generation:,} on disk, "
        f"loop lag p50 {reply.loop_lag_p50_s * 1e3:.1f} ms, p99 {reply.loop_lag_p99_s * 1e3:.1f} ms",
        "addresses": "\n           ".join(reply.addresses) or "none",
    }
    if update := update_text(reply):
        rows["update"] = update
    return "\n".join(f"{name:<9}  {value}" for name, value in rows.items())


def reason_texts(reply: StatusReply) -> list[str]:
    """Every reason to rest: what it is, since when, and until when if that is known."""
    texts = []
    for reason in reply.reasons:
        until = f", {duration_text(reason.until_s)} to go" if reason.HasField("until_s") else ""
        texts.append(f"{reason.sentence or reason.code} (for {duration_text(reason.since_s)} now{until})")
    return texts


def live_peers_text(reply: StatusReply) -> str:
    """How many peers are there, and how many of each tier."""
    tiers = ", ".join(f"{count:,} of tier {tier}" for tier, count in sorted(reply.peers_by_tier.items()) if count)
    return f"{reply.peers_live:,} peers live" + (f" ({tiers})" if tiers else "")


def cap_texts(reply: StatusReply) -> list[str]:
    """Every bound that is set, and how much of it is used where that is known."""
    caps, texts = reply.caps, []
    for name, used, bound in (
        ("today", caps.daily_bytes_used, caps.daily_bytes),
        ("disk", caps.disk_bytes_used, caps.disk_bytes),
        ("memory", caps.memory_bytes_used, caps.memory_bytes),
    ):
        if bound:
            texts.append(f"{name} {bytes_text(used)} of {bytes_text(bound)}")
    for name, rate in (("upload", caps.upload_bytes_per_s), ("download", caps.download_bytes_per_s)):
        if rate:
            texts.append(f"{name} {bytes_text(rate)}/s")
    if 0 < caps.duty_fraction < 1:
        texts.append(f"training {caps.duty_fraction:.0%} of the time")
    if caps.threads:
        texts.append(f"{caps.threads} thread" + ("s" if caps.threads > 1 else ""))
    return texts


_REACHABILITY = {
    "public": "yes, others can dial this node",
    "relayed": "through a relay only",
    "private": "no: this node contributes, and owns no slots",
}


def reachability_text(reply: StatusReply) -> str:
    """Whether others can dial this node, and what follows."""
    return _REACHABILITY.get(reply.reachability, "not known yet")


def update_text(reply: StatusReply) -> str:
    """What to do if others speak a newer protocol; empty if they do not."""
    if reply.newest_protocol <= reply.protocol_version:
        return ""
    return (
        f"peers speak protocol {reply.newest_protocol}, this node {reply.protocol_version}: "
        "install a newer braniac-node and restart"
    )


def is_well(client: ControlClient) -> bool:
    """Whether a daemon answers, and takes part or rests."""
    try:
        return client.status(since_slot=1 << 62).state in {"training", "degraded", "paused"}
    except NodeError:
        return False


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items()) if count) or "none"


def peers_text(reply: PeersReply) -> str:
    """A table of the peers, those heard last first."""
    if not reply.peers:
        return "no other peers yet"
    rows = [
        [
            peer.peer_id,
            str(peer.tier),
            peer.state,
            f"{duration_text(peer.last_heard_s)} ago",
            f"{peer.rtt_s * 1e3:.0f} ms" if peer.HasField("rtt_s") else "-",
            f"{peer.merged:,}",
            peer.addresses[0] if peer.addresses else "-",
        ]
        for peer in sorted(reply.peers, key=lambda peer: peer.last_heard_s)
    ]
    return table_text(["PEER", "TIER", "STATE", "HEARD", "RTT", "MERGED", "ADDRESS"], rows)


def contributions_text(reply: ContributionsReply, most: int) -> str:
    """A table of who contributed how much, the `most` largest first, and this node wherever it stands."""
    if not reply.contributors:
        return "no merged contributions seen yet"
    total = sum(contributor.tokens for contributor in reply.contributors)
    rows = [
        [
            f"{place:,}",
            contributor.peer_id + (" (this node)" if contributor.me else ""),
            str(contributor.tier),
            f"{contributor.contributions:,}",
            f"{contributor.tokens:,}",
            f"{contributor.tokens / total:.1%}" if total else "-",
        ]
        for place, contributor in enumerate(reply.contributors, 1)
        if place <= most or contributor.me
    ]
    table = table_text(["#", "PEER", "TIER", "MERGED", "TOKENS", "SHARE"], rows)
    return f"{table}\n{reply.certificates:,} certificates counted, from slot {reply.first_slot:,} on"
