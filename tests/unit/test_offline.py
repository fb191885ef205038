"""What can be done with a state directory: text and losses, also while a daemon holds it; and what is said if not."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path

import pytest
import torch

from braniac.model.decoding import beam_search
from braniac.model.errors import CheckpointError
from braniac.model.evaluate import held_out_loss
from braniac.model.hf import save_folder
from braniac.node import offline
from braniac.node.config import DataSection
from braniac.node.errors import ConfigError, StateError
from tests.unit.node_harness import CONFIG, EPOCH_S, SETTINGS, TEXT, blob_files, make_trainer, write_run
from tests.unit.solo_node import MANIFEST, Node

pytestmark = pytest.mark.usefixtures("text")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.tobytes() * 3)
    return path


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    """Of a node that did 40 steps and some slots, and has left."""
    root = tmp_path / "state"

    async def live() -> None:
        node = Node(root)
        await node.step(40)
        for _ in range(8):
            await node.slot()
        await node.commit()
        await asyncio.to_thread(node.close)

    asyncio.run(live())
    return root


def generated(state_dir: Path, **changes: object) -> str:
    wanted = {"tokens": 20, "temperature": 0.8, "top_k": None, "seed": 3, "tier": None, "data": DataSection()} | changes
    return "".join(offline.generate(state_dir, "the quick ", **wanted))  # type: ignore[arg-type]


def test_text_depends_on_the_seed_alone(state_dir: Path) -> None:
    assert generated(state_dir) == generated(state_dir)
    assert generated(state_dir) != generated(state_dir, seed=4)
    assert len({generated(state_dir, seed=None, tokens=40) for _ in range(3)}) > 1
    assert generated(state_dir, temperature=0.0, seed=1) == generated(state_dir, temperature=0.0, seed=2)


def test_a_draft_changes_nothing_of_the_likeliest_text(state_dir: Path) -> None:
    plain = generated(state_dir, temperature=0.0)
    assert generated(state_dir, temperature=0.0, draft_tier=3) == plain
    assert generated(state_dir, draft_tier=3) == generated(state_dir, draft_tier=3)
    with pytest.raises(ConfigError, match="--beams and --draft-tier exclude each other"):
        generated(state_dir, draft_tier=3, beams=2)
    with pytest.raises(ConfigError, match="does not hold tier 4"):
        generated(state_dir, draft_tier=4)


def test_beams_write_the_likeliest_text_found(state_dir: Path) -> None:
    model = offline.load(state_dir)[2]
    best = beam_search(model, list(b"the quick "), 20, beams=8)[0]
    assert generated(state_dir, beams=8) == bytes(best.tokens).decode(errors="replace")
    assert generated(state_dir, beams=8, seed=7) == generated(state_dir, beams=8)


def test_a_folder_writes_what_the_node_does(state_dir: Path, tmp_path: Path) -> None:
    save_folder(offline.load(state_dir)[2], tmp_path / "exported")
    assert generated(tmp_path / "no state", folder=tmp_path / "exported") == generated(state_dir)
    with pytest.raises(CheckpointError, match=r"config.json"):
        generated(state_dir, folder=tmp_path / "nothing")


def test_smaller_tiers_can_be_asked(state_dir: Path) -> None:
    for tier in range(CONFIG.tiers):
        assert generated(state_dir, tier=tier)
    with pytest.raises(ConfigError, match="does not hold tier 4"):
        generated(state_dir, tier=4)


def test_the_loss_of_own_and_agreed_weights(state_dir: Path, text: Path) -> None:
    report = offline.evaluate(state_dir, data=DataSection(paths=(text,)), tiers=None)
    assert set(report["own"]) == set(report["agreed"]) == {"0", "1", "2", "3"}
    assert report["run_id"] == MANIFEST.run_id.hex()
    initial = offline.initial_loss(state_dir, data=DataSection(paths=(text,)), tier=0)
    assert initial == pytest.approx(math.log(CONFIG.vocab_size), abs=0.01)
    assert report["own"]["0"] < initial - 1
    assert report["agreed"]["0"] < initial - 0.2  # not everything was merged, but something
    assert report["agreed"]["0"] != report["own"]["0"]
    assert set(offline.evaluate(state_dir, data=DataSection(paths=(text,)), tiers=(2,))["own"]) == {"2"}


def test_own_weights_are_those_that_were_trained(state_dir: Path) -> None:
    _, saved, model = offline.load(state_dir)
    trainer = make_trainer()
    for _ in range(saved.step):
        trainer.step()
    windows = trainer.batches.held_out(8)
    # The same steps without a swarm, whose merges of one move no weight.
    assert held_out_loss(model, windows) == pytest.approx(held_out_loss(trainer.model, windows), rel=0.02)
    assert SETTINGS.seed == saved.manifest.seed


def test_a_running_daemon_is_not_disturbed(tmp_path: Path, text: Path) -> None:
    root = tmp_path / "state"

    async def live() -> None:
        node = Node(root)
        await node.step(2)
        for _ in range(4):
            await node.slot()
        before = blob_files(root)
        assert offline.evaluate(root, data=DataSection(paths=(text,)), tiers=(0,))["step"] > 2
        assert blob_files(root) == before
        await node.slot()
        await asyncio.to_thread(node.close)

    asyncio.run(live())


def test_agreed_weights_are_the_anchors_to_the_bit(state_dir: Path) -> None:
    store, saved, own = offline.load(state_dir)
    agreed = offline.load_anchors(store, saved)
    for parameter in agreed.parameters():
        units = parameter.detach().double() * 2**20
        assert torch.equal(units, units.round())
    assert any(not torch.equal(a, b) for a, b in zip(agreed.parameters(), own.parameters(), strict=True))


def test_an_empty_directory(tmp_path: Path, text: Path) -> None:
    for state_dir in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StateError, match="start a node there"):
            generated(state_dir)
        with pytest.raises(StateError, match="start a node there"):
            offline.evaluate(state_dir, data=DataSection(paths=(text,)), tiers=None)
    assert not (tmp_path / "absent").exists()


def test_a_node_that_has_only_begun(tmp_path: Path) -> None:
    write_run(tmp_path / "new", 1000, epoch_s=EPOCH_S)
    with pytest.raises(StateError, match="no weights yet"):
        generated(tmp_path / "new")


def test_a_damaged_generation_is_passed_over_and_a_damaged_directory_is_named(state_dir: Path) -> None:
    whole = generated(state_dir)
    *_, newest = sorted((state_dir / "generations").iterdir())
    newest.write_bytes(newest.read_bytes()[:-5])
    assert generated(state_dir)
    assert whole
    for manifest in (state_dir / "generations").iterdir():
        manifest.write_text("{}")
    with pytest.raises(StateError, match=r"no generation in .* can be read"):
        generated(state_dir)
    assert len(list((state_dir / "generations").iterdir())) >= 2  # who only looks repairs nothing
