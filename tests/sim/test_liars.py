"""Whole nodes that lie, among honest ones: what they do is found out, and the others go on."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from braniac.protocol import events, statements
from braniac.protocol.merge import Merged
from braniac.protocol.messages import Equivocation
from tests.sim.node import Life, Machine
from tests.sim.stories import engine_of, life_of, tell
from tests.sim.training import FRAGMENTS
from tests.sim.world import World, identity
from tests.unit.swarm_checks import one_more

WINDOW = FRAGMENTS


def merge_wrongly(life: Life) -> Callable[[], None]:
    """From now on, until the returned function is called, the updates of this owner are not what it has merged."""
    path, manifest = life.daemon.path, life.world.manifest  # type: ignore[union-attr]
    honest = path._merge_now

    def wrong(due: events.MergeDue | events.CheckDue) -> Merged | None:
        merged = honest(due)
        if merged is None or isinstance(due, events.CheckDue):
            return merged
        false = one_more(manifest, due.fragment, merged)
        path._node.store.put(false.update)
        return false

    path._merge_now = wrong  # type: ignore[method-assign]
    return lambda: path.__dict__.pop("_merge_now")


def lie_of(world: World) -> Equivocation:
    """A proof against somebody who is not there any more."""
    liar, run_id, slot = identity(world.seed, 99), world.manifest.run_id, world.slot
    fragment = world.manifest.fragment_of(slot)
    first, second = (statements.make_commitment(liar, run_id, slot, fragment, bytes(32), 9, w) for w in (1, 2))
    return Equivocation(first, second)


def found_out(machine: Machine) -> float:
    """How many wrong merges its node has not signed."""
    registry = life_of(machine).equipment.metrics.registry  # type: ignore[union-attr]
    return registry.get_sample_value("braniac_divergences_total", {"kind": "merge"}) or 0.0


def test_an_owner_whose_update_is_not_what_it_merged() -> None:
    """Its slots stay without a certificate for as long as it lies, and all others have theirs."""

    async def story(world: World) -> None:
        await world.begin()
        liar, honest = world.machines[-1], world.machines[:-1]
        stop = merge_wrongly(life_of(liar))
        first = world.slot + 1
        await world.slots(4 * WINDOW)
        last = world.slot - 3
        owned = {slot for slot in range(first, last + 1) if world.owner_of(slot) is liar}
        assert owned
        for slot in range(first, last + 1):
            reports = [world.checks.settled[slot][machine.name] for machine in honest]
            assert {report.certificate is None for report in reports} == {slot in owned}
        assert sum(map(found_out, honest)) >= 2 * len(owned), "both other seats have looked"
        stop()

    tell(story, 0, 0, 0, 0)


@pytest.mark.parametrize("tier", [0, 2])
def test_a_ban_survives_a_restart(tier: int) -> None:
    """Also if nobody is there to repeat the proof."""

    async def story(world: World) -> None:
        await world.begin()
        machine = world.machines[-1]
        proof = lie_of(world)
        engine_of(machine).roster.ban(proof)
        await world.slots(WINDOW)
        life_of(machine).kill("power")
        world.cut([machine], world.machines[:-1])
        await world.until(lambda: machine.life is None, 1, 0.01)
        machine.start()
        await world.until(lambda: machine.life is not None and machine.life.daemon is not None, 8)
        assert engine_of(machine).roster.banned == {proof.peer: proof}
        world.mend()

    tell(story, 0, 0, tier)
