"""Founding a run, and how a node trains in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from braniac.model.config import PRESETS
from braniac.model.tokenizer import FileTokenizer
from braniac.model.trainer import TrainSettings
from braniac.node import bridge
from braniac.node.config import RunSection, TrainSection
from braniac.node.errors import ConfigError
from braniac.node.founding import RECIPES, found_run, train_settings
from braniac.node.run_data import run_data
from braniac.protocol.manifest import open_manifest
from tests.unit.node_harness import EPOCH_S, identity
from tests.unit.texts import write_tokenizer


def test_a_founded_run_can_be_opened_by_anybody() -> None:
    manifest, body, signature = found_run(RunSection(name="mine", seed=5), identity(0), EPOCH_S)
    assert open_manifest(body, signature) == manifest
    assert manifest.slot_at(EPOCH_S) == 0
    assert (manifest.name, manifest.seed, manifest.founder) == ("mine", 5, identity(0).peer_id)
    assert manifest.slot_s == RECIPES["tiny"].slot_s
    assert bridge.model_of(manifest)[0] == PRESETS["tiny"]
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
    section = TrainSection(batch=3, device="cpu")
    assert train_settings(section, manifest) == dataclasses.replace(TrainSettings(), batch=3, seed=9)
    assert train_settings(TrainSection(learning_rate=0.5), manifest).learning_rate == 0.5


def test_a_run_names_its_tokenizer_and_its_model_knows_all_tokens(tmp_path: Path) -> None:
    assert run_data(found_run(RunSection(), identity(0), EPOCH_S)[0]).tokenizer == "bytes"
    tokenizer = FileTokenizer.read(write_tokenizer(tmp_path / "tokenizer.json"))
    with pytest.raises(
        ConfigError, match=r"vocab_size = 256 is too small: the tokenizer has more tokens, .* least 400"
    ):
        found_run(RunSection(), identity(0), EPOCH_S, tokenizer)
    large = found_run(RunSection(preset="nano-124m"), identity(0), EPOCH_S, tokenizer)[0]
    assert run_data(large).tokenizer == tokenizer.name
