"""Results on disk: rows of the CSV files of one kind, of all folders, and what each folder was measured with."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braniac.model.config import ModelConfig
from braniac.model.fragments import fragment_table

Row = Mapping[str, str]

ABOUT = ("date", "command", "commit", "machine", "torch", "plan", "options")
"""What must be known of a folder."""


@dataclass(frozen=True)
class Folder:
    """Results of one run of a benchmark."""

    path: Path
    about: Mapping[str, Any]
    """Date, commit, machine, plan, options."""

    def rows(self, name: str) -> list[Row]:
        """Of one of its CSV files; none if there is no such file."""
        path = self.path / f"{name}.csv"
        if not path.exists():
            return []
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    @property
    def parameters(self) -> int:
        """Of the model that was trained."""
        config = ModelConfig.from_dict(self.about["plan"]["config"])
        return sum(fragment.size for fragment in fragment_table(config, config.tiers))

    @property
    def tokens_per_step(self) -> int:
        """Of one peer."""
        plan = self.about["plan"]
        return int(plan["batch"] * plan["config"]["context"])


def folders(root: Path, name: str) -> list[Folder]:
    """Those below `root` that have rows of a kind. Raises ValueError for one that cannot be read."""
    found = []
    for path in sorted(file.parent for file in root.glob(f"*/{name}.csv")):
        try:
            about = json.loads((path / "about.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} holds results without a readable about.json: {error}") from None
        if missing := [key for key in ABOUT if key not in about]:
            raise ValueError(f"{path / 'about.json'} does not say {', '.join(missing)}: add it, or run again")
        found.append(Folder(path, about))
    return found


def grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[str, ...], list[Row]]:
    """Rows with the same values under `keys`, in the order in which those first come."""
    found: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple(row[key] for key in keys)].append(row)
    return dict(found)


def mean(rows: Sequence[Row], key: str) -> float:
    """Of a column; infinite if one of its values is."""
    return statistics.mean(float(row[key]) for row in rows)


def mean_and_spread(rows: Sequence[Row], key: str) -> str:
    """The mean of a column and, of several rows, its standard deviation, as text; or that it diverged."""
    values = [float(row[key]) for row in rows]
    if not all(map(math.isfinite, values)):
        return "diverged"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"
