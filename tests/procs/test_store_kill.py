"""The durability benchmark in short: a process that saves in a loop is killed again and again, and nothing is lost."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

BENCHMARK: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "durability.py"))


def test_sigkill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    found = BENCHMARK["torture"](tmp_path, kills=20, seed=0)
    assert (found["lost"], found["torn"], found["mixed"]) == (0, 0, 0)
    assert found["saves"] > 0
