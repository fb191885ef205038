"""The comparing scripts: what they print and write, what they refuse, and how they judge."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import burst
import drops
import loss_bytes
import numpy as np
import pytest

from braniac.model.config import ModelConfig
from braniac.model.errors import TrainingDiverged
from braniac.model.sources import Corpus
from outer import command
from outer.budget import expected_traffic, within
from outer.compare import Contest, Outcome, rates_for, sweep, sweeps, workers
from outer.dense import DiLoCo
from outer.swarm import Plan

CONFIG = ModelConfig(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64, context=8, matformer_factor=1
)
PLAN = Plan(config=CONFIG, tiers=(0, 0), windows=2, steps=2, batch=2, fragments=2, evaluated=4)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to train on; --quick is smaller than usual."""
    monkeypatch.setattr(command, "QUICK", PLAN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("She sells sea shells by the sea shore. " * 200)
    return path


def started(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *arguments: object) -> int:
    """Exit code of a script."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, arguments)])
    return int(script.main())


def test_loss_and_bytes_of_every_method_are_printed_and_kept(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results"
    options = ("--quick", "--json", "--data", text, "--results", folder, "--outer-rates", "braniac=1,2")
    options += ("--down", "256")  # more would not fit the few bytes of DisTrO
    assert started(monkeypatch, loss_bytes, *options) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(report["methods"]) == 10 + 4
    for rival, (_, ratio) in loss_bytes.RIVALS.items():
        ours, theirs = report["methods"][f"braniac_at_{rival}"], report["methods"][rival]
        assert ratio * ours["traffic_per_peer"] <= theirs["traffic_per_peer"]
    for name, figures in report["methods"].items():
        assert 0 < figures["loss"] < 6, name
        assert figures["bytes_per_peer"] > 0, name
    assert report["tokens_per_peer"] == 2 * 2 * 2 * 8
    with (folder / "loss_bytes.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["diloco"]["loss"]) == pytest.approx(report["methods"]["diloco"]["loss"], abs=1e-5)
    with (folder / "sweep.csv").open() as file:
        tried = Counter(row["method"] for row in csv.DictReader(file))
    assert tried["diloco"] == 1
    assert tried["braniac"] == 2  # outer rates
    with (folder / "loss_bytes_course.csv").open() as file:
        course = [row for row in csv.DictReader(file) if row["method"] == "diloco"]
    assert [int(row["step"]) for row in course] == [2, 4]
    assert float(course[-1]["loss"]) == float(rows["diloco"]["loss"])
    assert float(course[-1]["bytes_per_peer"]) == float(rows["diloco"]["bytes_per_peer"])
    about = json.loads((folder / "about.json").read_text())
    assert about["plan"]["batch"] == 2
    assert {"date", "commit", "machine"} <= about.keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "diloko"], "did you mean diloco"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--rates", "fast"], "no list of rates"),
        (["--rates", "0,1"], "no list of rates"),
        (["--outer-rates", "dilocco=1"], "not compared"),
        (["--seeds", "0"], "not a whole number from 1 on"),
        (["--up", "4097"], "'4097' is more than 4096"),
        (["--peers", "257"], "'257' is more than 256"),
        (["--outer-rates", "1,8"], "an outer step between 1/64 and 4"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    text: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        started(monkeypatch, loss_bytes, "--quick", "--data", text, "--results", tmp_path / "results", *arguments)
    out, error = capsys.readouterr()
    assert message in error.splitlines()[-1]
    assert not out
    assert not (tmp_path / "results").exists()


def test_a_step_that_is_too_large_for_braniac_is_none_of_the_others_business(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--quick", "--data", text, "--methods", "averaging", "--outer-rates", "8")
    assert started(monkeypatch, loss_bytes, *options) == 0


def test_results_are_not_overwritten(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        started(monkeypatch, loss_bytes, "--quick", "--data", text, "--results", tmp_path)
    assert "would be overwritten" in capsys.readouterr().err


def test_too_few_tokens_are_refused(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text.write_text("short")
    with pytest.raises(SystemExit, match="2"):
        started(monkeypatch, loss_bytes, "--quick", "--data", text)
    assert "tokens for training" in capsys.readouterr().err


def test_a_burst_is_h_times_the_mean_for_who_talks_every_h_steps(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--quick", "--json", "--data", text, "--methods", "ddp,diloco", "--results", tmp_path / "burst")
    assert started(monkeypatch, burst, *options) == 0
    methods = json.loads(capsys.readouterr().out.splitlines()[-1])["methods"]
    assert methods["ddp"]["peak_to_mean"] == 1
    assert methods["diloco"]["peak_to_mean"] == PLAN.steps
    assert methods["diloco"]["peak_bytes_per_s"] == methods["ddp"]["peak_bytes_per_s"]
    lines = (tmp_path / "burst" / "burst.csv").read_text().splitlines()
    assert lines[1:6:4] == ["ddp,0,229376.0,229376", "diloco,0,0.0,0"]


def test_drops_cost_who_throws_work_away(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drops, "PERCENTS", (0, 100))
    options = ("--quick", "--json", "--data", text, "--methods", "averaging,diloco_torchft,braniac")
    assert started(monkeypatch, drops, *options) == 0
    methods = json.loads(capsys.readouterr().out.splitlines()[-1])["methods"]
    start = math.log(256)  # nothing was ever agreed on
    for name, figures in methods.items():
        assert figures["loss"]["0"] < start, name
        assert figures["loss"]["100"] == pytest.approx(start, abs=1e-3)
        assert figures["over_percent"]["100"] > 0


def test_a_diverged_run_with_drops_has_no_figure(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drops, "PERCENTS", (0, 25))
    monkeypatch.setattr(drops, "METHODS", {"braniac": Flaky})
    assert started(monkeypatch, drops, "--quick", "--json", "--data", text, "--methods", "braniac") == 0
    figures = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["methods"]["braniac"]
    assert figures == {"loss": {"0": 4.0, "25": None}, "over_percent": {"0": 0.0, "25": None}, "diverged": True}
    assert drops.missed({"braniac": drops.figures({0: 4.0, 25: math.inf})}) == ["25%"]
    assert drops.missed({"braniac": drops.figures({0: 4.0, 25: 4.01})}) == []
    assert drops.missed({"braniac": drops.figures({0: math.inf, 25: 4.01})}) == ["25%"]


def test_judging_looks_at_losses_and_bytes() -> None:
    good = {"loss": 1.0, "traffic_per_peer": 10}
    dense, equal = {"loss": 1.0, "traffic_per_peer": 1500}, {"loss": 1.1, "traffic_per_peer": 10}
    assert loss_bytes.missed({"braniac_at_diloco": good, "diloco": dense, "demo": equal, "braniac_at_demo": good}) == []
    assert loss_bytes.missed({"diloco": dense}) == []
    assert loss_bytes.missed({"braniac_at_diloco": good, "diloco": {**dense, "loss": 0.98}}) == ["loss of diloco"]
    assert loss_bytes.missed({"braniac_at_diloco": good, "diloco": {**dense, "traffic_per_peer": 1499}}) == [
        "bytes of diloco"
    ]
    assert loss_bytes.missed({"braniac_at_demo": {**good, "traffic_per_peer": 11}, "demo": equal}) == ["bytes of demo"]
    assert loss_bytes.missed({"braniac_at_demo": {**good, "loss": 1.2}, "demo": equal}) == ["loss of demo"]
    assert loss_bytes.missed({"braniac_at_diloco": good, "demo": {"diverged": True}}) == ["demo diverged"]


def test_other_processes_find_the_same() -> None:
    tokens = np.arange(400, dtype=np.uint8)
    corpus = Corpus("numbers", (tokens,), (tokens,))
    contests = [Contest(rates, DiLoCo, [PLAN], [1, 2], [1, 0.5]) for rates in ("a", "b")]
    with workers(1) as here, workers(2) as there:
        one, other = (list(sweeps(contests, corpus, range(2), do)) for do in (here, there))
    for mine, theirs in zip(one, other, strict=True):
        for outcome, same in zip(mine.tried + mine.best, theirs.tried + theirs.best, strict=True):
            assert dataclasses.replace(outcome, cpu_s=0) == dataclasses.replace(same, cpu_s=0)


def test_plans_fill_the_traffic_that_a_rival_takes() -> None:
    plan = replace(PLAN, windows=60, steps=10, tiers=(0,) * 8)
    usual = expected_traffic(plan)
    for budget in (usual / 4, usual, 20 * usual):
        plans = within(plan, budget)
        for each in plans:
            assert each.total_steps == plan.total_steps
            assert 0.7 * budget < expected_traffic(each) <= budget
        windows = [each.windows for each in plans]
        assert windows == sorted(set(windows), reverse=True), "the more values, the fewer windows"
    assert within(plan, usual / 10_000) == []


def test_rates_for_one_method_count_more_than_those_for_all() -> None:
    assert rates_for([], ["a", "b"]) == {"a": [1.0], "b": [1.0]}
    assert rates_for(["a=4", "0.5,1"], ["a", "b"]) == {"a": [4.0], "b": [0.5, 1.0]}


class Fake(DiLoCo):
    """A method whose loss is known."""

    def train(self, slot: int) -> None:
        if self.plan.rate > 4:
            raise TrainingDiverged("too fast.")

    def loss(self) -> float:
        return abs(self.plan.rate - 2) + abs(self.plan.outer_rate - 3) + 0.1 * self.plan.seed


class Flaky(DiLoCo):
    """A method that diverges if anybody drops out."""

    def train(self, slot: int) -> None:
        if self.plan.missing_percent:
            raise TrainingDiverged("too few.")

    def loss(self) -> float:
        return 4.0


def test_a_sweep_takes_the_best_rates_to_the_other_seeds() -> None:
    tokens = np.zeros(400, np.uint8)
    corpus = Corpus("zeros", (tokens,), (tokens,))
    found = sweep(Contest("fake", Fake, [PLAN], [1, 2, 8], [4, 3]), corpus, range(3))
    assert [(o.rate, o.outer_rate) for o in found.tried] == [(1, 4), (2, 4), (8, 4), (2, 3)]
    assert {(o.rate, o.outer_rate) for o in found.best} == {(2, 3)}
    assert found.summary()["loss_by_seed"] == [0.0, 0.1, 0.2]
    hopeless: Any = sweep(Contest("fake", Fake, [PLAN], [8], [1]), corpus, range(1)).summary()
    assert "loss" not in hopeless
    assert hopeless["diverged"]
    assert all(isinstance(outcome, Outcome) for outcome in found.tried)
