"""The run manifest: everything peers must agree on before they can agree on anything else.

It is canonical JSON (sorted keys, no spaces, integers instead of floats), signed by the founder; the run id is its
sha256, so nobody can change a field and keep the id. The model's configuration travels in it as opaque JSON: the
protocol only needs the fragment table. `layout_digest` pins how fragments map to tensors, so software that cuts the
model differently is refused.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from braniac.protocol import limits
from braniac.protocol.codec import CodecRules, payload_bytes_max
from braniac.protocol.errors import IdentityError, ManifestError, VersionMismatch
from braniac.protocol.identity import Identity, PeerId, parse_peer_id, verify
from braniac.protocol.tiles import TileLayout

_DOMAIN = b"manifest"


@dataclass(frozen=True)
class FragmentSpec:
    """One fragment as the protocol sees it."""

    ring: int
    """Ring it belongs to: peers of tiers 0 .. tiers-1-ring hold it."""
    layout: TileLayout
    """How its values are cut into tiles."""


@dataclass(frozen=True)
class MergeRules:
    """How contributions become one update; see merge.py."""

    step_q16: int = 1 << 16
    """alpha, the outer step size, as a 16-bit fraction."""
    coverage_halves: int = 1
    """Normaliser N_i: 0 is everybody's weight, 2 that of the senders of coordinate i, 1 their geometric mean."""
    weight_cap: int = 1
    """A contributor weighs at most this many times the median."""
    margin_percent: int = 25
    """How far behind the others' agreement a contribution may be, of full agreement; 0: it is not looked at."""


