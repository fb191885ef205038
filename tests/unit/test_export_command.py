"""`export`: folders, tiers and GGUF files from a checkpoint folder and from a node's state directory."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from braniac.model.config import ModelConfig
from braniac.model.gpt import GPT
from braniac.model.hf import load_folder, load_tier, save_folder
from braniac.node import offline
from braniac.node.cli import app
from tests.unit.solo_node import Node

LLAMA = ModelConfig(
    family="llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, context=16
)


def export(*args: object) -> dict[str, object]:
    result = CliRunner().invoke(app, ["export", *map(str, args), "--json"])
    if result.exception is not None:
        raise result.exception
    written: dict[str, object] = json.loads(result.output)
    return written


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, dice = GPT(LLAMA), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=dice) * 0.2)
    save_folder(model, tmp_path / "source")
    return tmp_path / "source"


def test_a_tier_or_a_width_of_a_folder(folder: Path, tmp_path: Path) -> None:
    whole, _ = load_folder(folder)
    tokens = torch.arange(12)[None]
    assert export(tmp_path / "a", "--folder", folder, "--tier", 2)["width"] == 32
    assert export(tmp_path / "b", "--folder", folder, "--width", 48)["width"] == 48
    for name, width in (("a", 32), ("b", 48)):
        part, held = load_folder(tmp_path / name)
        assert held.width == width
        assert torch.allclose(part(tokens), whole(tokens, width), atol=1e-5)


def test_tiers_come_as_siblings_with_a_manifest(folder: Path, tmp_path: Path) -> None:
    export(tmp_path / "all", "--folder", folder, "--tiers", "1,3", "--dtype", "bf16")
    assert {path.name for path in tmp_path.glob("all*")} == {"all", "all-tier1", "all-tier3"}
    assert load_tier(tmp_path / "all", 3, "sliced")[0].width == 16


def test_a_gguf_file(folder: Path, tmp_path: Path) -> None:
    export(tmp_path / "model.gguf", "--folder", folder, "--format", "gguf", "--tier", 1, "--dtype", "f16")
    assert (tmp_path / "model.gguf").read_bytes().startswith(b"GGUF")


def test_what_a_node_has(tmp_path: Path) -> None:
    async def live() -> None:
        node = Node(tmp_path / "state")
        await node.step(5)
        for _ in range(8):
            await node.slot()
        await node.step(2)
        await node.commit()
        await asyncio.to_thread(node.close)

    asyncio.run(live())
    store, saved, own = offline.load(tmp_path / "state")
    agreed = offline.load_anchors(store, saved)
    tokens = torch.arange(8)[None]
    for weights, model in (("agreed", agreed), ("own", own)):
        export(tmp_path / weights, "--state-dir", tmp_path / "state", "--weights", weights)
        assert torch.equal(load_folder(tmp_path / weights)[0](tokens), model(tokens))
    assert not torch.equal(own(tokens), agreed(tokens))


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--tier", "1", "--width", "64"], "exclude each other"),
        (["--tiers", "1", "--format", "gguf"], "holds one width"),
        (["--dtype", "bf16", "--format", "gguf"], "f32 or f16"),
        (["--tier", "4"], "tier 4 does not exist"),
        (["--width", "50"], "a multiple of 16"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(
    folder: Path, tmp_path: Path, args: list[str], sentence: str
) -> None:
    with pytest.raises(Exception, match=sentence):
        export(tmp_path / "out", "--folder", folder, *args)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_target_stays_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    export(tmp_path / "out", "--folder", folder, "--tier", 1)
    with pytest.raises(Exception, match="exists"):
        export(tmp_path / "out", "--folder", folder, "--tier", 2)
    assert load_folder(tmp_path / "out")[0].width == 64
    export(tmp_path / "out", "--folder", folder, "--tier", 2, "--overwrite")
    assert load_folder(tmp_path / "out")[0].width == 32
