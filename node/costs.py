"""What taking part in a run costs by tier: memory, disk and traffic, counted from its manifest before it is joined.

Traffic follows from what a node does per slot. It sends one payload and gets one update of each fragment that it
holds, and as owner of every n-th slot it takes in the others' payloads; once a slot it greets each of the n - 1 others.
Payloads are counted as full: a run whose updates overlap, or whose slots fail, sends less. In a large swarm a node
greets its neighbours only, contributes when the lot falls on it, and passes on certificates and presences.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from braniac.model.config import ModelConfig
from braniac.model.tiers import table_parameters
from braniac.model.trainer import TrainSettings, memory_bytes_needed
from braniac.node import commands
from braniac.protocol import limits, listing, wire
from braniac.protocol.codec import CodecRules, tables_max
from braniac.protocol.identity import Identity
from braniac.protocol.manifest import Manifest
from braniac.protocol.messages import CertificateName, FragmentState, Heartbeat
from braniac.protocol.tiles import TileLayout

PEERS = 8
"""In the swarm, this node included, where nobody says how many."""
PROGRAM_BYTES = 430_000_000  # resident memory of a node that trains next to nothing: torch, hivemind, grpc
P2PD_BYTES = 80_000_000
_DAY_S = 86_400
_ADDRESSES = ("/ip4/203.0.113.7/tcp/31337/p2p/12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp",)
_REPLY_BYTES = 11  # the swarm time, which is all that most calls are answered with
_SWEEP_GENERATIONS = 8  # the store is swept once in so many generations; see replica.py
# Signed, as they travel; a verdict has a share per contribution, a certificate a signature of each majority seat.
_VOTE_BYTES, _OFFER_BYTES, _VERDICT_BYTES, _SHARE_BYTES, _SIGNATURE_BYTES = 255, 345, 300, 201, 108
_PRESENCE_BYTES = 230  # with one address


@dataclass(frozen=True)
class TierCosts:
    """One tier's. Bytes; those per day at the assumed number of peers."""

    tier: int
    parameters: int
    memory_bytes: int
    """Resident, the program itself included."""
    disk_bytes: int
    """Largest size of the state directory."""
    download_bytes: int
    """Once, to join."""
    each_way_bytes_per_day: int
    """Sent, and as much received."""


def costs_of(
    manifest: Manifest, model: ModelConfig, settings: TrainSettings, *, peers: int = PEERS, generations: int = 3
) -> list[TierCosts]:
    """Costs of every tier in a swarm of so many `peers`, of which each holds what this node holds."""
    assert peers >= 1
    return [_tier(manifest, model, settings, tier, peers, generations) for tier in range(manifest.tiers)]


def _tier(
    manifest: Manifest, model: ModelConfig, settings: TrainSettings, tier: int, peers: int, generations: int
) -> TierCosts:
    parameters = manifest.parameters(tier)
    return TierCosts(
        tier=tier,
        parameters=parameters,
        memory_bytes=PROGRAM_BYTES + P2PD_BYTES + memory_bytes_needed(model, tier, settings),
        disk_bytes=_disk_bytes(manifest, model, settings, tier, generations),
        download_bytes=4 * parameters,
        each_way_bytes_per_day=round(slot_bytes(manifest, tier, peers) * _DAY_S / manifest.slot_s),
    )


def slot_bytes(manifest: Manifest, tier: int, peers: int) -> float:
    """Bytes that one of `peers` alike sends per slot, on average over a window; it receives as many."""
    held = manifest.held(tier)
    contributed = sum(contribution_bytes(manifest, fragment, peers) for fragment in held)
    updated = sum(update_bytes(manifest, fragment, peers) for fragment in held)
    messages = _message_bytes(manifest, tier, peers, len(held) / manifest.window)
    return (contributed + updated) / manifest.window + messages


def contribution_bytes(manifest: Manifest, fragment: int, peers: int) -> float:
    """Of contributions to a slot of this fragment that one peer sends, on average: to every seat but its own."""
    seats = min(limits.COMMITTEE_SIZE, peers)
    drawn = min(peers, limits.CONTRIBUTORS_PER_SLOT) / peers
    return seats * (1 - 1 / peers) * drawn * full_bytes(manifest.fragments[fragment].layout, manifest.up)


def update_bytes(manifest: Manifest, fragment: int, peers: int) -> float:
    """Of the slot's update that one peer sends, on average: whoever has no seat is sent it once."""
    without_seat = max(0, peers - limits.COMMITTEE_SIZE) / peers
    return without_seat * _merged_bytes(manifest.fragments[fragment].layout, manifest.up, manifest.down, peers)


def _kept_bytes(manifest: Manifest, fragment: int) -> float:
    """On disk, of one slot: the own contribution and the update."""
    layout = manifest.fragments[fragment].layout
    return full_bytes(layout, manifest.up) + _merged_bytes(layout, manifest.up, manifest.down, PEERS)


@functools.lru_cache(maxsize=64)  # a model has many fragments and few layouts
def full_bytes(layout: TileLayout, rules: CodecRules) -> float:
    """Expected length of a payload with as many values as it may have."""
    return payload_bytes(layout, rules, 1.0)


@functools.lru_cache(maxsize=64)
def _merged_bytes(layout: TileLayout, up: CodecRules, down: CodecRules, peers: int) -> float:
    """Of an update: the peers' choices meet in it, and it holds what anybody sent, up to its own capacity."""
    share = int(layout.capacity(up.per_tile).sum()) / layout.size
    union = layout.size * (1 - (1 - share) ** min(peers, limits.CONTRIBUTORS_PER_SLOT))
    capacity = int(layout.capacity(down.per_tile).sum())
    return payload_bytes(layout, down, min(1.0, union / capacity))


