"""The store after a crash at every call, with what was not synced torn or lost: one whole generation, old or new."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from braniac.node.checkpoint import Saved, from_generation, to_content
from braniac.node.errors import StateError
from braniac.node.generation import JSON, Generation
from braniac.node.store import Store
from braniac.protocol import codec
from braniac.protocol.messages import FragmentState
from tests.unit.disk_model import Crash, DiskModel, Tree, put_tree
from tests.unit.node_harness import EPOCH_S, write_run

Moment = tuple[dict[str, JSON], list[bytes]]
"""What a generation says, and its blobs."""


def small_moments(count: int) -> list[Moment]:
    """The last blob never changes, as an anchor may not."""
    return [
        ({"step": step}, [b"weights %d " % step * 50, b"optimizer %d " % step * 70, b"anchor " * 30])
        for step in range(1, count + 1)
    ]


def save(store: Store, moment: Moment) -> int:
    content, blobs = moment
    return store.commit(content, [store.put(blob) for blob in blobs])


@contextlib.contextmanager
def opened(root: Path, files: DiskModel | None = None) -> Iterator[Store]:
    store = Store.open(root, keep=1, files=files)
    try:
        yield store
    finally:
        store.close()


def live(root: Path, files: DiskModel, moments: list[Moment], acknowledge: Callable[[], None]) -> None:
    """A life from the first start on, which saves one moment after the other."""
    with contextlib.suppress(Crash), opened(root, files) as store:
        for moment in moments:
            save(store, moment)
            acknowledge()
            store.collect()


Left = tuple[int, Tree]
"""How many moments were acknowledged before a crash, and what it left."""


def every_crash(root: Path, moments: list[Moment], model: type[DiskModel] = DiskModel) -> list[Left]:
    """Of one life: every state that a crash at any call of it may leave, or one after its end."""
    left: dict[Left, None] = {}  # a set in order
    saved = 0

    def acknowledge() -> None:
        nonlocal saved
        saved += 1

    def watch() -> None:
        left.update(dict.fromkeys((saved, tree) for tree in files.after_crash()))

    files = model(root, watch)
    live(root, files, moments, acknowledge)
    watch()
    return list(left)


def recovered(root: Path, left: Left, moments: list[Moment]) -> int:
    """How many moments the next start finds, after checking that it finds one whole, and that life goes on."""
    saved, tree = left
    put_tree(root, tree)
    with opened(root) as store:
        generation = store.recover()
        assert store.skipped == []
        count = 0 if generation is None else generation.number
        assert count in (saved, saved + 1)
        if generation is not None:
            content, blobs = moments[count - 1]
            assert generation.content == content
            assert {store.get(digest) for digest in generation.refs} == set(blobs)
        for path in (root / "generations").glob("*.json"):  # no manifest may outlive its blobs
            for ref in json.loads(path.read_bytes())["refs"]:
                assert (root / "blobs" / ref[:2] / ref).exists(), path.name
        number = save(store, moments[0])
        store.collect()
        assert store.recover() == Generation(number, moments[0][0], tuple(sorted(map(sha256, moments[0][1]))))
    names = {path.name for path in root.rglob("*") if path.is_file()}
    assert names == {"lock", f"{number:012}.json", *(sha256(blob).hex() for blob in moments[0][1])}
    return count


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_a_crash_at_every_call_leaves_the_old_or_the_new_generation(tmp_path: Path) -> None:
    moments = small_moments(3)
    every = every_crash(tmp_path / "life", moments)
    seen = {(left[0], recovered(tmp_path / "after", left, moments)) for left in every}
    assert seen == {(0, 0), (0, 1), (1, 1), (1, 2), (2, 2), (2, 3), (3, 3)}
    assert len(every) > 80


def test_a_crash_at_every_call_leaves_one_moment_of_a_node(tmp_path: Path) -> None:
    """The same with what a node saves: anchors, an offered payload, weights, and the ledger's side of it as JSON."""
    moments = moments_of_a_node(tmp_path / "run", 2)
    for left in every_crash(tmp_path / "life", moments):
        if count := recovered(tmp_path / "after", left, moments):
            saved = from_generation(Generation(count, moments[count - 1][0], ()))
            assert max(state.slot for state in saved.anchors.values()) == saved.step == count - 1
            assert set(saved.history.offers) == set(range(count))


def moments_of_a_node(root: Path, count: int) -> list[Moment]:
    """In every moment another anchor has moved, another payload is offered, and the weights are others."""
    manifest = write_run(root, 1000, epoch_s=EPOCH_S)
    store = Store.look(root)
    generation = store.recover()
    assert generation is not None
    first = from_generation(generation)
    anchors = {f: bytearray(store.get(state.digest)) for f, state in first.anchors.items()}
    return [moment_of_a_node(first, anchors, step) for step in range(count) if manifest.window > step]


def moment_of_a_node(first: Saved, anchors: dict[int, bytearray], step: int) -> Moment:
    anchors[step][:4] = (1000 + step).to_bytes(4, "little")
    layout = first.manifest.fragments[step].layout
    payload, _ = codec.encode_topk(layout, first.manifest.up, np.arange(layout.size) + step)
    weights, optimizer = b"weights %d" % step * 99, b"optimizer %d" % step * 99
    first.history.offers[step], first.history.last[step] = sha256(payload), step
    saved = replace(
        first,
        anchors={f: FragmentState(f, first.history.last[f], sha256(data)) for f, data in anchors.items()},
        step=step,
        weights=sha256(weights),
        optimizer=sha256(optimizer),
    )
    blobs = [*map(bytes, anchors.values()), payload, weights, optimizer]
    return to_content(saved, first.history.to_json()), blobs


def test_a_kill_and_then_a_power_cut_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    """The killed process may have left names that were never synced, and the next one finds its blobs already there."""
    moments = small_moments(2)
    for at in range(1, 40):
        calls_left = at

        def watch() -> None:
            nonlocal calls_left
            calls_left -= 1
            if calls_left == 0:
                raise Crash

        root = tmp_path / f"life {at}"
        files = DiskModel(root, watch)
        live(root, files, moments[:1], lambda: None)
        files.watch = lambda: None
        with opened(root, files) as store:
            save(store, moments[1])
        for tree in files.after_crash():
            put_tree(tmp_path / "after", tree)
            with opened(tmp_path / "after") as store:
                generation = store.recover()
                assert generation is not None
                assert generation.content == moments[1][0]
                assert store.skipped == []


@pytest.mark.parametrize("forgotten", ["fsync", "fsync_directory"])
def test_the_model_notices_a_forgotten_sync(tmp_path: Path, forgotten: str) -> None:
    """The model itself must be able to fail: without either sync, some crash loses an acknowledged generation."""

    class Forgetful(DiskModel):
        pass

    setattr(Forgetful, forgotten, lambda *_: None)
    moments = small_moments(1)
    noticed = 0
    for left in every_crash(tmp_path / "life", moments, Forgetful):
        try:
            recovered(tmp_path / "after", left, moments)
        except (AssertionError, StateError):
            noticed += 1
    assert noticed > 0
