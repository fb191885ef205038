"""What a generation of this node's state says, and how it becomes one again.

One generation is one moment: weights, optimizer, anchors, confirmed certificates and pending offers of the same
instant between two steps, so that after a crash x - anchor is exactly the work that no certificate holds (I1). It
is durable before the offer it contains is made, so a peer never has to answer for a payload that it cannot
subtract.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from braniac.model.checkpoint import from_safetensors, to_safetensors
from braniac.model.config import ModelConfig
from braniac.model.errors import ModelError
from braniac.model.tiers import parameter_shapes
from braniac.node.errors import StateError
from braniac.node.generation import Generation
from braniac.node.store import Store
from braniac.protocol import manifest as manifests
from braniac.protocol.errors import ProtocolError
from braniac.protocol.history import History
from braniac.protocol.identity import PeerId, peer_id_from_text, peer_id_text
from braniac.protocol.manifest import Manifest
from braniac.protocol.messages import FragmentState


@dataclass(frozen=True)
class Totals:
    """Counters that live as long as the node's part in the run."""

    tokens: int = 0
    merged: int = 0
    certificates: int = 0


@dataclass(frozen=True)
class Saved:
    """A generation, read back and checked."""

    manifest: Manifest
    signed_manifest: tuple[bytes, bytes]
    tier: int
    incarnation: int
    clock_offset_s: float
    """Swarm time less wall time."""
    swarm_time_s: float
    """When it was written."""
    anchors: dict[int, FragmentState]
    history: History
    weights: bytes | None
    """Digest of the weights; None if the node stopped before it had any."""
    optimizer: bytes | None
    step: int
    totals: Totals
    peers: dict[PeerId, tuple[str, ...]]
    """Addresses under which peers were reached."""
    generation: int = 0
    """Its number; 0 before it has one."""


@dataclass(frozen=True)
class Snapshot:
    """The trainer's part of a moment."""

    tensors: dict[str, Tensor]
    step: int


def save_tensors(store: Store, config: ModelConfig, tier: int, snapshot: Snapshot) -> tuple[bytes, bytes]:
    """Put weights and optimizer into the store: their digests. Raises DiskFull."""
    names = parameter_shapes(config, tier)
    weights = {name: tensor for name, tensor in snapshot.tensors.items() if name in names}
    optimizer = {name: tensor for name, tensor in snapshot.tensors.items() if name not in names}
    return store.put(to_safetensors(weights, config, tier)), store.put(safetensors.torch.save(optimizer))


def load_tensors(store: Store, weights: bytes, optimizer: bytes) -> dict[str, Tensor]:
    """Inverse of `save_tensors`. Raises StateError."""
    try:
        tensors, _ = from_safetensors(store.get(weights))
        return tensors | safetensors.torch.load(store.get(optimizer))
    except (ModelError, safetensors.SafetensorError) as error:
        raise StateError(f"the saved weights cannot be read ({error}): remove the newest generation") from None


def to_content(saved: Saved, protocol: dict[str, Any]) -> dict[str, Any]:
    """The generation's JSON; `protocol` is the engine's state of the same moment."""
    return {
        "manifest": manifests.to_json(*saved.signed_manifest),
        "tier": saved.tier,
        "incarnation": saved.incarnation,
        "clock": {"offset_s": saved.clock_offset_s, "swarm_time_s": saved.swarm_time_s},
        "anchors": {str(s.fragment): [s.slot, s.digest.hex()] for s in saved.anchors.values()},
        "protocol": protocol,
        "weights": saved.weights.hex() if saved.weights else None,
        "optimizer": saved.optimizer.hex() if saved.optimizer else None,
        "step": saved.step,
        "totals": {
            "tokens": saved.totals.tokens,
            "merged": saved.totals.merged,
            "certificates": saved.totals.certificates,
        },
        "peers": {peer_id_text(peer): list(addresses) for peer, addresses in saved.peers.items()},
    }


def from_generation(generation: Generation) -> Saved:
    """Read a generation back. Raises StateError if this version cannot make sense of it."""
    content: dict[str, Any] = dict(generation.content)
    try:
        body, signature = manifests.from_json(content["manifest"])
        manifest = manifests.open_manifest(body, signature)
        return Saved(
            manifest=manifest,
            signed_manifest=(body, signature),
            tier=int(content["tier"]),
            incarnation=int(content["incarnation"]),
            clock_offset_s=float(content["clock"]["offset_s"]),
            swarm_time_s=float(content["clock"]["swarm_time_s"]),
            anchors={
                int(f): FragmentState(int(f), int(slot), bytes.fromhex(digest))
                for f, (slot, digest) in content["anchors"].items()
            },
            history=History.from_json(manifest, content["protocol"]),
            weights=_digest(content["weights"]),
            optimizer=_digest(content["optimizer"]),
            step=int(content["step"]),
            totals=Totals(**{key: int(value) for key, value in content["totals"].items()}),
            peers={peer_id_from_text(peer): tuple(addresses) for peer, addresses in content["peers"].items()},
            generation=generation.number,
        )
    except (AttributeError, KeyError, TypeError, ValueError, ProtocolError) as error:
        raise StateError(
            f"generation {generation.number} was written by another version of braniac-node ({error}): "
            "use that version, or join again with an empty --state-dir"
        ) from None


def _digest(text: str | None) -> bytes | None:
    return bytes.fromhex(text) if text else None
