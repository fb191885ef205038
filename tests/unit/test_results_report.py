"""Pictures and the report, from results that are made up, and from those in the repository."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict
from pathlib import Path

import plots
import pytest
import report

from outer import tables
from outer.swarm import MICRO, Plan

COURSE = ("method", "seed", "step", "loss", "bytes_per_peer", "link_s")
OUTCOME = (
    *("method", "seed", "rate", "outer_rate", "missing_percent"),
    *("loss", "bytes_per_peer", "downlink_bytes_per_peer"),
)
BURST = ("method", "second", "mean_bytes", "busiest_bytes")
TIERS = ("swarm", "seed", "tier", "loss")
ROUND = ("system", "parameters", "seconds", "bytes_per_peer", "cpu_s_per_peer")
KILLS = ("system", "hung", "lost_s", "agree_percent")


def write(root: Path, folder: str, name: str, header: tuple[str, ...], *rows: tuple[object, ...]) -> None:
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    about = {"date": "2026-11-22T12:00:00+00:00", "command": "python benchmarks/x.py --quick", "commit": "abc"}
    about |= {
        "machine": "a machine",
        "torch": "2",
        "plan": asdict(Plan(config=MICRO)),
        "options": {"quick": folder == "drops"},
    }
    (path / "about.json").write_text(json.dumps(about))
    with (path / f"{name}.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for seed, shift in ((0, 0.0), (1, 0.2)):
        write(tmp_path, f"more{seed}", "loss_bytes_course", COURSE, ("ddp", seed, 4, 3 + shift, 1e6, 1.0))
    write(
        tmp_path,
        "loss_bytes",
        "loss_bytes",
        OUTCOME,
        ("diloco", 0, 1, 1, 0, 2.0, 4000, 4000),
        ("diloco", 1, 1, 1, 0, 2.2, 4000, 4000),
        ("braniac", 0, 1, 2, 0, 2.1, 40, 40),
        ("braniac", 1, 1, 2, 0, 2.31, 40, 40),
        ("muloco", 0, 1, 1, 0, "inf", 400, 400),
    )
    write(tmp_path, "drops", "drops", OUTCOME, *(("braniac", 0, 1, 1, p, 2 + p / 100, 1, 1) for p in (0, 25)))
    write(tmp_path, "burst", "burst", BURST, ("braniac", 0, 5, 20), ("braniac", 1, 15, 15))
    write(tmp_path, "tiers", "tiers", TIERS, ("2_full", 0, 0, 2), ("2_full_6_half", 0, 0, 1.9))
    write(tmp_path, "round", "round", ROUND, ("hivemind_float16", 1000, 1.5, 3000, 0.7))
    write(tmp_path, "round", "round_kills", KILLS, ("hivemind_float16", 3, "", ""), ("braniac", 0, 2.0, 100))
    return tmp_path


def test_every_figure_of_the_report_comes_from_the_tables(results: Path) -> None:
    text = report.text(results)
    assert "| diloco | 2.100 ± 0.141 | 4 kB | 4 kB | 1, 1 |" in text
    assert "| muloco | diverged |" in text
    assert "loss +5.0% against diloco, with 1/100 of its bytes" in text
    assert "loss +12.5% when 25% of the peers drop out of every exchange; a quick run, too short to judge |" in text
    assert "a quick run" not in text.replace("exchange; a quick run", "")
    assert "81,920 parameters, 7,680 tokens per peer, 2 seed(s)." in text
    assert "busiest second 2.0 times the mean" in text
    assert "full-width loss -5.00% against 2 full peers alone (2_full_6_half)" in text
    assert "| hivemind_float16 | 1.5 s | 3 kB | 3 | 0.70 s | 3 hung | - |" in text
    assert "one of four killed: at most 2.0 s without a certificate, survivors agree on 100%" in text
    assert "`python benchmarks/x.py --quick`" in text


def test_what_was_not_measured_has_no_figure(tmp_path: Path) -> None:
    text = report.text(tmp_path)
    assert text.count("**not measured yet**") == len(report.CLAIMS)
    assert text.count("Not measured yet: ") == len(report.SECTIONS)
    assert "%" not in text


def test_pictures_are_drawn_of_what_there_is(results: Path) -> None:
    drawn = dict(plots.draw(results))
    assert all(path is not None and path.read_bytes().startswith(b"\x89PNG") for path in drawn.values())
    for path in results.glob("more*/*.csv"):
        path.unlink()
    assert dict(plots.draw(results))["loss_against_bytes"] is None
    assert not (results / "loss_against_bytes.png").exists()


def test_who_trains_while_sending_waits_for_the_longer_of_the_two() -> None:
    assert plots.hours("diloco", 36, 3.6, 1_000_000) == 2
    assert plots.hours("braniac_at_demo", 36, 3.6, 1_000_000) == 1
    assert plots.hours("streaming_diloco", 36, 7.2, 1_000_000) == 2


def test_results_of_unknown_origin_are_named(results: Path) -> None:
    (results / "drops" / "about.json").write_text("no")
    with pytest.raises(ValueError, match=r"drops holds results without a readable about.json"):
        tables.folders(results, "drops")


def test_results_without_their_command_are_named(results: Path) -> None:
    path = results / "drops" / "about.json"
    about = json.loads(path.read_text())
    del about["command"]
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"about.json does not say command: add it"):
        tables.folders(results, "drops")


def test_without_matplotlib_a_sentence_says_what_to_install(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit, match="pip install"):
        list(plots.draw(results))


def test_a_folder_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plots.py", "--results", "nowhere"])
    with pytest.raises(SystemExit, match="2"):
        plots.main()
    assert "nowhere is no folder" in capsys.readouterr().err


def test_the_report_in_the_repository_is_up_to_date() -> None:
    assert report.TARGET.read_text("utf-8") == report.text(report.RESULTS), "run python benchmarks/report.py"


def test_pictures_in_the_report_are_in_the_repository() -> None:
    text = report.TARGET.read_text("utf-8")
    for picture in {name for part in report.SECTIONS for name in part.pictures}:
        assert (f"results/{picture}.png" in text) == (report.RESULTS / f"{picture}.png").exists()
