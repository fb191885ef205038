"""What delay.py compares: updates that come late, and peers that are slow."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import delay
import numpy as np
import pytest

from braniac.model.config import ModelConfig
from braniac.model.sources import Corpus
from outer.braniac import Braniac
from outer.swarm import Plan

CONFIG = ModelConfig(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64, context=8, matformer_factor=1
)
PLAN = Plan(config=CONFIG, tiers=(0,) * 3, windows=4, steps=2, batch=2, fragments=2, evaluated=4)


@pytest.fixture
def corpus() -> Corpus:
    tokens = np.frombuffer(b"She sells sea shells by the sea shore. " * 200, np.uint8)
    return Corpus("shells", (tokens[:-500],), (tokens[-500:],))


def anchors(swarm: Braniac) -> list[bytes]:
    return [swarm.anchors[index].tobytes() for index in sorted(swarm.anchors)]


def test_no_delay_changes_nothing(corpus: Corpus) -> None:
    plain, late = Braniac(PLAN, corpus), delay.Late(PLAN, corpus, 0)
    plain.run()
    late.run()
    assert anchors(late) == anchors(plain)


def test_a_late_update_moves_anchors_so_many_slots_later(corpus: Corpus) -> None:
    swarm = delay.Late(PLAN, corpus, 3)
    before, moved = anchors(swarm), []
    swarm.run(lambda slot: moved.append(anchors(swarm) != before))
    assert moved[:5] == [False, False, False, True, True]


def test_what_is_under_way_at_the_end_arrives(corpus: Corpus) -> None:
    swarm = delay.Late(replace(PLAN, windows=1), corpus, 5)
    before = anchors(swarm)
    swarm.run()
    assert all(now != then for now, then in zip(anchors(swarm), before, strict=True))


def test_a_slow_peer_trains_less_and_says_so(corpus: Corpus) -> None:
    swarm = delay.Unequal(PLAN, corpus, 1)
    tokens: list[dict[int, int]] = []

    def watched(slot: int) -> dict[int, delay.Offer]:
        found = offers(slot)
        tokens.append({number: offer.contribution.tokens for number, offer in found.items()})
        return found

    offers = swarm.offers
    swarm.offers = watched  # type: ignore[method-assign]
    swarm.run()
    assert [peer.trainer.step_count for peer in swarm.peers] == [8, 8, 2]
    step = PLAN.batch * CONFIG.context
    assert tokens[4] == {0: 2 * step, 1: 2 * step, 2: step}  # the window's steps; in slots 0, 4, ... of the slow one
    assert tokens[3] == {0: 2 * step, 1: 2 * step, 2: 0}


def test_every_case_has_figures(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class Text:
        def load(self, vocabulary: int) -> Corpus:
            return corpus

    monkeypatch.setattr(delay, "default_text", Text)
    monkeypatch.setattr(delay, "Plan", lambda windows: replace(PLAN, windows=1))
    monkeypatch.setattr(sys, "argv", ["delay.py", "--seeds", "2", "--json", "--results", str(tmp_path / "delay")])
    assert delay.main() == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["cases"]) == len(delay.DELAYS) + 2
    assert report["cases"]["0 slots late"]["over_percent"] == 0
    assert all(len(figures["by_seed_percent"]) == 2 for figures in report["cases"].values())
    assert len((tmp_path / "delay" / "delay.csv").read_text().splitlines()) == 1 + 2 * len(report["cases"])
