"""The manifest: one canonical form, one id, and nothing in it that was not checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braniac.protocol import limits
from braniac.protocol.codec import CodecRules
from braniac.protocol.errors import ManifestError, VersionMismatch
from braniac.protocol.manifest import (
    FragmentSpec,
    Manifest,
    MergeRules,
    from_json,
    open_manifest,
    run_id_of,
    sign_manifest,
    to_json,
)
from braniac.protocol.tiles import TileLayout
from tests.unit.swarm_harness import identity, make_manifest

FOUNDER = identity(0)
MANIFEST = make_manifest(rings=(0, 1, 0, 2))
BODY, SIGNATURE = sign_manifest(MANIFEST, FOUNDER)


def test_round_trip() -> None:
    opened = open_manifest(BODY, SIGNATURE)
    assert opened == MANIFEST
    assert opened.run_id == run_id_of(BODY)
    assert from_json(json.loads(json.dumps(to_json(BODY, SIGNATURE)))) == (BODY, SIGNATURE)


def test_every_field_is_in_the_run_id() -> None:
    changes: dict[str, Any] = {
        "name": "other",
        "founder": identity(1).peer_id,
        "epoch_ms": 1,
        "slot_ms": 2000,
        "seed": 8,
        "model": {"width": 9},
        "data": {},
        "layout_digest": bytes(32),
        "fragments": (*MANIFEST.fragments, FragmentSpec(0, TileLayout(((1, 1),)))),
        "up": CodecRules(64, 1, 3),
        "down": CodecRules(65, 2),
        "merge": MergeRules(weight_cap=3),
    }
    ids = {replace(MANIFEST, **{field: value}).run_id for field, value in changes.items()}
    assert len(ids | {MANIFEST.run_id}) == len(changes) + 1


@given(data=st.binary(max_size=120))
@settings(max_examples=200)
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ManifestError):
        open_manifest(data, SIGNATURE)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(field=st.sampled_from(sorted(json.loads(BODY))), value=JSON)
@settings(max_examples=300)
def test_any_value_in_any_field_is_a_manifest_or_refused(field: str, value: object) -> None:
    content = json.loads(BODY) | {field: value}
    body = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    try:
        opened = open_manifest(body, FOUNDER.sign(b"manifest", body))
    except ManifestError:
        return
    assert opened.body() == body


@pytest.mark.parametrize("position", range(0, len(BODY), 7))
def test_bit_flips_are_refused(position: int) -> None:
    flipped = bytearray(BODY)
    flipped[position] ^= 1
    with pytest.raises(ManifestError):
        open_manifest(bytes(flipped), SIGNATURE)


def signed(change: Callable[[dict[str, Any]], object]) -> tuple[bytes, bytes]:
    """The manifest with a change that its founder did sign."""
    content = json.loads(BODY)
    change(content)
    body = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return body, FOUNDER.sign(b"manifest", body)


BROKEN: dict[str, Callable[[dict[str, Any]], object]] = {
    "no name": lambda c: c.update(name=""),
    "a long name": lambda c: c.update(name="n" * 65),
    "a short slot": lambda c: c.update(slot_ms=1),
    "a float": lambda c: c.update(slot_ms=1000.0),
    "a boolean": lambda c: c.update(tiers=True),
    "no tiers": lambda c: c.update(tiers=0),
    "no fragments": lambda c: c.update(fragments=[]),
    "a ring without fragments": lambda c: c.update(tiers=4),
    "a ring beyond the tiers": lambda c: c["fragments"].append([3, [[1, 1]]]),
    "a tile of no values": lambda c: c["fragments"].append([0, [[0, 1]]]),
    "a tile that is too large": lambda c: c["fragments"].append([0, [[limits.TILE_SIZE_MAX + 1, 1]]]),
    "a fragment without tiles": lambda c: c["fragments"].append([0, []]),
    "too many tiles": lambda c: c["fragments"].append([0, [[1, limits.FRAGMENT_TILES_MAX + 1]]]),
    "a negative count": lambda c: c["fragments"].append([0, [[1, 5], [1, -2]]]),
    "no values per tile": lambda c: c.update(up=[0, 2]),
    "too many bits": lambda c: c.update(down=[64, limits.MAGNITUDE_BITS_MAX + 1]),
    "updates of many turns": lambda c: c.update(down=[64, 2, 2]),
    "a number of turns that goes without saying": lambda c: c.update(down=[64, 2, 1]),
    "no number of turns": lambda c: c.update(up=[64, 2]),
    "no turns": lambda c: c.update(up=[64, 2, 0]),
    "too many turns": lambda c: c.update(up=[64, 2, limits.TURNS_MAX + 1]),
    "a huge outer step": lambda c: c.update(merge=[1 << 19, 1, 4, 25]),
    "an unknown normaliser": lambda c: c.update(merge=[1 << 16, 3, 4, 25]),
    "a weight cap of nothing": lambda c: c.update(merge=[1 << 16, 1, 0, 25]),
    "a weight cap that overflows": lambda c: c.update(merge=[1 << 16, 1, 9, 25]),
    "a margin beyond agreement": lambda c: c.update(merge=[1 << 16, 1, 1, 101]),
    "no margin": lambda c: c.update(merge=[1 << 16, 1, 1]),
    "a short layout digest": lambda c: c.update(layout_digest="00"),
    "a founder that is none": lambda c: c.update(founder="00"),
    "a model that is no object": lambda c: c.update(model=[]),
    "a field too many": lambda c: c.update(extra=1),
    "a field too few": lambda c: c.pop("seed"),
    "a negative epoch": lambda c: c.update(epoch_ms=-1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_signed_but_illegal(name: str) -> None:
    with pytest.raises(ManifestError):
        open_manifest(*signed(BROKEN[name]))


def test_a_signed_change_that_is_legal_is_another_run() -> None:
    opened = open_manifest(*signed(lambda content: content.update(seed=8)))
    assert opened.seed == 8
    assert opened.run_id != MANIFEST.run_id


def test_another_version_says_so() -> None:
    with pytest.raises(VersionMismatch, match="version 7"):
        open_manifest(*signed(lambda content: content.update(protocol=7)))


def test_somebody_else_cannot_sign() -> None:
    with pytest.raises(ManifestError, match="not signed"):
        open_manifest(BODY, identity(1).sign(b"manifest", BODY))
    with pytest.raises(ManifestError, match="not signed"):
        open_manifest(BODY, FOUNDER.sign(b"verdict", BODY))


def test_other_spellings_are_refused() -> None:
    body = json.dumps(json.loads(BODY), sort_keys=True).encode()
    with pytest.raises(ManifestError, match="canonical"):
        open_manifest(body, FOUNDER.sign(b"manifest", body))
    with pytest.raises(ManifestError):
        open_manifest(b"[" * 60_000, SIGNATURE)
    with pytest.raises(ManifestError, match="longer"):
        open_manifest(b" " * (limits.MANIFEST_BYTES_MAX + 1), SIGNATURE)


@pytest.mark.parametrize("epoch_ms", [0, 1, 123, 1_700_000_000_123, 1_763_000_000_001])
@pytest.mark.parametrize("slot_ms", [50, 333, 1000, 60_000])
def test_the_start_of_a_slot_lies_in_it(epoch_ms: int, slot_ms: int) -> None:
    manifest = replace(MANIFEST, epoch_ms=epoch_ms, slot_ms=slot_ms)
    for slot in [*range(-50, 3000), 10**6, 10**7 + 1]:
        start = manifest.slot_start(slot)
        assert manifest.slot_at(start) == slot
        assert manifest.slot_at(start - 0.001) == slot - 1


def test_tiers_hold_the_rings_inside_them() -> None:
    assert [MANIFEST.held(tier) for tier in range(3)] == [(0, 1, 2, 3), (0, 1, 2), (0, 2)]
    assert [MANIFEST.parameters(tier) for tier in range(3)] == [4 * 144, 3 * 144, 2 * 144]
    assert [MANIFEST.fragment_of(slot) for slot in range(6)] == [0, 1, 2, 3, 0, 1]
    assert isinstance(MANIFEST, Manifest)