def payload_bytes(layout: TileLayout, rules: CodecRules, fill: float) -> float:
    """Expected length of a payload that uses the share `fill` of its capacity; see codec.py for its parts."""
    values = fill * int(layout.capacity(rules.per_tile).sum())
    counts = 0 if fill == 1.0 else 2 * layout.tiles
    return (
        8
        + counts
        + (tables_max(layout, rules) * 2 << rules.magnitude_bits)
        + values * _value_bits(layout, rules, values) / 8
    )


def _value_bits(layout: TileLayout, rules: CodecRules, values: float) -> float:
    """Of one value: its gap as a Rice code, best parameter, if positions are chosen evenly; its sign and level."""
    share = min(values / layout.size, 1 - 1e-9)
    gap_bits = min(1 + r + (skip := (1 - share) ** (1 << r)) / (1 - skip) for r in range(limits.RICE_PARAMETER_MAX + 1))
    return gap_bits + 1 + rules.magnitude_bits


def _message_bytes(manifest: Manifest, tier: int, peers: int, held_share: float) -> float:
    """Signed messages and the short replies to them, per slot, of one peer."""
    others, seats = peers - 1, min(limits.COMMITTEE_SIZE, peers)
    large = others > limits.GREETED_PEERS_MAX
    contributors = min(peers, limits.CONTRIBUTORS_PER_SLOT)
    verdict = _VERDICT_BYTES + held_share * contributors * _SHARE_BYTES
    # Of those that keep silent for as long as they may: half to all of PRESENCE_SLOTS; and of those with a seat ahead.
    presences = peers / (0.75 * limits.PRESENCE_SLOTS) + limits.CANDIDATES if large else 0
    introduction = 160 + min(limits.INTRODUCED_MAX, max(0, peers - 2)) * (40 + len(_ADDRESSES[0]))
    sent = [
        (limits.NEIGHBOURS if large else others, _heartbeat_bytes(manifest, tier)),
        (1 if peers > 2 and not large else 0, introduction),
        (limits.GOSSIP_PEERS, presences * _PRESENCE_BYTES),
        (held_share * seats * (contributors - contributors / peers) / peers, _OFFER_BYTES),
        ((seats - 1) / peers, verdict),  # proposals, of the owner
        ((seats - 1) / peers, _VOTE_BYTES),
        # The certificate: the owner tells everybody, or in a large swarm each some neighbours.
        (limits.CERTIFICATE_PEERS if large else others / peers, verdict + (seats // 2 + 1) * _SIGNATURE_BYTES),
    ]
    return sum(count * (size + _REPLY_BYTES) for count, size in sent if size)


def _heartbeat_bytes(manifest: Manifest, tier: int) -> int:
    """As it travels, with the certificates of as many windows as are remembered, in as many parts as they come in."""
    held, digest, slot = manifest.held(tier), bytes(range(32)), 1 << 20
    recent = min(limits.RECENT_CERTIFICATES_MAX, limits.HISTORY_WINDOWS * len(held))
    names = [CertificateName(slot - 1 - age, digest) for age in range(recent)]
    states = [FragmentState(fragment, slot - 1 - age, digest) for age, fragment in enumerate(held)]
    parts = listing.parts_of(manifest)
    heartbeat = Heartbeat(
        slot, tier, slot, _ADDRESSES,
        listing.named(names, slot, parts),
        listing.stated(states, slot, parts),
        1000.0,
        parts=parts,
    )  # fmt: skip
    return len(wire.seal(Identity.from_seed(bytes(32)), manifest.run_id, 1 << 60, heartbeat)) + 4


def _disk_bytes(manifest: Manifest, model: ModelConfig, settings: TrainSettings, tier: int, generations: int) -> int:
    """Whole generations, anchors of two windows beside the present ones, and what the history can undo or serve."""
    parameters = manifest.parameters(tier)
    state = 4 * (2 * parameters + table_parameters(model))  # weights, momentum, and a second moment of the tables
    held = manifest.held(tier)
    remembered = limits.HISTORY_WINDOWS * sum(_kept_bytes(manifest, f) for f in held)
    states = (generations + _SWEEP_GENERATIONS) * state
    if settings.precision == "lean":  # all weights in two bytes; a generation brings two fragments, offered and merged
        states = round(2 * parameters * (1 + 2 * (generations + _SWEEP_GENERATIONS) / manifest.window))
    return round(states + 3 * 4 * parameters + remembered)


def as_json(manifest: Manifest, costs: Sequence[TierCosts], peers: int, text: str | None) -> dict[str, Any]:
    """For programs."""
    return {
        "run_id": manifest.run_id.hex(),
        "name": manifest.name,
        "text": text,
        "peers": peers,
        "tiers": [asdict(tier) for tier in costs],
    }


def table(costs: Sequence[TierCosts], chosen: int | None = None) -> str:
    """For people; the tier that this node would take is marked."""
    size = commands.bytes_text
    rows = [
        [
            f"{each.tier}{' *' if each.tier == chosen else ''}",
            f"{each.parameters:,}",
            size(each.memory_bytes),
            size(each.disk_bytes),
            size(each.download_bytes),
            size(each.each_way_bytes_per_day),
            size(each.each_way_bytes_per_day),
        ]
        for each in costs
    ]
    return commands.table_text(["TIER", "PARAMETERS", "MEMORY", "DISK", "DOWNLOAD", "UP/DAY", "DOWN/DAY"], rows)
