"""A recipe: the width map that was chosen for one universal checkpoint, as a small JSON file anybody may have written.

    {"schema_version": 1, "universal_sha256": "<64 hex>", "width_map": [512, 256], "unit": "parameters",
     "budget": 400000, "cost": 393472, "expected_loss": 2.31}

It belongs to weights, not to a file: the digest is of the tensors, so another sharding or folder changes nothing, and
one more training step changes everything, since neither the choice nor the expected loss would still be true.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from braniac.model.budget import Choice, CostTable
from braniac.model.checkpoint_files import read_json, scratch_beside, sync_directory, write_durably
from braniac.model.errors import CheckpointError, ConfigError
from braniac.model.gpt import GPT

SCHEMA_VERSION = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_UNIT = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What to cut from which weights, and why. Raises ConfigError for numbers that make no sense."""

    universal_sha256: str
    """`weights_digest` of the model that the map was chosen for."""

    width_map: tuple[int, ...]
    """FFN neurons per layer."""

    unit: str
    """Of budget and cost."""

    budget: float
    """What the map was allowed to cost."""

    cost: float
    """What it costs."""

    expected_loss: float
    """Held-out loss to expect, nats per token."""

    def __post_init__(self) -> None:
        for key in ("budget", "cost", "expected_loss"):
            if not 0 <= getattr(self, key) < math.inf:  # NaN fails the comparison too
                raise ConfigError(f"a recipe's {key} is {getattr(self, key)}: it must be a finite number from 0 on.")
        if self.cost > self.budget:
            raise ConfigError(f"a recipe's cost is {self.cost}: it must be at most its budget of {self.budget}.")


def weights_digest(model: GPT) -> str:
    """SHA-256 of all tensors with their names and shapes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, p in model.named_parameters():
        digest.update(f"{name}\0{list(p.shape)}\0".encode())
        digest.update(p.detach().cpu().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def recipe_of(model: GPT, costs: CostTable, choice: Choice, budget: float, expected_loss: float) -> Recipe:
    """The recipe of a choice for `model`; `expected_loss` is the proxy's, or better the measured one."""
    return Recipe(
        universal_sha256=weights_digest(model),
        width_map=choice.widths,
        unit=costs.unit,
        budget=budget,
        cost=choice.cost,
        expected_loss=expected_loss,
    )


def save_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe in place of what was there, durably; a reader never sees half of it. Raises CheckpointError."""
    document = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(recipe)}
    with scratch_beside(path) as scratch:
        write_durably(scratch / path.name, json.dumps(document, indent=2, allow_nan=False).encode() + b"\n")
        (scratch / path.name).replace(path)
        sync_directory(path.parent)


def load_recipe(path: Path, model: GPT) -> Recipe:
    """Read a recipe and check it against the model it is to be used on.

    Raises CheckpointError naming the file, the key and what was expected, for another model's too.
    """
    document = read_json(path)
    keys = ["schema_version", *(field.name for field in dataclasses.fields(Recipe))]
    if document.keys() != set(keys):
        _refuse(path, f"its keys are {sorted(document)}", f"exactly {sorted(keys)} are expected")
    version = document["schema_version"]
    if type(version) is not int or version != SCHEMA_VERSION:
        _refuse(path, f"schema_version is {version!r}", f"{SCHEMA_VERSION} is the only one known")
    try:
        recipe = Recipe(
            universal_sha256=_digest(path, document["universal_sha256"]),
            width_map=_width_map(path, document["width_map"], model),
            unit=_unit(path, document["unit"]),
            **{key: _number(path, key, document[key]) for key in ("budget", "cost", "expected_loss")},
        )
    except ConfigError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    if recipe.universal_sha256 != (own := weights_digest(model)):
        given = recipe.universal_sha256
        _refuse(path, f"universal_sha256 is {given}", f"this model's is {own}: load the recipe's own, or choose anew")
    return recipe


def _digest(path: Path, value: object) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        _refuse(path, f"universal_sha256 is {value!r}", "64 lower-case hexadecimal digits are expected")
    return value


def _unit(path: Path, value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_UNIT or not value.isprintable():
        _refuse(path, f"unit is {value!r}", f"1 to {_MAX_UNIT} printable characters are expected")
    return value


def _width_map(path: Path, value: object, model: GPT) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(width) is not int for width in value):
        _refuse(path, f"width_map is {value!r}", "a list of whole numbers, one per layer, is expected")
    try:
        return model.held_widths(value)
    except ConfigError as error:
        raise CheckpointError(f"{path} cannot be used: width_map: {error}") from error


def _number(path: Path, key: str, value: object) -> float:
    if not isinstance(value, int | float) or type(value) is bool:
        _refuse(path, f"{key} is {value!r}", "a number is expected")
    return value


def _refuse(path: Path, found: str, remedy: str) -> NoReturn:
    raise CheckpointError(f"{path} cannot be used: {found}; {remedy}.")
