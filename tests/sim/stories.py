"""What told stories share: a plan without faults of its own, in which a story makes what trouble it tells of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from braniac.protocol.engine import Engine
from tests.sim.node import Life, Machine
from tests.sim.world import Outcome, Plan, World, simulate


def tell(story: Callable[[World], Awaitable[None]], *tiers: int, seed: int = 1) -> Outcome:
    """Let a swarm of one node per tier live through a story; nothing may be violated or left undone."""
    outcome = simulate(Plan(seed, tiers), story)
    assert not outcome.violations
    assert not outcome.stuck
    return outcome


def life_of(machine: Machine) -> Life:
    """Of a machine that runs, with its engine and its daemon."""
    assert machine.life is not None
    assert machine.life.engine is not None
    return machine.life


def engine_of(machine: Machine) -> Engine:
    """Of a machine that runs."""
    engine = life_of(machine).engine
    assert engine is not None
    return engine
