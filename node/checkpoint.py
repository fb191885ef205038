"""What a generation of this node's state says, and how it becomes one again.

One generation is one moment: weights, optimizer, anchors, confirmed certificates and pending offers of the same
instant between two steps, so that after a crash x - anchor is exactly the work that no certificate holds (I1). It
is durable before the offer it contains is made, so a peer never has to answer for a payload that it cannot
subtract.

Lean training is for models whose weights are too large to be copied and written with every offer. Its generations hold
the weights fragment by fragment, each together with its anchor and of its own moment, and no optimizer: a momentum is
back after some steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
from torch import Tensor

from braniac.model.checkpoint import from_safetensors, to_safetensors
from braniac.model.config import ModelConfig
from braniac.model.errors import ModelError
from braniac.model.fragments import Fragment
from braniac.model.tiers import parameter_shapes
from braniac.model.trainer import Trainer
from braniac.node import bridge
from braniac.node.errors import Incompatible, StateError
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
    parts: dict[int, bytes] = field(default_factory=dict)
    """Lean training, instead of `weights` and `optimizer`: digest of each fragment's weights; see `load_parts`."""
    missed: dict[int, int] = field(default_factory=dict)
    """Offers of each fragment since one was last taken."""
    bans: bytes | None = None
    """Digest of the proofs against banned peers, if there are any."""
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


def load_parts(store: Store, saved: Saved, fragments: Sequence[Fragment]) -> Iterator[tuple[Fragment, Tensor]]:
    """The weights of a generation of lean training, a fragment at a time, float32 [size] each. Raises StateError.

    Each is of the moment in which its fragment was last offered or merged, which may be a window ago: weights and
    anchor belong together fragment by fragment, and that is all that the ledger asks for. A fragment that has none is
    at its anchor.
    """
    for index, state in saved.anchors.items():
        fragment, part = fragments[index], saved.parts.get(index)
        if part is not None:
            yield fragment, bridge.part_from_bytes(store.get(part), fragment.size)
        else:
            yield fragment, bridge.to_weights(bridge.anchor_from_bytes(store.get(state.digest), fragment.size))


def resume(trainer: Trainer, store: Store, saved: Saved, fragments: Sequence[Fragment]) -> None:
    """Put the trainer where it was. Raises StateError, and Incompatible for weights of the other precision."""
    if saved.weights and saved.optimizer:
        if trainer.settings.precision == "lean":
            raise Incompatible(
                f"{store.root} holds weights in float32: set train.precision=fp32, or use another --state-dir"
            )
        trainer.load_state(load_tensors(store, saved.weights, saved.optimizer), {"step": saved.step})
    else:  # also before the first step: what was downloaded is not what a trainer begins with
        for fragment, weights in load_parts(store, saved, fragments):
            trainer.load_fragment(fragment, weights)
        trainer.step_count = saved.step


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
        "parts": {str(fragment): digest.hex() for fragment, digest in saved.parts.items()},
        "missed": {str(fragment): count for fragment, count in saved.missed.items()},
        "bans": saved.bans.hex() if saved.bans else None,
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
            parts={int(f): bytes.fromhex(digest) for f, digest in content.get("parts", {}).items()},
            missed={int(f): max(0, int(count)) for f, count in content.get("missed", {}).items()},
            bans=_digest(content.get("bans")),
            generation=generation.number,
        )
    except (AttributeError, KeyError, TypeError, ValueError, ProtocolError) as error:
        raise StateError(
            f"generation {generation.number} was written by another version of braniac-node ({error}): "
            "use that version, or join again with an empty --state-dir"
        ) from None


def _digest(text: str | None) -> bytes | None:
    return bytes.fromhex(text) if text else None
