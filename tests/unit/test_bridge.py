"""The seam between tensors and integers: nothing may be lost on the way, in either direction."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from braniac.model.fragments import fragment_table, gather
from braniac.model.gpt import GPT
from braniac.node import bridge
from braniac.node.errors import Incompatible
from braniac.protocol import ledger
from braniac.protocol.codec import Int32Array
from braniac.protocol.tiles import Sparse
from tests.unit.node_harness import CONFIG, FRAGMENTS, identity, make_manifest

BELOW_16 = (1 << 24) - 1
ANCHORS = arrays(np.int32, st.integers(1, 40), elements=st.integers(-BELOW_16, BELOW_16))
WEIGHTS = arrays(np.float32, st.integers(1, 40), elements=st.floats(-15.9375, 15.9375, width=32))


@given(ANCHORS)
def test_anchors_below_16_survive_the_way_to_weights_and_back(anchor: Int32Array) -> None:
    assert np.array_equal(bridge.to_fixed_point(bridge.to_weights(anchor)), anchor)
    assert np.array_equal(bridge.anchor_from_bytes(bridge.anchor_bytes(anchor), len(anchor)), anchor)


@given(WEIGHTS)
def test_a_weight_is_rounded_by_half_a_unit_at_most(weights: np.ndarray[tuple[int], np.dtype[np.float32]]) -> None:
    fixed = bridge.to_fixed_point(torch.from_numpy(weights))
    error = np.abs(fixed / 2.0**20 - weights.astype(np.float64))
    assert error.max() <= 2.0**-21


@given(ANCHORS, st.booleans(), st.data())
def test_the_change_of_the_weights_is_what_was_settled_to_the_bit(
    anchor: Int32Array, undo: bool, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(anchor) - 1), unique=True).map(sorted))
    values = data.draw(arrays(np.int32, len(chosen), elements=st.integers(-(1 << 22), 1 << 22)))
    update = Sparse(np.asarray(chosen, np.int64), values)
    sent = Sparse(
        update.positions[::2], data.draw(arrays(np.int32, len(chosen[::2]), elements=st.integers(1, 1 << 22)))
    )
    settlement = ledger.settle(update, sent, undo=undo)
    change = bridge.weight_change(settlement, len(anchor))
    sign = -1 if undo else 1
    expected = sign * (update.dense(len(anchor)) - sent.dense(len(anchor)))
    assert np.array_equal(bridge.to_fixed_point(change), expected)
    assert np.array_equal(change.numpy().astype(np.float64) * 2.0**20, expected)  # nothing was rounded away


def test_initial_anchors_are_the_initial_weights() -> None:
    for tier in range(CONFIG.tiers):
        model = GPT(CONFIG, tier)
        model.init_weights(7)
        parameters = dict(model.named_parameters())
        held = [f for f in fragment_table(CONFIG, FRAGMENTS) if f.ring < CONFIG.tiers - tier]
        assert sum(f.size for f in held) == sum(p.numel() for p in model.parameters())
        for fragment in held:
            anchor = bridge.initial_anchor(CONFIG, fragment, 7)
            assert torch.equal(bridge.to_weights(anchor), gather(parameters, fragment))


def test_a_run_of_this_software_is_understood() -> None:
    config, fragments = bridge.model_of(make_manifest(identity(0)))
    assert config == CONFIG
    assert fragments == fragment_table(CONFIG, FRAGMENTS)


def test_a_run_with_another_cut_is_refused() -> None:
    manifest = make_manifest(identity(0))
    narrow = dataclasses.replace(CONFIG, intermediate_size=32)
    others = (
        dataclasses.replace(manifest, layout_digest=bytes(32)),
        dataclasses.replace(manifest, fragments=(*manifest.fragments[1:], manifest.fragments[0])),
        dataclasses.replace(manifest, model=narrow.to_dict()),
    )
    for other in others:
        with pytest.raises(Incompatible, match="other fragments"):
            bridge.model_of(other)
