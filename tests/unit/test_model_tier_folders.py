"""Tier folders: which files and which width a tier resolves to, in every combination.

The expectations are the rules written out a second time, as tables of what a careful reader would conclude.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from braniac.model.config import ModelConfig
from braniac.model.errors import CheckpointError
from braniac.model.gpt import GPT
from braniac.model.hf import load_tier, save_folder
from braniac.model.slicing import CheckpointWarning, Slice
from braniac.model.tier_folders import Resolution, Strategy, resolve, tier_folder, write_manifest
from tests.unit.checkpoint_folders import BASE, STRATEGIES, edit, export, save, weights


def outcome(path: Path, tier: int, strategy: Strategy) -> tuple[str, int, int] | None:
    """Folder, width in the files and width to run, or None for a refusal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        try:
            found = resolve(path, tier, strategy)
        except CheckpointError:
            return None
    assert all(file.parent in (found.folder, path) for file in found.files)
    return found.folder.name, found.held.width, found.width


# The rules once more. How many of 64 neurons each tier has, and what a width is called.
WIDTH_OF_TIER = {0: 64, 1: 32, 2: 16}
TIERS_OF_WIDTH = {64: 0, 32: 1, 16: 2, 48: None}
RIGHT = {64: 0, 48: 0, 32: 1, 16: 2}
WRONG = {64: 1, 48: 1, 32: 2, 16: 1}
COMBINATIONS = list(
    itertools.product((64, 48, 32, 16), ("config", "manifest", "unknown"), ("right", "wrong", "missing"))
)


def explicit_tier(width: int, explicit: str) -> int | None:
    return {"right": RIGHT[width], "wrong": WRONG[width], "missing": None}[explicit]


def believed(width: int, known: str, tier: int | None) -> tuple[int, int | None]:
    """Base and tier that a careful reader concludes on; tier None: a slice of no tier."""
    if known != "unknown":
        return BASE, TIERS_OF_WIDTH[width]
    return width * 2 ** (tier or 0), tier or 0  # nothing speaks against what the file calls itself


