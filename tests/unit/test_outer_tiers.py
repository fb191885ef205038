"""The questions that tiers.py answers, on losses made up for them."""

from __future__ import annotations

import dataclasses

import pytest
from tiers import FULL, QUARTER, QUESTIONS, SWARMS, Question, answer, measure

from braniac.node.text import default_text
from outer.swarm import Plan

HELP = Question("mixed", "alone", FULL, -0.5, certain=True)


def losses(*pairs: tuple[float, float]) -> dict[str, list[dict[int, float]]]:
    return {"mixed": [{FULL: ours} for ours, _ in pairs], "alone": [{FULL: theirs} for _, theirs in pairs]}


def test_the_difference_is_paired_by_seed_and_its_interval_is_that_of_student() -> None:
    found = answer(HELP, losses((0.98, 1.0), (1.94, 2.0), (3.84, 4.0)))
    assert found["by_seed"] == [-2.0, -3.0, -4.0]
    assert found["percent"] == -3.0
    # t for 2 degrees of freedom is 4.303, the standard error 1/sqrt(3)
    assert found["interval"] == pytest.approx([-3 - 2.484, -3 + 2.484], abs=0.001)
    assert found["met"] is True


def test_help_that_is_not_certain_does_not_meet_its_target() -> None:
    found = answer(HELP, losses((0.9, 1.0), (1.01, 1.0)))
    assert found["percent"] < -0.5
    assert found["met"] is False
    assert answer(dataclasses.replace(HELP, certain=False), losses((0.9, 1.0), (1.01, 1.0)))["met"] is True


def test_too_little_help_does_not_meet_its_target() -> None:
    assert answer(HELP, losses((0.996, 1.0), (0.996, 1.0)))["met"] is False


def test_one_seed_has_no_interval() -> None:
    found = answer(HELP, losses((0.9, 1.0)))
    assert "interval" not in found
    assert found["met"] is True


def test_all_swarms_are_trained_and_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiers.SWARMS", {name: tiers[:3] for name, tiers in SWARMS.items()})
    plan = Plan(windows=1, steps=1, batch=1, fragments=5, evaluated=8)
    report = measure(plan, default_text().load(plan.config.vocab_size), [0], None)
    assert set(report["loss"]) == set(SWARMS)
    assert set(report["loss"]["2_full"]) == {0, 1, QUARTER}
    assert all(report[name]["by_seed"] for name in QUESTIONS)
