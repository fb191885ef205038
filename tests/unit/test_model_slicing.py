"""How saved weights are sliced: every combination of what is known about them, and the chain of loads and saves.

The expectations are the rule written out a second time, as tables of what a careful reader would conclude.
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braniac.model.errors import CheckpointError
from braniac.model.slicing import CheckpointWarning, Slice, annotate, infer, tier_of

# What `width` of `base` neurons are, by hand.
TIER = {
    (64, 64): 0,
    (64, 48): 0,
    (64, 32): 1,
    (64, 16): 2,
    (128, 64): 1,
    (96, 48): 1,
    (192, 48): 2,
    (64, 8): 3,
    (100, 40): 0,
    (100, 50): 1,
    (100, 25): 2,
    (32, 32): 0,
    (16, 16): 0,
    (48, 48): 0,
}
WIDTHS = (64, 48, 32, 16)
EXPLICIT = (None, 0, 1, 2)
NAMES = (None, "run", "run-tier1", "run-tier2")


def config_of(width: int | None, base: int | None, tier: object) -> dict[str, object]:
    found = {"intermediate_size": width, "matformer_base_intermediate_size": base, "matformer_tier": tier}
    return {"hidden_size": 8, **{key: value for key, value in found.items() if value is not None}}


def conclusion(width: int, stated: int | None, explicit: int | None, name: str | None) -> Slice:
    """The rule, written out: a stated base, else what the checkpoint calls itself, else whole."""
    if stated is not None:
        return Slice(TIER[stated, width], width, stated)
    claimed = {None: 0, "run": 0, "run-tier1": 1, "run-tier2": 2}[name] if explicit is None else explicit
    return Slice(claimed, width, {0: width, 1: 2 * width, 2: 4 * width}[claimed])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("known", ["config", "manifest", "both", "unknown"])
def test_every_combination_of_what_is_known(width: int, known: str) -> None:
    in_config = 64 if known in ("config", "both") else None
    in_manifest = 64 if known in ("manifest", "both") else None
    stated = None if known == "unknown" else 64
    for explicit, name in itertools.product(EXPLICIT, NAMES):
        config = config_of(width, in_config, explicit)
        expected = conclusion(width, stated, explicit, name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = infer(config, width=width, manifest_base=in_manifest, folder_name=name)
        assert found == expected, (config, name)
        assert found.whole == (expected.base == width)
        contradicted = explicit is not None and explicit != expected.tier
        assert [w.category for w in caught] == [CheckpointWarning] * contradicted, (config, name)

        written = annotate(config, width=width, manifest_base=in_manifest, folder_name=name)
        assert written == {
            "hidden_size": 8,
            "intermediate_size": width,
            "matformer_tier": expected.tier,
            "matformer_base_intermediate_size": expected.base,
        }, (config, name)
        assert infer(written) == expected


@pytest.mark.parametrize(("base", "width"), sorted(TIER))
def test_tier_of_agrees_with_the_table(base: int, width: int) -> None:
    assert tier_of(base, width) == TIER[base, width]
    assert annotate(config_of(width, base, None), width=width)["matformer_tier"] == TIER[base, width]


@given(base=st.integers(1, 4096), width=st.integers(1, 4096))
def test_only_a_whole_power_of_two_is_a_tier(base: int, width: int) -> None:
    if base < width:
        return
    halvings = [tier for tier in range(13) if width * 2**tier == base]
    assert tier_of(base, width) == (halvings[0] if halvings else 0)


@pytest.mark.parametrize(
    ("config", "width", "manifest", "name", "tier", "base"),
    [
        # Saved tensors and what is known, as the predecessor met them; it got the marked ones wrong.
        (config_of(1024, None, None), 1024, None, "X", 0, 1024),
        (config_of(1024, 1024, 1), 1024, None, "X", 0, 1024),  # wrong there: trained at tier 1, hence saved as 1
        (config_of(512, 1024, 1), 512, None, "X-tier1", 1, 1024),  # wrong there: 0, or with another --tier 2
        (config_of(512, 1024, 0), 512, None, "X-tier1", 1, 1024),  # a slice saved by the old code: sliced again
        (config_of(512, None, None), 512, None, "X-tier1", 1, 1024),
        (config_of(512, None, None), 512, 1024, "renamed", 1, 1024),
        (config_of(400, 1000, None), 400, None, "X", 0, 1000),  # wrong there: rounded to tier 1
        (config_of(None, 1000, None), 1000, None, "X", 0, 1000),
        (config_of(512, None, 1), 512, None, "renamed", 1, 1024),
        (config_of(512, None, 1), 512, None, "X-tier2", 1, 1024),  # what is in the file beats the folder's name
        (config_of(512, 1024, None), 512, 512, "X", 1, 1024),  # the file's own base beats the manifest's
    ],
)
@pytest.mark.filterwarnings("ignore::braniac.model.slicing.CheckpointWarning")
def test_the_predecessors_cases(
    config: dict[str, object], width: int, manifest: int | None, name: str, tier: int, base: int
) -> None:
    assert infer(config, width=width, manifest_base=manifest, folder_name=name) == Slice(tier, width, base)
    written = annotate(config, width=width, manifest_base=manifest, folder_name=name)
    assert (written["matformer_tier"], written["matformer_base_intermediate_size"]) == (tier, base)


@given(widths=st.lists(st.sampled_from([64, 48, 32, 16, 8]), min_size=1, max_size=6))
def test_a_chain_of_slicing_and_saving_stays_honest(widths: list[int]) -> None:
    """Load, train at any tier, save, slice, save, ...: the metadata always says what the tensors are."""
    config = annotate({"hidden_size": 8, "intermediate_size": 64}, width=64)
    for width in sorted(widths, reverse=True):
        config = annotate(config, width=width)
        assert infer(config, width=width) == Slice(TIER[64, width], width, 64)
        assert annotate(config, width=width) == config


def test_annotate_leaves_its_argument_and_other_keys_alone() -> None:
    config: dict[str, object] = {"hidden_size": 8, "intermediate_size": 64, "_comment": "mine", "eos_token_id": [1, 2]}
    before = dict(config)
    written = annotate(config, width=64)
    assert config == before
    assert before.items() <= written.items()


@pytest.mark.parametrize(
    ("config", "arguments", "sentence"),
    [
        (
            config_of(64, None, None),
            {"width": 32},
            "intermediate_size 64 but the tensors hold 32 neurons: set it to 32",
        ),
        (config_of(64, None, 0), {"width": 32, "folder_name": "X-tier1"}, "tensors hold 32 neurons"),
        (config_of(32, 64, 1), {"width": 64}, "intermediate_size 32 but the tensors hold 64"),
        (config_of(128, 64, None), {"width": 32}, "intermediate_size 128 but the tensors hold 32"),
        (config_of(64, 32, None), {"width": 64}, "matformer_base_intermediate_size 32 but the tensors hold 64"),
        (config_of(64, None, None), {"width": 64, "manifest_base": 32}, "32 but the tensors hold 64"),
    ],
)
def test_a_contradiction_is_never_written(config: dict[str, object], arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        annotate(config, **arguments)


def test_a_slice_of_a_universal_checkpoint_may_be_written_with_its_config() -> None:
    assert annotate(config_of(64, 64, 0), width=16) == config_of(16, 64, 2)
    assert annotate(config_of(64, None, 0), width=16, manifest_base=64) == config_of(16, 64, 2)
    assert annotate(config_of(32, 64, 1), width=16) == config_of(16, 64, 2)


def test_a_base_below_the_width_is_dropped_when_loading() -> None:
    with pytest.warns(CheckpointWarning, match="is 32 but the tensors hold 64 neurons"):
        assert infer(config_of(64, 32, None)) == Slice(0, 64, 64)


def test_a_config_of_other_tensors_is_refused() -> None:
    with pytest.raises(CheckpointError, match="intermediate_size 64 but the tensors hold 32 neurons"):
        infer(config_of(64, 64, 0), width=32)


def test_a_config_without_width_needs_the_tensors() -> None:
    assert infer({}, width=64) == Slice(0, 64, 64)
    with pytest.raises(CheckpointError, match="lacks 'intermediate_size'"):
        infer({})


def test_null_is_as_good_as_absent() -> None:
    config = {"intermediate_size": 64, "matformer_tier": None, "matformer_base_intermediate_size": None}
    assert infer(config) == Slice(0, 64, 64)


@pytest.mark.parametrize("key", ["intermediate_size", "matformer_base_intermediate_size", "matformer_tier"])
@pytest.mark.parametrize("value", [-1, 1.0, "64", True, [64], 1 << 40, float("nan")])
def test_a_value_of_another_kind_is_refused_by_its_key(key: str, value: object) -> None:
    config = {"intermediate_size": 64, key: value}
    for call in (infer, annotate):
        with pytest.raises(CheckpointError, match=f"{key} .*must be a whole number from"):
            call(config, width=64)


@pytest.mark.parametrize("width", [0, -64, 64.0, True, 1 << 40])
def test_a_width_that_no_tensor_has_is_refused(width: Any) -> None:
    for call in (infer, annotate):
        with pytest.raises(CheckpointError, match="width of the tensors is"):
            call({}, width=width)
    with pytest.raises(CheckpointError, match="manifest's matformer_base_intermediate_size is"):
        infer({}, width=64, manifest_base=width)


def test_an_absurd_tier_cannot_make_an_absurd_base() -> None:
    with pytest.raises(CheckpointError, match="base of tier 20 with 64 neurons"):
        infer(config_of(64, None, 20))


@pytest.mark.parametrize(
    "name", ["tier1", "-tier1", "X-tier", "X-tier01", "X-tier1.bak", "X-tier99", "X-tier1\n", "X-tier\u0661"]
)
def test_only_the_exact_naming_says_something(name: str) -> None:
    assert infer(config_of(64, None, None), folder_name=name) == Slice(0, 64, 64)
