"""`braniac-node mixnmatch`: what it prints and writes, and what it refuses before it measures anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from braniac.model.config import ModelConfig
from braniac.model.gpt import GPT
from braniac.model.hf import load_folder, save_folder
from braniac.model.tiers import is_gain, parameter_count
from braniac.node.cli import main

CONFIG = ModelConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, context=16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose every matrix matters."""
    model, dice = GPT(CONFIG), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=dice) * 0.2 + is_gain(name))
    save_folder(model, tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 50)
    return path


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["mixnmatch", *arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_map_is_chosen_kept_and_used_again(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out, again = (tmp_path / name for name in ("recipe.json", "mixed", "again"))
    budget = parameter_count(CONFIG, 1)
    common = [str(folder), "--data", str(text)]
    result = run([*common, "--budget", str(budget), "--recipe", str(recipe), "--out", str(out)], capsys)
    maps = {row["map"]: row for row in result["maps"]}
    assert list(maps) == ["whole", "chosen", "greedy", "equal"]
    assert maps["equal"]["widths"] == [32, 32]
    assert maps["whole"]["cost"] == parameter_count(CONFIG, 0) > budget >= maps["chosen"]["cost"]
    assert maps["chosen"]["expected_loss"] <= min(maps[name]["expected_loss"] for name in ("greedy", "equal"))
    assert maps["whole"]["permuted_loss"] == pytest.approx(maps["whole"]["loss"], rel=1e-5)
    assert [sorted(map(int, layer)) for layer in result["sensitivities"]] == [[8, 16, 24, 32, 48, 64]] * 2

    written, _ = load_folder(out)
    assert list(written.neurons) == maps["chosen"]["widths"]
    assert sum(p.numel() for p in written.parameters()) == maps["chosen"]["cost"]
    used = run([*common, "--use", str(recipe), "--out", str(again)], capsys)["maps"][0]
    assert used["widths"] == maps["chosen"]["widths"]
    assert used["loss"] == used["expected_loss"] == maps["chosen"]["loss"]
    assert load_folder(again)[0].neurons == written.neurons


def test_a_refined_map_is_no_worse_and_is_what_is_kept(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, budget = tmp_path / "recipe.json", parameter_count(CONFIG, 1)
    common = [str(folder), "--data", str(text)]
    result = run([*common, "--budget", str(budget), "--refine", "--recipe", str(recipe), "--widths", "8,32,64"], capsys)
    maps = {row["map"]: row for row in result["maps"]}
    assert list(maps) == ["whole", "chosen", "greedy", "refined", "equal"]
    assert maps["refined"]["cost"] <= budget
    assert maps["refined"]["loss"] <= maps["chosen"]["loss"]
    assert run([*common, "--use", str(recipe)], capsys)["maps"][0]["widths"] == maps["refined"]["widths"]


@pytest.mark.parametrize("unit", ["flops", "seconds"])
def test_flops_and_seconds_are_budgets_too(
    folder: Path, text: Path, unit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(folder), "--data", str(text), "--unit", unit, "--length", "8", "--widths", "8,64"]
    result = run([*arguments, "--budget", "1e12"], capsys)
    assert result["unit"] == {"flops": "FLOPs per token", "seconds": "seconds for 8 tokens"}[unit]
    whole, chosen = result["maps"][:2]
    assert 0 < chosen["cost"] <= result["budget"]
    assert chosen["expected_loss"] <= whole["expected_loss"]


def test_without_json_it_prints_a_table(folder: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mixnmatch", str(folder), "--data", str(text), "--budget", "20000", "--widths", "8,64"]) == 0
    first, header, whole, *rows = capsys.readouterr().out.splitlines()
    assert first == "budget 20,000 parameters"
    assert header.split() == ["MAP", "LOSS", "EXPECTED", "PERMUTED", "COST", "WIDTHS"]
    assert whole.split()[0] == "whole"
    assert whole.split()[-2:] == ["14,336", "64,64"]
    assert [row.split()[0] for row in rows] == ["chosen", "greedy", "equal"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "either a --budget to choose a map for or a recipe to --use"),
        (["--budget", "1", "--use", "x"], 2, "either a --budget"),
        (["--budget", "1"], 2, "a budget of 1 parameters allows no width map: give at least 10752"),
        (["--budget", "1", "--unit", "euros"], 2, "there is no unit 'euros': choose one of parameters, flops, seconds"),
        (["--budget", "1", "--widths", "12"], 2, "width of 12 is none of this model's"),
        (["--budget", "1", "--unit", "flops", "--length", "17"], 2, "attend to 17 tokens: choose from 1 to 16"),
        (["--budget", "nan"], 2, "a budget of nan parameters allows no width map"),
        (["--use", "missing.json"], 1, "missing.json is missing or no file"),
        (["--budget", "20000", "--out", "."], 2, ". exists: choose another --out"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    folder: Path, text: Path, arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["mixnmatch", str(folder), "--data", str(text), *arguments]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_an_impossible_budget_leaves_no_file(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    outputs = ["--recipe", str(tmp_path / "recipe.json"), "--out", str(tmp_path / "mixed")]
    assert main(["mixnmatch", str(folder), "--data", str(text), "--budget", "10751", *outputs]) == 2
    assert sorted(tmp_path.iterdir()) == before