@pytest.mark.parametrize(("width", "known", "explicit"), COMBINATIONS)
def test_every_single_folder(tmp_path: Path, width: int, known: str, explicit: str) -> None:
    """One checkpoint, nothing beside it; the manifest, if any, lists it as tier 0 or lists nothing."""
    tier = explicit_tier(width, explicit)
    path = save(tmp_path / "X", width, BASE if known == "config" else None, tier)
    if known == "manifest":
        empty = {"schema_version": 1, "matformer_base_intermediate_size": BASE}
        document = {**empty, "common_files": [], "tiers": [], "sha256": {}}
        (path / "matformer_manifest.json").write_text(json.dumps(document))
    base, held = believed(width, known, tier)
    for requested, strategy in itertools.product((0, 1, 2), STRATEGIES):
        if known == "manifest" and width != BASE:
            expected = None  # a manifest lies beside whole weights only
        elif held == 0:
            can = strategy != "sliced" or requested == 0
            expected = ("X", width, base // 2**requested) if can else None
        else:  # a slice serves its own tier, and not where a whole checkpoint was demanded
            can = requested == held and strategy != "universal"
            expected = ("X", width, width) if can else None
        assert outcome(path, requested, strategy) == expected, (requested, strategy)


@pytest.mark.parametrize(("width", "known", "explicit"), COMBINATIONS)
@pytest.mark.parametrize("named", [1, 2])
def test_every_sibling(tmp_path: Path, width: int, known: str, explicit: str, named: int) -> None:
    """A whole checkpoint X, and beside it X-tier1 or X-tier2 that holds any width and says anything about itself."""
    whole = save(tmp_path / "X", BASE, None if known == "unknown" else BASE, None if known == "unknown" else 0)
    base = BASE if known == "config" else None
    sibling = save(tmp_path / f"X-tier{named}", width, base, explicit_tier(width, explicit))
    sound = WIDTH_OF_TIER[named] == width
    if known == "manifest":
        paths = {f"../{sibling.name}/{name}": sibling / name for name in ("config.json", "model.safetensors")}
        hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
        entry = {"tier": named, "intermediate_size": WIDTH_OF_TIER[named], "files": list(paths)}
        document = {"schema_version": 1, "matformer_base_intermediate_size": BASE, "common_files": [], "sha256": hashes}
        (whole / "matformer_manifest.json").write_text(json.dumps({**document, "tiers": [entry]}))
    for requested, strategy in itertools.product((0, 1, 2), STRATEGIES):
        expected: tuple[str, int, int] | None
        if requested == 0 or strategy == "universal" or (strategy == "auto" and requested != named):
            expected = ("X", 64, WIDTH_OF_TIER[requested])
        elif requested == named and sound:  # whatever it says: X beside it tells what it is a slice of
            expected = (sibling.name, width, width)
        else:
            expected = None
        assert outcome(whole, requested, strategy) == expected, (requested, strategy)


@pytest.mark.parametrize(("width", "known", "explicit"), [c for c in COMBINATIONS if c[1] != "manifest"])
def test_every_slice_without_the_whole(tmp_path: Path, width: int, known: str, explicit: str) -> None:
    """Only X-tier1 was fetched; X, which is asked for, is not there."""
    tier = explicit_tier(width, explicit)
    save(tmp_path / "X-tier1", width, BASE if known == "config" else None, tier)
    # Without a base there is nothing but its own word, or its name where it says nothing.
    is_tier_1 = width == 32 if known == "config" else tier in (1, None)
    for requested, strategy in itertools.product((0, 1, 2), STRATEGIES):
        usable = requested == 1 and strategy != "universal" and is_tier_1
        expected = ("X-tier1", width, width) if usable else None
        assert outcome(tmp_path / "X", requested, strategy) == expected, (requested, strategy)


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return export(tmp_path)


@pytest.mark.parametrize("tier", [0, 1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_listed_tiers_resolve_to_their_files(exported: Path, tier: int, strategy: Strategy) -> None:
    found = resolve(exported, tier, strategy)
    sliced = tier > 0 and strategy != "universal"
    folder = tier_folder(exported, tier) if sliced else exported
    held = Slice(tier, 64 >> tier, 64) if sliced else Slice(0, 64, 64)
    files = (folder / "config.json", folder / "model.safetensors", exported / "tokenizer.json")
    assert found == Resolution(folder=folder, files=files, held=held, width=64 >> tier)


def test_a_manifest_without_an_entry_for_tier_0_will_do(exported: Path) -> None:
    edit(exported, lambda m: (m["tiers"].pop(0), m["sha256"].pop("config.json"), m["sha256"].pop("model.safetensors")))
    assert resolve(exported, 0, "auto").folder == exported
    assert resolve(exported, 1, "auto").folder == tier_folder(exported, 1)


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_what_is_saved_during_training_at_any_tier_says_what_it_holds(tmp_path: Path, trained: int) -> None:
    """The whole model trained as a tier stays whole; a tier loaded from it and trained is that tier's slice."""
    config = ModelConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, context=8, matformer_factor=4
    )
    width = 64 >> trained
    whole = GPT(config)
    whole.init_weights(0)
    train(whole, width)
    save_folder(whole, tmp_path / "X")
    assert resolve(tmp_path / "X", 0, "universal").held == Slice(0, 64, 64)

    tier, _ = load_tier(tmp_path / "X", trained)
    train(tier, width)
    save_folder(tier, tmp_path / "checkpoint")
    assert resolve(tmp_path / "checkpoint", trained, "auto").held == Slice(trained, width, 64)
    config_json = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert (config_json["matformer_tier"], config_json["matformer_base_intermediate_size"]) == (trained, 64)


def train(model: GPT, width: int) -> None:
    tokens = torch.arange(8)[None]
    model.loss(tokens, tokens + 1, width).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


def test_sharded_tiers_are_listed_whole(tmp_path: Path) -> None:
    universal = save(tmp_path / "X", 64, 64, 0)
    (universal / "model.safetensors").unlink()
    for layer in range(2):
        shard = {f"model.layers.{layer}.mlp.up_proj.weight": torch.zeros(64, 4)}
        safetensors.torch.save_file(shard, universal / f"model-0000{layer + 1}-of-00002.safetensors")
    (universal / "model.safetensors.index.json").write_text("{}")
    write_manifest(universal, [])
    names = [file.name for file in resolve(universal, 0, "sliced").files]
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert names == ["config.json", *shards, "model.safetensors.index.json"]


def test_a_tier_that_was_not_fetched_falls_back_only_under_auto(exported: Path) -> None:
    (tier_folder(exported, 1) / "model.safetensors").unlink()
    with pytest.warns(CheckpointWarning, match=r"'\.\./X-tier1/model.safetensors' for tier 1, which is missing"):
        found = resolve(exported, 1, "auto")
    assert (found.folder, found.held.width, found.width) == (exported, 64, 32)
    with pytest.raises(CheckpointError, match=r"X-tier1/model.safetensors' for tier 1, which is missing: fetch it"):
        resolve(exported, 1, "sliced")


def test_a_link_to_the_universal_folder_finds_its_tiers(exported: Path) -> None:
    (exported.parent / "latest").symlink_to("X")
    assert resolve(exported.parent / "latest", 2, "sliced").folder == exported.parent / "X-tier2"
    (exported / "matformer_manifest.json").unlink()
    assert resolve(exported.parent / "latest", 2, "sliced").folder == exported.parent / "X-tier2"


def test_the_manifest_knows_the_base_of_a_tier_that_it_does_not_list(exported: Path) -> None:
    """Only the manifest and an unlisted sibling were fetched; its name would make it tier 2 of 128 neurons."""
    edit(
        exported,
        lambda m: (m["tiers"].pop(2), [m["sha256"].pop(name) for name in list(m["sha256"]) if "tier2" in name]),
    )
    for file in (exported / "config.json", exported / "model.safetensors"):
        file.unlink()
    save(tier_folder(exported, 2), 32)
    with pytest.raises(CheckpointError, match=r"X-tier2 holds 32 of 64 FFN neurons: tier 2 of .*X is 16 of 64"):
        resolve(exported, 2, "auto")


def test_a_sibling_of_a_wider_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "X", 64)
    save(tmp_path / "X-tier1", 32, 128, 2)
    with (
        pytest.warns(CheckpointWarning, match="has matformer_base_intermediate_size 128, which is used"),
        pytest.raises(CheckpointError, match=r"X-tier1 holds 32 of 128 FFN neurons: tier 1 of .*X is 32 of 64"),
    ):
        resolve(path, 1, "auto")


def test_a_folder_with_a_pickle_only_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "X", 64)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds no .safetensors file"):
        resolve(path, 0, "auto")


