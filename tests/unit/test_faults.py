"""Schedules of faults: what a text asks for, and that a seed decides the rest."""

from __future__ import annotations

import random

import pytest

from braniac.node.errors import ConfigError
from braniac.node.faults import KINDS, Wish, check_possible, draw, parse


def drawn(text: str, seed: int = 0, nodes: int = 7) -> list[tuple[object, ...]]:
    faults = draw(parse(text), nodes, 100.0, 2.0, random.Random(seed))
    return [(f.kind, f.at_s, f.lasts_s, f.nodes, f.owner) for f in faults]


def test_what_is_asked_for() -> None:
    assert parse("kill, pause:90") == (Wish("kill"), Wish("pause", 90.0))
    assert parse("") == ()
    assert [wish.kind for wish in parse(",".join(KINDS))] == list(KINDS)


@pytest.mark.parametrize("text", ["flood", "pause:", "pause:x", "pause:0", "pause:-1", "pause:90:1", "kill;pause"])
def test_what_is_no_fault(text: str) -> None:
    with pytest.raises(ConfigError, match="write one of kill, pause, partition, cap, loss"):
        parse(text)


def test_a_seed_decides_and_another_decides_otherwise() -> None:
    text = "kill,pause,partition,cap,loss,kill"
    assert drawn(text) == drawn(text)
    assert any(drawn(text) != drawn(text, seed=seed) for seed in range(1, 4))


def test_faults_are_spread_over_the_middle_of_the_time_and_hit_some() -> None:
    faults = drawn("kill,partition,loss,kill,kill")
    assert [at_s for _, at_s, *_ in faults] == pytest.approx([20.0, 33.75, 47.5, 61.25, 75.0])
    assert [owner for *_, owner in faults] == [True, False, False, False, True]
    sizes = {kind: len(nodes) for kind, _, _, nodes, _ in faults}
    assert sizes == {"kill": 1, "partition": 3, "loss": 2}
    assert all(set(nodes) <= set(range(7)) for *_, nodes, _ in faults)
    assert [lasts_s for _, _, lasts_s, *_ in drawn("pause,pause:90")] == [12.0, 90.0]


def test_a_swarm_of_one_can_be_hit_too() -> None:
    assert [nodes for *_, nodes, _ in drawn("kill,partition,loss", nodes=1)] == [(0,)] * 3


def test_what_processes_cannot_do() -> None:
    check_possible(parse("kill,pause:3"), ("kill", "pause"), "processes")
    with pytest.raises(ConfigError, match="cap is not possible with processes: choose from kill, pause"):
        check_possible(parse("kill,cap"), ("kill", "pause"), "processes")
