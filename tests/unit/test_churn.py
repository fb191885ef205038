"""How the churn benchmark judges what it saw."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from braniac.node.swarm_report import Observations

CHURN: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "churn.py"))


def observed(*steps: tuple[float, int]) -> Observations:
    found = Observations()
    found.steps.extend(steps)
    return found


def test_no_time_is_lost_while_steps_are_made() -> None:
    steps = [(0.5 * n, n // 3) for n in range(200)]  # one step in 1.5 s
    assert CHURN["lost_share"](observed(*steps), 0.0, slot_s=2.0) == 0.0
    assert CHURN["steps_per_s"](observed(*steps), 0.0) == pytest.approx(2 / 3, rel=0.02)


def test_a_stall_counts_from_the_end_of_its_first_slot() -> None:
    steps = [(0.5 * n, n) for n in range(101)] + [(50.0 + 0.5 * n, 100 + max(0, n - 20)) for n in range(1, 101)]
    # 10.5 s without a step, of which 2 s are the slot and half a second may be the looker's, in 100 s
    assert CHURN["lost_share"](observed(*steps), 0.0, slot_s=2.0) == pytest.approx(0.08)


def test_memory_is_judged_from_when_it_has_settled() -> None:
    start = [(float(s), 10.0 * s) for s in range(60)]
    flat = [(float(s), 400.0) for s in range(60, 600)]
    assert CHURN["slope_per_h"](start) == 0.0
    assert CHURN["slope_per_h"](start + flat) == pytest.approx(0.0)
    assert CHURN["slope_per_h"]([(float(s), 400.0 + s / 60) for s in range(600)]) == pytest.approx(60.0)
