"""`braniac-node mixnmatch`: choose a width for every layer of a checkpoint under a budget, and keep the choice."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from braniac.model.budget import (
    Choice,
    CostTable,
    choose,
    choose_greedily,
    flop_costs,
    parameter_costs,
    refine,
)
from braniac.model.data import Batches
from braniac.model.gpt import GPT
from braniac.model.hf import load_folder, save_folder
from braniac.model.mixnmatch import (
    Windows,
    checked_candidates,
    controls,
    evaluate_maps,
    extract,
    sensitivities,
)
from braniac.model.profile import measure
from braniac.model.recipes import load_recipe, recipe_of, save_recipe
from braniac.node.commands import table_text
from braniac.node.config import DataSection
from braniac.node.errors import ConfigError
from braniac.node.text import folder_tokenizer, text_source

UNITS = ("parameters", "flops", "seconds")
_WINDOWS = 64  # of the held-out text
_SEED = 0


def choose_map(
    folder: Path,
    *,
    budget: float,
    unit: str,
    length: int | None,
    widths: Sequence[int] | None,
    data: DataSection,
    recipe: Path | None,
    out: Path | None,
    refined: bool = False,
) -> dict[str, Any]:
    """Measure, choose, write recipe and model if asked to; what was found, as for JSON. Raises ModelError, NodeError.

    Beside the chosen map stand the whole model, the greedy choice and the widest equal width that fits, each with its
    loss when the neurons are in random order. `length` is the tokens that a token attends to (flops) or that are timed.
    `refined` goes on from the chosen map with real losses, and keeps what that finds.
    """
    _check_free(out)
    model, _ = load_folder(folder)
    costs = _costs(model, unit, model.config.context if length is None else length, widths)
    costs.check_budget(budget)
    windows = _windows(folder, model, data)
    proxy = sensitivities(model, windows, tuple(costs.layers[0]))
    chosen, greedy = choose(costs, proxy, budget), choose_greedily(costs, proxy, budget)
    kept = refine(model, costs, chosen.widths, budget, windows)[0] if refined else chosen.widths
    maps = {"whole": model.neurons, "chosen": chosen.widths, "greedy": greedy.widths}
    if refined:
        maps["refined"] = kept
    equal = [(width,) * len(model.neurons) for width in sorted(costs.layers[0])]
    if affordable := [widths for widths in equal if costs.of(widths) <= budget]:
        maps["equal"] = affordable[-1]
    rows: list[dict[str, Any]] = [
        {
            "map": name,
            "widths": list(control.widths),
            "cost": costs.of(control.widths),
            "loss": control.loss,
            "expected_loss": proxy.expected_loss(control.widths),
            "permuted_loss": control.permuted_loss,
        }
        for name, control in zip(maps, controls(model, list(maps.values()), windows, _SEED), strict=True)
    ]
    if recipe is not None:
        loss = next(row["loss"] for row in rows if tuple(row["widths"]) == kept)
        choice = Choice(widths=kept, cost=costs.of(kept), expected_loss=proxy.expected_loss(kept))
        save_recipe(recipe, recipe_of(model, costs, choice, budget, expected_loss=loss))
    if out is not None:
        save_folder(extract(model, kept), out, source=folder)
    layers = [{str(width): increase for width, increase in layer.items()} for layer in proxy.layers]
    return {"unit": costs.unit, "budget": budget, "maps": rows, "sensitivities": layers}


def use_recipe(folder: Path, recipe: Path, *, data: DataSection, out: Path | None) -> dict[str, Any]:
    """Measure the model that a recipe makes of a checkpoint, and write it if asked to. Raises ModelError, NodeError."""
    _check_free(out)
    model, _ = load_folder(folder)
    read = load_recipe(recipe, model)
    (loss,) = evaluate_maps(model, [read.width_map], _windows(folder, model, data))
    if out is not None:
        save_folder(extract(model, read.width_map), out, source=folder)
    row = {"map": "recipe", "widths": list(read.width_map), "cost": read.cost, "loss": loss}
    return {"unit": read.unit, "budget": read.budget, "maps": [row | {"expected_loss": read.expected_loss}]}


def mixnmatch_text(result: Mapping[str, Any]) -> str:
    """A table of the maps; losses in nats per token, costs in the unit that the budget has."""
    header = ["MAP", "LOSS", "EXPECTED", "PERMUTED", "COST", "WIDTHS"]
    rows = [
        [
            row["map"],
            f"{row['loss']:.4f}",
            f"{row['expected_loss']:.4f}",
            f"{row['permuted_loss']:.4f}" if "permuted_loss" in row else "-",
            f"{row['cost']:,.10g}",
            ",".join(map(str, row["widths"])),
        ]
        for row in result["maps"]
    ]
    return f"budget {result['budget']:,.10g} {result['unit']}\n{table_text(header, rows)}"


def _costs(model: GPT, unit: str, length: int, widths: Sequence[int] | None) -> CostTable:
    candidates = checked_candidates(model.config, widths)
    match unit:
        case "parameters":
            return parameter_costs(model.config, candidates)
        case "flops":
            return flop_costs(model.config, length, candidates)
        case "seconds":
            return measure(model, candidates, [length], clock=time.perf_counter).cost_table(length)
    raise ConfigError(f"there is no unit {unit!r}: choose one of {', '.join(UNITS)}")


def _windows(folder: Path, model: GPT, data: DataSection) -> Windows:
    corpus = text_source(data, folder_tokenizer(folder, model.config, data)).load(model.config.vocab_size)
    return Batches(corpus, _SEED, b"evaluation", model.config.context, 1).held_out(_WINDOWS)


def _check_free(out: Path | None) -> None:
    if out is not None and os.path.lexists(out):  # now, lest it fail after minutes
        raise ConfigError(f"{out} exists: choose another --out")
