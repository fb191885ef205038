"""`braniac-node convert`: the whole model stays, the narrow ones gain, and what it refuses before it works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from braniac.model.config import ModelConfig
from braniac.model.gpt import GPT
from braniac.model.hf import load_folder, save_folder
from braniac.model.tiers import is_gain
from braniac.node.cli import main

CONFIG = ModelConfig(
    family="llama", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, context=16
)
TEXT = "The quick brown fox jumps over the lazy dog. " * 100


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    """A checkpoint of which the last eight neurons of each layer do nearly all."""
    model, dice = GPT(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=dice) * 0.2 + is_gain(name))
            if ".down_proj." in name:
                p[:56] *= 0.01
                p[56:] *= 20
    save_folder(model, tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "dense"


@pytest.mark.parametrize("ordering", ["activation", "fisher", "norm"])
def test_narrow_widths_compute_what_the_whole_model_does(
    dense: Path, tmp_path: Path, ordering: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    text = str(tmp_path / "text.txt")
    assert main(["convert", str(dense), str(out), "--ordering", ordering, "--data", text, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["widths"] == [64, 32, 16, 8]
    whole, *narrow = result["loss_before"]
    assert all(abs(loss - whole) > 0.03 for loss in narrow)
    assert result["loss_after"] == pytest.approx([whole] * 4, abs=0.005)
    (before, _), (after, _), tokens = load_folder(dense), load_folder(out), torch.arange(12)[None]
    assert torch.allclose(after(tokens), before(tokens), atol=1e-4)
    assert torch.allclose(after(tokens, 8), before(tokens), atol=0.2)
    assert not torch.allclose(before(tokens, 8), before(tokens), atol=1)


def test_people_get_a_table(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(dense), str(tmp_path / "out"), "--data", str(tmp_path / "text.txt")]) == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title == f"{tmp_path / 'out'}, sorted by activation"
    assert header.split() == ["WIDTH", "LOSS", "BEFORE", "AFTER"]
    assert [row.split()[0] for row in rows] == ["64", "32", "16", "8"]


def test_what_would_be_overwritten_or_is_no_whole_model_is_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(dense), str(tmp_path / "text.txt")]) != 0
    assert "text.txt exists: choose another OUT" in capsys.readouterr().err
    save_folder(load_folder(dense)[0], tmp_path / "half", width=32)
    assert main(["convert", str(tmp_path / "half"), str(tmp_path / "out")]) != 0
    assert "half holds 32 of 64 FFN neurons: sort the whole model instead" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