@dataclass(frozen=True)
class Manifest:
    """The fixed terms of a run."""

    name: str
    founder: PeerId
    epoch_ms: int
    """Start of slot 0 on the swarm clock, in Unix milliseconds."""
    slot_ms: int
    """Length of a slot."""
    seed: int
    """Seed of the initial weights and of every peer's data order."""
    tiers: int
    model: dict[str, Any]
    """Model configuration, opaque here."""
    data: dict[str, Any]
    """Tokenizer and training recipe, opaque here."""
    layout_digest: bytes
    """sha256 of the map from fragments to tensors."""
    fragments: tuple[FragmentSpec, ...]
    up: CodecRules
    """Codec of contributions."""
    down: CodecRules
    """Codec of merged updates."""
    merge: MergeRules

    def __post_init__(self) -> None:
        _check(1 <= len(self.name) <= 64, "a name of 1 to 64 characters")
        _check(50 <= self.slot_ms <= 86_400_000, "a slot length between 50 ms and a day")
        _check(0 <= self.seed < 1 << 63 and 0 <= self.epoch_ms < 1 << 53, "a seed and an epoch in range")
        _check(1 <= self.tiers <= 16, "1 to 16 tiers")
        _check(1 <= len(self.fragments) <= limits.FRAGMENTS_MAX, "1 to 4096 fragments")
        _check({f.ring for f in self.fragments} == set(range(self.tiers)), "at least one fragment for every ring")
        _check(len(self.layout_digest) == 32, "a 32-byte layout digest")
        _check(1 << 10 <= self.merge.step_q16 <= 1 << 18, "an outer step between 1/64 and 4")
        _check(self.merge.coverage_halves in (0, 1, 2), "a coverage exponent of 0, 1 or 2 halves")
        _check(1 <= self.merge.weight_cap <= 8, "a weight cap between 1 and 8")  # merge.py's sums stay below 2**63
        _check(0 <= self.merge.margin_percent <= 100, "a margin of 0 to 100 percent")
        _check(self.down.turns == 1, "updates of one turn each")

    @property
    def slot_s(self) -> float:
        return self.slot_ms / 1000

    @property
    def window(self) -> int:
        """Slots until every fragment was due once."""
        return len(self.fragments)

    def fragment_of(self, slot: int) -> int:
        """Which fragment is due in `slot`: plain round robin; the table interleaves the rings."""
        return slot % len(self.fragments)

    def slot_at(self, now: float) -> int:
        """The slot that swarm time `now`, in Unix seconds, lies in. Negative before the epoch."""
        # Whole microseconds, so that the start of a slot always lies in it, whatever a float made of it.
        return (round(now * 1_000_000) - self.epoch_ms * 1000) // (self.slot_ms * 1000)

    def slot_start(self, slot: int) -> float:
        """Swarm time at which `slot` begins."""
        return (self.epoch_ms + slot * self.slot_ms) / 1000

    @property
    def observer_tier(self) -> int:
        """The tier of who only listens: below the smallest, where no fragment is held."""
        return self.tiers

    def holds(self, tier: int, fragment: int) -> bool:
        """Whether a peer of `tier` holds `fragment`."""
        return self.fragments[fragment].ring <= self.tiers - 1 - tier

    def held(self, tier: int) -> tuple[int, ...]:
        """Indices of the fragments that a peer of `tier` holds."""
        return tuple(i for i in range(self.window) if self.holds(tier, i))

    def parameters(self, tier: int) -> int:
        """Parameters that a peer of `tier` holds."""
        return sum(self.fragments[i].layout.size for i in self.held(tier))

    def contribution_bytes_max(self, fragment: int) -> int:
        return payload_bytes_max(self.fragments[fragment].layout, self.up)

    def update_bytes_max(self, fragment: int) -> int:
        return payload_bytes_max(self.fragments[fragment].layout, self.down)

    def body(self) -> bytes:
        """Canonical JSON: what is hashed and signed."""
        content = {
            "protocol": limits.PROTOCOL_VERSION,
            "name": self.name,
            "founder": self.founder.hex(),
            "epoch_ms": self.epoch_ms,
            "slot_ms": self.slot_ms,
            "seed": self.seed,
            "tiers": self.tiers,
            "model": self.model,
            "data": self.data,
            "layout_digest": self.layout_digest.hex(),
            "fragments": [[f.ring, [list(g) for g in f.layout.groups]] for f in self.fragments],
            "up": [self.up.per_tile, self.up.magnitude_bits, self.up.turns],
            "down": [self.down.per_tile, self.down.magnitude_bits],
            "merge": [
                self.merge.step_q16,
                self.merge.coverage_halves,
                self.merge.weight_cap,
                self.merge.margin_percent,
            ],
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()

    @functools.cached_property  # needed for every message, and the table of fragments may be long
    def run_id(self) -> bytes:
        return run_id_of(self.body())


def run_id_of(body: bytes) -> bytes:
    """32 bytes that name a run."""
    return hashlib.sha256(body).digest()


def sign_manifest(manifest: Manifest, founder: Identity) -> tuple[bytes, bytes]:
    """(body, signature) as they travel and as they are stored."""
    assert manifest.founder == founder.peer_id
    body = manifest.body()
    return body, founder.sign(_DOMAIN, body)


def open_manifest(body: bytes, signature: bytes) -> Manifest:
    """Check and parse a manifest from a peer or a file. Raises ManifestError, or VersionMismatch."""
    if len(body) > limits.MANIFEST_BYTES_MAX:
        raise ManifestError(f"the run manifest is longer than {limits.MANIFEST_BYTES_MAX} bytes")
    try:
        content = json.loads(body)
        version = content["protocol"]
        if version != limits.PROTOCOL_VERSION:
            raise VersionMismatch(
                f"the run speaks protocol version {str(version)[:20]} and this node speaks {limits.PROTOCOL_VERSION}: "
                "install the braniac-node version that the run asks for",
                version if type(version) is int else 0,
            )
        manifest = _parse(content)
    except (ValueError, KeyError, TypeError, IdentityError, RecursionError) as error:
        raise ManifestError(f"the run manifest is malformed ({type(error).__name__}: {error})"[:300]) from None
    if manifest.body() != body:
        raise ManifestError("the run manifest is not in canonical form")
    if not verify(manifest.founder, _DOMAIN, body, signature):
        raise ManifestError("the run manifest is not signed by its founder")
    return manifest


def _parse(content: dict[str, Any]) -> Manifest:
    fragments = tuple(FragmentSpec(_integer(ring), _layout(groups)) for ring, groups in content["fragments"])
    for key in ("model", "data"):
        _check(isinstance(content[key], dict), f"an object under {key!r}")
    return Manifest(
        name=str(content["name"]),
        founder=parse_peer_id(bytes.fromhex(content["founder"])),
        epoch_ms=_integer(content["epoch_ms"]),
        slot_ms=_integer(content["slot_ms"]),
        seed=_integer(content["seed"]),
        tiers=_integer(content["tiers"]),
        model=content["model"],
        data=content["data"],
        layout_digest=bytes.fromhex(content["layout_digest"]),
        fragments=fragments,
        up=_rules(*map(_integer, content["up"])),
        down=_rules(*map(_integer, content["down"])),
        merge=MergeRules(*map(_integer, content["merge"])),
    )


def _layout(groups: list[list[int]]) -> TileLayout:
    pairs = tuple((_integer(size), _integer(count)) for size, count in groups)
    good = all(0 < size <= limits.TILE_SIZE_MAX and count > 0 for size, count in pairs)
    _check(good and 0 < sum(count for _, count in pairs) <= limits.FRAGMENT_TILES_MAX, "tiles in range")
    return TileLayout(pairs)


def _rules(per_tile: int, magnitude_bits: int, turns: int = 1) -> CodecRules:
    good = 0 < per_tile <= limits.TILE_SIZE_MAX and 0 < magnitude_bits <= limits.MAGNITUDE_BITS_MAX
    good = good and 0 < turns <= limits.TURNS_MAX
    _check(good, "codec rules in range")
    return CodecRules(per_tile, magnitude_bits, turns)


def _integer(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"expected an integer, got {value!r}"[:80])
    return value


def _check(good: bool, expected: str) -> None:
    if not good:
        raise ManifestError(f"a run manifest needs {expected}")


def to_json(body: bytes, signature: bytes) -> dict[str, str]:
    """A signed manifest as a state file keeps it."""
    return {"body": body.decode(), "signature": base64.b64encode(signature).decode()}


def from_json(stored: dict[str, str]) -> tuple[bytes, bytes]:
    """Inverse of `to_json`."""
    return stored["body"].encode(), base64.b64decode(stored["signature"])
