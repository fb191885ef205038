"""The checkers can fail: a node that breaks one rule of the protocol is found out, each time by the right one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from braniac.node import datapath, marks, store
from braniac.node.clock import SwarmClock
from braniac.node.datapath import DataPath
from braniac.node.replica import Replica
from braniac.protocol import codec, events, ledger
from braniac.protocol.agreement import Agreement
from braniac.protocol.checking import Checking
from braniac.protocol.engine import Engine
from braniac.protocol.errors import WireError
from braniac.protocol.history import History
from braniac.protocol.round import Phase, SlotRound
from braniac.protocol.tiles import Sparse
from tests.sim.faults import HOUR_S, Mix
from tests.sim.world import Plan, simulate
from tests.unit.swarm_checks import one_more

SEEDS = 16
CALM = Mix()
CRASHES = Mix(crash=0.3)
Patch = pytest.MonkeyPatch


def merge_in_floats(patch: Patch) -> None:
    """An owner whose sums come out a little smaller than anybody else's."""
    merge = datapath.merge

    def careless(manifest: Any, fragment: int, contributions: Any) -> Any:
        merged = merge(manifest, fragment, contributions)
        if merged is None:
            return None
        layout = manifest.fragments[fragment].layout
        update = codec.decode(layout, manifest.down, merged.update)
        smaller = (update.values.astype(np.float32) * np.float32(0.99)).astype(np.int32)
        rounded = Sparse(update.positions, smaller)
        return dataclasses.replace(merged, update=codec.encode(layout, manifest.down, rounded)[0])

    patch.setattr(datapath, "merge", careless)


def forget_what_was_sent(patch: Patch) -> None:
    """The ledger adds the update and does not take the own part of it back."""
    settle = ledger.settle
    patch.setattr(ledger, "settle", lambda update, sent, undo=False: settle(update, None, undo=undo))


def skip_syncs(patch: Patch) -> None:
    """Files appear by renaming, and nobody waits until they are on the medium."""

    def write(files: Any, path: Any, data: memoryview, *, keep: bool = False) -> None:
        temporary = path.with_name(path.name + ".tmp")
        with files.create(temporary) as file:
            files.write(file, data)
        files.rename(temporary, path)

    patch.setattr(store, "write_whole", write)
    patch.setattr(marks, "write_whole", write)


def offer_before_saving(patch: Patch) -> None:
    """No generation holds an offer before it is made."""
    commit = Replica.commit

    async def late(self: Any, engine: Any, incarnation: int, clock: Any, peers: Any, offer: Any) -> None:
        if offer is None:
            await commit(self, engine, incarnation, clock, peers, offer)

    patch.setattr(Replica, "commit", late)


def sign_whatever_is_proposed(patch: Patch) -> None:
    """An owner proposes again with every payload that arrives, and seats forget what they have signed."""
    sign, may_close = SlotRound.sign, SlotRound.may_close

    def forgetful(self: Any, identity: Any, verdict: Any) -> Any:
        self.voted = None
        return sign(self, identity, verdict)

    def eager(self: Any, expected: Any, *, overdue: bool) -> bool:
        if self.phase is Phase.PROPOSED and len(self.arrived()) > len(self.verdict.shares):
            self.phase = Phase.COLLECTING
        return may_close(self, (), overdue=True)

    patch.setattr(SlotRound, "sign", forgetful)
    patch.setattr(SlotRound, "may_close", eager)


def sign_without_merging(patch: Patch) -> None:
    """Owners propose a little more than they have merged, and the other seats believe them."""
    honest = DataPath._merge_now

    def generous(self: Any, due: Any) -> Any:
        merged = honest(self, due)
        if merged is None or not isinstance(due, events.MergeDue):
            return merged
        false = one_more(self._engine.manifest, due.fragment, merged)
        self._node.store.put(false.update)
        return false

    patch.setattr(DataPath, "_merge_now", generous)
    patch.setattr(Checking, "looks_at", lambda self, verdict: False)


def count_no_starts(patch: Patch) -> None:
    """A start that saves nothing leaves no trace, and the wall clock may be set back."""
    patch.setattr(marks.Marks, "count_start", lambda self, least: least)


def count_no_refusals(patch: Patch) -> None:
    receive = Engine.receive

    def careless(self: Any, data: bytes, now: float) -> None:
        refused = self.refused.copy()
        try:
            receive(self, data, now)
        except WireError:
            self.refused = refused
            raise

    patch.setattr(Engine, "receive", careless)


def keep_all_history(patch: Patch) -> None:
    patch.setattr(History, "prune", lambda self, now_slot: None)


def download_nothing(patch: Patch) -> None:
    patch.setattr(Agreement, "review", lambda self, *said: iter(()))


def believe_the_own_clock(patch: Patch) -> None:
    patch.setattr(SwarmClock, "step", lambda self: 0.0)
    patch.setattr(SwarmClock, "adjust", lambda self: 0.0)


MUTATIONS: list[tuple[Callable[[Patch], None], Mix, str]] = [
    (merge_in_floats, CALM, "I4 no poison"),
    (forget_what_was_sent, CALM, "I1 ledger"),
    (skip_syncs, CRASHES, "a node ended"),
    (offer_before_saving, CRASHES, "I1 ledger"),
    (sign_whatever_is_proposed, CALM, "I3 monotone"),
    (sign_without_merging, CALM, "I4 no poison"),
    (keep_all_history, CALM, "I5 bounded"),
    (download_nothing, CALM, "liveness"),
    (believe_the_own_clock, Mix(clock_offset_s=HOUR_S), "liveness"),
    (count_no_refusals, Mix(duplication=0.5), "I7 honest refusals"),
    (count_no_starts, Mix(crash=1.5, clock_jump=1.0), "I3 monotone"),
]


def complaints(mix: Mix) -> Iterator[str]:
    """What the checkers say, seed after seed."""
    for seed in range(SEEDS):
        outcome = simulate(Plan(seed, tiers=(0, 0, 0), mix=mix, safety_slots=30))
        yield from (violation.invariant for violation in outcome.violations)
        if outcome.stuck:
            yield "liveness"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("mutate", "mix", "invariant"), MUTATIONS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_rule_is_noticed(
    monkeypatch: pytest.MonkeyPatch, mutate: Callable[[Patch], None], mix: Mix, invariant: str
) -> None:
    mutate(monkeypatch)
    assert invariant in complaints(mix), f"in {SEEDS} seeds nobody noticed"
