"""A generation's content: everything comes back, and what does not is named in one sentence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from braniac.node.checkpoint import Snapshot, from_generation, load_tensors, save_tensors, to_content
from braniac.node.errors import StateError
from braniac.node.generation import Generation
from braniac.node.store import Store
from tests.unit.node_harness import CONFIG, EPOCH_S, make_trainer, write_run


@pytest.fixture
def generation(tmp_path: Path) -> Generation:
    write_run(tmp_path, 1000, epoch_s=EPOCH_S)
    generation = Store.look(tmp_path).recover()
    assert generation is not None
    return generation


def test_what_is_saved_comes_back(generation: Generation) -> None:
    saved = from_generation(generation)
    assert to_content(saved, saved.history.to_json()) == generation.content
    assert saved.history.last == dict.fromkeys(range(saved.manifest.window), -1)
    assert (saved.weights, saved.optimizer, saved.swarm_time_s) == (None, None, EPOCH_S)


@pytest.mark.parametrize("tier", [0, 3])
def test_a_trainer_comes_back_to_the_bit(tmp_path: Path, tier: int) -> None:
    trainer, again = make_trainer(tier), make_trainer(tier)
    for _ in range(3):
        trainer.step()
    tensors, counters = trainer.state()
    store = Store.open(tmp_path)
    weights, optimizer = save_tensors(store, CONFIG, tier, Snapshot(tensors, counters["step"]))
    again.load_state(load_tensors(store, weights, optimizer), counters)
    with pytest.raises(StateError, match="remove the newest generation"):
        load_tensors(store, store.put(b"no tensors"), optimizer)
    with pytest.raises(StateError, match="remove the newest generation"):
        load_tensors(store, weights, store.put(b"no tensors"))
    store.close()
    assert trainer.step() == again.step()
    assert all(torch.equal(a, b) for a, b in zip(trainer.params.values(), again.params.values(), strict=True))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("tier",), None),
        (("tier",), "zero"),
        (("manifest", "signature"), "AAAA"),
        (("manifest", "body"), "{}"),
        (("manifest",), []),
        (("anchors",), []),
        (("missed",), {"0": "often"}),
        (("anchors", "0"), [1]),
        (("anchors", "0"), [-1, "no hexadecimal"]),
        (("protocol", "entries"), [{"certificate": "00", "acknowledged": None}]),
        (("protocol", "last"), None),
        (("totals",), {"tokens": 1, "dreams": 2}),
        (("weights",), "xyz"),
        (("peers",), {"12D3KooW": []}),
        (("clock",), {"offset_s": 1.0}),
    ],
)
def test_another_versions_state_is_named(generation: Generation, path: tuple[str, ...], value: Any) -> None:
    content: dict[str, Any] = copy.deepcopy(dict(generation.content))
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(StateError, match="another version of braniac-node"):
        from_generation(Generation(generation.number, content, generation.refs))
