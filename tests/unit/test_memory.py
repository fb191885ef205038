"""Which tier fits into memory, and what is said where none does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from braniac.model.config import PRESETS, Precision
from braniac.model.errors import ConfigError as ModelConfigError
from braniac.model.trainer import TrainSettings, memory_bytes_needed
from braniac.node.config import Tier
from braniac.node.errors import ConfigError, ResourceError
from braniac.node.memory import Fit, check_fits, choose_tier, fits, free_memory_bytes, group_limits

CONFIG = PRESETS["tiny"]
NEEDS = [memory_bytes_needed(CONFIG, tier, TrainSettings()) for tier in range(CONFIG.tiers)]
LARGE = PRESETS["nano-1b"]
LEAN = TrainSettings(precision="lean", batch=64)


def needed(fit: Fit, settings: TrainSettings = LEAN) -> int:
    model = dataclasses.replace(LARGE, context=fit.context)
    return memory_bytes_needed(model, fit.tier, dataclasses.replace(settings, batch=fit.batch))


@pytest.mark.parametrize(
    ("wanted", "free", "tier"),
    [
        ("auto", 10 * NEEDS[0], 0),
        ("auto", int(NEEDS[1] / 0.8) + 1, 1),
        ("auto", int(NEEDS[0] / 0.8) - 1, 1),  # a fifth is left to the person whose device it is
        ("auto", int(NEEDS[3] / 0.8) + 1, 3),
        (0, NEEDS[0], 0),  # who insists may have all
        (3, 10 * NEEDS[0], 3),
    ],
)
def test_the_tier_that_is_chosen(wanted: Tier, free: int, tier: int) -> None:
    assert choose_tier(wanted, CONFIG, TrainSettings(), free) == tier


@pytest.mark.parametrize(
    ("wanted", "free", "sentence"),
    [
        (
            "auto",
            NEEDS[3],
            r"training batch 8 with context 128 at tier 3 takes .* what fits is batch [1-7] with context",
        ),
        ("auto", -5, "0 MiB may be used: not even batch 1 fits at any tier, so close other programs"),
        (
            0,
            NEEDS[0] - 1,
            r"what fits is batch 7 with context 128 at tier 0, or batch 8 with context 128 at tier 1, or",
        ),
    ],
)
def test_a_tier_that_does_not_fit(wanted: Tier, free: int, sentence: str) -> None:
    with pytest.raises(ResourceError, match=sentence):
        choose_tier(wanted, CONFIG, TrainSettings(), free)


def test_a_tier_that_the_run_does_not_have() -> None:
    two_tiers = dataclasses.replace(CONFIG, matformer_factor=2)
    with pytest.raises(ConfigError, match="no tier 3: choose one from 0 to 1"):
        choose_tier(3, two_tiers, TrainSettings(), 1 << 40)


def test_some_memory_is_free() -> None:
    assert 0 < free_memory_bytes() < 1 << 50


@pytest.mark.parametrize("limit_gib", [2.0, 3.0, 4.0])
def test_what_is_said_to_fit_does_and_a_little_more_does_not(limit_gib: float) -> None:
    limit = int(limit_gib * (1 << 30))
    found = fits(LARGE, LEAN, range(LARGE.tiers), limit, any_context=True)
    assert found
    for fit in found:
        assert needed(fit) <= limit
        if fit.context == LARGE.context and fit.batch < LEAN.batch:
            assert needed(dataclasses.replace(fit, batch=fit.batch + 1)) > limit
    shorter = [fit for fit in found if fit.context < LARGE.context]
    for fit in shorter:
        assert (fit.tier, fit.batch) == (0, LEAN.batch)
        assert needed(dataclasses.replace(fit, context=2 * fit.context)) > limit


def test_a_training_that_cannot_fit_is_refused_with_sizes_that_do() -> None:
    check_fits(LARGE, 0, LEAN, 1 << 40)
    with pytest.raises(ResourceError) as caught:
        check_fits(LARGE, 0, LEAN, 4 << 30)
    sentence = str(caught.value)
    assert sentence.startswith("training batch 64 with context 1024 at tier 0 takes ")
    assert "and 4,096 MiB are free: what fits is batch " in sentence
    assert "with context 1024 at tier 3" in sentence
    assert "\n" not in sentence
    with pytest.raises(ResourceError, match="not even batch 1 fits at any tier"):
        check_fits(LARGE, 0, LEAN, 1 << 20)


def test_limits_of_control_groups_are_found_where_the_process_is(tmp_path: Path) -> None:
    def write(place: str, text: str) -> None:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text)

    write("v2", "0::/system.slice/node.service\n")
    write("groups/system.slice/node.service/memory.max", "3000\n")
    write("groups/system.slice/memory.max", "max\n")
    assert list(group_limits(tmp_path / "v2", tmp_path / "groups")) == [3000]
    write("v1", "9:name=systemd:/x\n4:cpu,memory:/docker/abc\n0::/\n")
    write("groups/memory/memory.limit_in_bytes", "2000\n")  # the container's own, whatever its name outside
    write("groups/memory.max", "1000\n")
    assert list(group_limits(tmp_path / "v1", tmp_path / "groups")) == [2000, 1000]
    assert list(group_limits(tmp_path / "none", tmp_path / "groups")) == []


@pytest.mark.parametrize("precision", ["fp32", "lean"])
def test_every_layer_that_is_kept_takes_memory(precision: Precision) -> None:
    def bytes_with(kept_layers: int | None) -> int:
        settings = TrainSettings(precision=precision, batch=64, kept_layers=kept_layers)
        return memory_bytes_needed(CONFIG, 0, settings)

    layers = CONFIG.num_hidden_layers
    by_count = [bytes_with(kept_layers) for kept_layers in range(layers + 1)]
    assert by_count[1:] == sorted(by_count[1:])  # one must be there anyway
    assert by_count[0] < by_count[-1] == bytes_with(layers + 1)
    assert bytes_with(None) == (by_count[0] if precision == "lean" else by_count[-1])


def test_how_many_layers_are_kept_cannot_be_negative() -> None:
    with pytest.raises(ModelConfigError, match="kept_layers is -1"):
        TrainSettings(kept_layers=-1)
