"""A folder of results: CSV files, and what they were measured with."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from outer.compare import Outcome, Point
from outer.swarm import Plan


class Results:
    """Made before the first run, so that nothing is computed in vain."""

    def __init__(self, folder: Path) -> None:
        """Raises FileExistsError if there is such a folder: results are never overwritten."""
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            raise FileExistsError(
                f"{folder} exists and would be overwritten: name another folder, or move it."
            ) from None
        self.folder = folder

    def write_about(self, plan: Plan | None, options: Mapping[str, object]) -> None:
        """Date, command, commit, machine, options and, of what is simulated, the plan, as JSON."""
        about = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "commit": _commit(),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "plan": dataclasses.asdict(plan) if plan is not None else None,
            "options": options,
        }
        (self.folder / "about.json").write_text(json.dumps(about, indent=2, default=str) + "\n")

    def add_outcomes(self, name: str, outcomes: Iterable[Outcome]) -> None:
        """One row per run, and one per point of its course in a second file."""
        columns = [field.name for field in dataclasses.fields(Outcome) if field.name != "course"]
        points = [field.name for field in dataclasses.fields(Point)]
        for outcome in outcomes:
            self.add_rows(name, columns, [[getattr(outcome, column) for column in columns]])
            rows = [(outcome.method, outcome.seed, *dataclasses.astuple(point)) for point in outcome.course]
            self.add_rows(f"{name}_course", ("method", "seed", *points), rows)

    def add_rows(self, name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """More rows of a CSV file; a long comparison keeps what it has when it is interrupted."""
        with (self.folder / f"{name}.csv").open("a", newline="") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(header)
            writer.writerows(rows)


def _commit() -> str:
    """Of the working tree that this file is in, with a + if its files differ; `unknown` outside of git."""
    here = str(Path(__file__).parent)

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
