"""Fifty seeds of everything at once: no invariant is ever broken, and every swarm recovers. More: `make sim`."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.sim.world import simulate

ROOT = Path(__file__).parents[2]
BENCHMARK: dict[str, Any] = runpy.run_path(str(ROOT / "benchmarks" / "sim.py"))
SEEDS_PER_TEST = 25
FAULTS = {
    "clock drift",
    "clock jump",
    "clock offset",
    "corruption",
    "crash (kill)",
    "crash (power)",
    "crash (reorder)",
    "disk full",
    "duplication",
    "leave",
    "loss",
    "lost write",
    "one-way partition",
    "partition",
    "pause",
    "reorder",
    "rest",
    "slow message",
    "torn write",
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("first", [0, SEEDS_PER_TEST])
def test_seeds(first: int) -> None:
    """The faults must have happened, too: what never fires tests nothing."""
    fired: Counter[str] = Counter()
    failures = []
    for seed in range(first, first + SEEDS_PER_TEST):
        outcome = simulate(seed)
        fired.update(outcome.fired)
        if not outcome.good:
            failures.append(BENCHMARK["describe"](outcome))
        assert outcome.checked > 0
        assert outcome.certificates > 0
    assert not failures, "\n".join(failures)
    assert {fault for fault, count in fired.items() if count} == FAULTS


@pytest.mark.timeout(600)
def test_a_seed_is_the_same_run_under_any_hash_seed() -> None:
    """Sets of bytes and strings have another order in each of these processes; nothing may depend on it."""
    traces = set()
    for hash_seed in ("0", "1", "4711"):
        command = [sys.executable, "benchmarks/sim.py", "--seeds", "3", "--first", "26", "--json"]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True, text=True)
        traces.add(json.loads(ran.stdout.splitlines()[-1])["trace"])
    assert len(traces) == 1
