"""Founding a run, and the tier that fits the memory of a machine."""

from __future__ import annotations

import dataclasses

import pytest

from braniac.model.config import PRESETS
from braniac.model.trainer import TrainSettings, memory_bytes_needed
from braniac.node import bridge
from braniac.node.config import RunSection, Tier, TrainSection
from braniac.node.errors import ConfigError, ResourceError
from braniac.node.founding import RECIPES, choose_tier, found_run, free_memory_bytes, train_settings
from braniac.protocol.manifest import open_manifest
from tests.unit.node_harness import EPOCH_S, identity

CONFIG = PRESETS["tiny"]
NEEDS = [memory_bytes_needed(CONFIG, tier, TrainSettings()) for tier in range(CONFIG.tiers)]


def test_a_founded_run_can_be_opened_by_anybody() -> None:
    manifest, body, signature = found_run(RunSection(name="mine", seed=5), identity(0), EPOCH_S)
    assert open_manifest(body, signature) == manifest
    assert manifest.slot_at(EPOCH_S) == 0
    assert (manifest.name, manifest.seed, manifest.founder) == ("mine", 5, identity(0).peer_id)
    assert manifest.slot_s == RECIPES["tiny"].slot_s
    assert bridge.model_of(manifest)[0] == CONFIG
    again = found_run(RunSection(name="mine", seed=5), identity(0), EPOCH_S + 1)[0]
    assert again.run_id != manifest.run_id  # two runs, even of one founder with the same settings


@pytest.mark.parametrize("preset", sorted(RECIPES))
def test_every_preset_has_a_recipe_that_works(preset: str) -> None:
    run = RunSection.model_validate({"preset": preset})
    manifest, body, signature = found_run(run, identity(0), EPOCH_S)
    assert open_manifest(body, signature).window == RECIPES[preset].fragments
    assert set(RECIPES) == set(PRESETS)
    assert manifest.up.per_tile <= manifest.down.per_tile


def test_what_the_founder_sets_goes_before_the_recipe() -> None:
    run = RunSection(slot_s=0.25, fragments=12, up_per_tile=33, down_per_tile=44)
    manifest = found_run(run, identity(0), EPOCH_S)[0]
    assert (manifest.slot_ms, manifest.window) == (250, 12)
    assert (manifest.up.per_tile, manifest.down.per_tile) == (33, 44)


def test_every_node_of_a_run_trains_with_its_seed() -> None:
    manifest = found_run(RunSection(seed=9), identity(0), EPOCH_S)[0]
    assert train_settings(TrainSection(batch=3), manifest) == dataclasses.replace(TrainSettings(), batch=3, seed=9)
    assert train_settings(TrainSection(learning_rate=0.5), manifest).learning_rate == 0.5


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
        ("auto", NEEDS[3], "close other programs"),
        ("auto", -5, "close other programs"),
        (0, NEEDS[0] - 1, "use --tier auto"),
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