@pytest.mark.parametrize(
    ("widths", "sentence"),
    [((64, 32), r"of \[32, 64\] neurons"), ((32, 32), "intermediate_size 64 but the tensors hold 32 neurons")],
)
def test_the_tensors_themselves_decide(tmp_path: Path, widths: tuple[int, int], sentence: str) -> None:
    path = save(tmp_path / "X", 64)
    (path / "model.safetensors").write_bytes(weights(*widths))
    with pytest.raises(CheckpointError, match=sentence):
        resolve(path, 0, "auto")


def test_a_sibling_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "X", 64)
    save(tmp_path / "X-tier1", 32, 64, 1, rope_theta=5e5)
    with pytest.raises(CheckpointError, match="X-tier1 is a slice of another model"):
        resolve(path, 1, "auto")


def test_double_slicing_is_refused_in_words_that_help(tmp_path: Path) -> None:
    path = save(tmp_path / "X", 32, 64, 1)
    with pytest.raises(
        CheckpointError, match=r"32 of 64 FFN neurons \(tier 1\): the universal strategy would slice it"
    ):
        resolve(path, 1, "universal")
    with pytest.raises(CheckpointError, match="but tier 2 was asked for: load the checkpoint that it was sliced from"):
        resolve(path, 2, "auto")


@pytest.mark.parametrize(
    ("tier", "sentence"), [(-1, "no tier -1"), (21, "no tier 21"), (7, "cannot be halved 7 times")]
)
def test_a_tier_that_cannot_be_is_refused(tmp_path: Path, tier: int, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        resolve(save(tmp_path / "X", 64), tier, "auto")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    for strategy in STRATEGIES:
        with pytest.raises(CheckpointError, match=r"X/config.json is missing"):
            resolve(tmp_path / "X", 1, strategy)


def test_a_manifest_of_folders_that_are_not_the_tiers_is_not_written(tmp_path: Path) -> None:
    whole = save(tmp_path / "X", 64, 64, 0)
    save(tmp_path / "X-tier1", 16, 64, 2)
    with pytest.raises(CheckpointError, match=r"X-tier1 holds 16 of 64 FFN neurons: tier 1 of .*X is 32 of 64"):
        write_manifest(whole, [1])
    with pytest.raises(CheckpointError, match=r"X-tier2/config.json is missing"):
        write_manifest(whole, [2])
    with pytest.raises(CheckpointError, match="X-tier1 holds 16 of 64 FFN neurons: name a whole checkpoint"):
        write_manifest(tmp_path / "X-tier1", [])
    assert sorted(os.listdir(whole)) == ["config.json", "model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["X", "X-tier1"]


def test_tier_folders_are_siblings() -> None:
    assert tier_folder(Path("runs/X"), 2) == Path("runs/X-tier2")
    assert tier_folder(Path("runs/v1.5/"), 1) == Path("runs/v1.5-tier1")
    assert tier_folder(Path("X"), 0) == Path("X")
