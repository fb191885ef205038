"""Recipes: what is saved comes back, belongs to one set of weights, and nothing malformed is believed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from braniac.model.budget import Choice, parameter_costs
from braniac.model.config import ModelConfig
from braniac.model.errors import CheckpointError, ConfigError
from braniac.model.gpt import GPT
from braniac.model.mixnmatch import extract
from braniac.model.recipes import Recipe, load_recipe, recipe_of, save_recipe, weights_digest

TOY = ModelConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, context=16)


@pytest.fixture
def model() -> GPT:
    model = GPT(TOY)
    model.init_weights(seed=0)
    return model


@pytest.fixture
def recipe(model: GPT) -> Recipe:
    costs = parameter_costs(TOY)
    choice = Choice(widths=(64, 24), cost=costs.of((64, 24)), expected_loss=1.25)
    return recipe_of(model, costs, choice, budget=20_000, expected_loss=1.5)


def test_what_is_saved_is_loaded(tmp_path: Path, model: GPT, recipe: Recipe) -> None:
    path = tmp_path / "recipe.json"
    save_recipe(path, recipe)
    loaded = load_recipe(path, model)
    assert loaded == recipe
    assert (loaded.width_map, loaded.unit, loaded.budget, loaded.expected_loss) == ((64, 24), "parameters", 20_000, 1.5)
    assert loaded.cost == sum(p.numel() for p in extract(model, loaded.width_map).parameters())


def test_saving_again_replaces_the_file_and_leaves_nothing_else(tmp_path: Path, model: GPT, recipe: Recipe) -> None:
    path = tmp_path / "recipe.json"
    save_recipe(path, recipe)
    changed = dataclasses.replace(recipe, width_map=(8, 8), expected_loss=2.0)
    save_recipe(path, changed)
    assert load_recipe(path, model) == changed
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.json"]


def test_a_recipe_that_cannot_be_written_leaves_nothing(tmp_path: Path, recipe: Recipe) -> None:
    folder = tmp_path / "recipe.json"
    (folder / "kept").mkdir(parents=True)
    for path in (tmp_path / "missing" / "recipe.json", folder):
        with pytest.raises(CheckpointError, match=f"cannot write {path}"):
            save_recipe(path, recipe)
    assert [file.name for file in tmp_path.rglob("*")] == ["recipe.json", "kept"]


def test_a_recipe_for_other_weights_is_refused(tmp_path: Path, model: GPT, recipe: Recipe) -> None:
    path = tmp_path / "recipe.json"
    save_recipe(path, recipe)
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] += 2**-20
    with pytest.raises(CheckpointError) as caught:
        load_recipe(path, model)
    for part in (
        str(path),
        f"universal_sha256 is {recipe.universal_sha256}",
        f"this model's is {weights_digest(model)}",
    ):
        assert part in str(caught.value)


def test_the_digest_is_of_the_weights_alone(model: GPT) -> None:
    own = weights_digest(model)
    longer = GPT(dataclasses.replace(TOY, context=32))
    longer.load_state_dict(model.state_dict())
    assert weights_digest(longer) == own
    assert weights_digest(extract(model, None)) == own
    assert weights_digest(extract(model, (64, 56))) != own
    swapped = GPT(TOY)
    swapped.load_state_dict(model.state_dict())
    first, second = (dict(swapped.named_parameters())[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1))
    with torch.no_grad():
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
    assert weights_digest(swapped) != own


def without(key: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda document: {name: value for name, value in document.items() if name != key}


def having(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda document: {**document, **values}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("width_map"), "its keys are .*; exactly .*'width_map'"),
        (having(tier=1), "its keys are .*'tier'.*; exactly"),
        (having(schema_version=2), "schema_version is 2; 1 is the only one known"),
        (having(schema_version=True), "schema_version is True; 1 is"),
        (having(schema_version="1"), "schema_version is '1'; 1 is"),
        (having(universal_sha256="ab"), "universal_sha256 is 'ab'; 64 lower-case hexadecimal digits"),
        (having(universal_sha256="A" * 64), "universal_sha256 is 'A"),
        (having(universal_sha256="0" * 64), "universal_sha256 is 0000.*load the recipe's own"),
        (having(width_map=64), "width_map is 64; a list of whole numbers"),
        (having(width_map=[64, 24.0]), r"width_map is \[64, 24.0\]; a list of whole numbers"),
        (having(width_map=[64, True]), r"width_map is \[64, True\]; a list of whole numbers"),
        (having(width_map=[64]), "width_map: a width map of 1 widths: give one for each of 2 layers"),
        (having(width_map=[64, 20]), "width_map: an FFN width of 20 .* multiple of 8 from 8 to 64"),
        (having(width_map=[64, 1 << 40]), "width_map: an FFN width of 1099511627776 .* from 8 to 64"),
        (having(unit=""), "unit is ''; 1 to 64 printable characters"),
        (having(unit="\x1b[2J"), "unit is .*printable"),
        (having(budget="20000"), "budget is '20000'; a number is expected"),
        (having(cost=True), "cost is True; a number is expected"),
        (having(cost=20_001), "a recipe's cost is 20001: it must be at most its budget of 20000"),
        (having(expected_loss=None), "expected_loss is None; a number is expected"),
        (having(expected_loss=math.nan), "a recipe's expected_loss is nan: it must be a finite number"),
        (having(budget=math.inf), "a recipe's budget is inf: it must be a finite number"),
        (having(cost=-1), "a recipe's cost is -1: it must be a finite number from 0 on"),
    ],
)
def test_anything_but_a_recipe_is_refused(
    tmp_path: Path, model: GPT, recipe: Recipe, change: Callable[[dict[str, Any]], dict[str, Any]], message: str
) -> None:
    path = tmp_path / "recipe.json"
    save_recipe(path, recipe)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_recipe(path, model)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"[1]", b"{", b"\x80\x04K\x01.", b'{"unit": 1, "unit": 2}', b" " * (1 << 21)])
def test_a_file_that_is_no_object_of_json_is_refused(tmp_path: Path, model: GPT, data: bytes) -> None:
    path = tmp_path / "recipe.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=str(path)):
        load_recipe(path, model)
    with pytest.raises(CheckpointError, match="missing"):
        load_recipe(tmp_path / "other.json", model)


def test_no_recipe_can_hold_numbers_that_make_no_sense(recipe: Recipe) -> None:
    for key, value in (("budget", math.inf), ("cost", math.nan), ("expected_loss", -1.0), ("cost", 20_001)):
        with pytest.raises(ConfigError, match=f"a recipe's {key} is {value}"):
            dataclasses.replace(recipe, **{key: value})
