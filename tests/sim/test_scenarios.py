"""Certificates without forks: when an owner fails, views split, peers stay away, or almost nobody is there.

Each story is told to whole nodes in virtual time; afterwards everything is healed, the swarm must work as a whole, and
all checkers watch all the time. What becomes of work is said, and tested, in each.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from braniac.protocol import limits
from braniac.protocol.round import Phase, SlotRound
from tests.sim.faults import HOUR_S
from tests.sim.node import Machine
from tests.sim.stories import engine_of, life_of, tell
from tests.sim.training import FRAGMENT_TABLE, FRAGMENTS
from tests.sim.world import World

WINDOW = FRAGMENTS
HORIZON = limits.HISTORY_WINDOWS * WINDOW


def round_of(machine: Machine, slot: int) -> SlotRound | None:
    return engine_of(machine)._rounds._rounds.get(slot)


def downloads(machine: Machine) -> int:
    """How often its node gave up its own work on a fragment for the others' anchor."""
    return life_of(machine).daemon._status.forfeits["too_old"]  # type: ignore[union-attr]


def digests(world: World, slot: int, machines: list[Machine]) -> set[bytes | None]:
    """The verdicts that these machines report for a slot, None for none."""
    reports = [world.checks.settled[slot].get(machine.name) for machine in machines]
    return {r.certificate.verdict.digest if r is not None and r.certificate is not None else None for r in reports}


def merged(world: World, machine: Machine, first: int) -> int:
    """In how many slots since then its own work was merged, as far as it knows."""
    reports = (found.get(machine.name) for slot, found in world.checks.settled.items() if slot >= first)
    return sum(report is not None and report.merged for report in reports)


# --- the owner fails -------------------------------------------------------------------------------------------------


async def next_owned(world: World) -> tuple[int, Machine]:
    """A slot that has just begun, and its owner: not the founder, so that any peer is as good as another."""
    slot = world.slot + 1
    while world.owner_of(slot) is world.machines[0]:
        slot += 1
    await world.until(lambda: world.slot >= slot, 20, 0.01)
    return slot, world.owner_of(slot)


OWNER_FAILS: dict[str, Callable[[SlotRound], bool]] = {
    "before anybody offers": lambda current: True,
    "while it collects": lambda current: bool(current.commitments),
    "while it merges": lambda current: current.phase is Phase.MERGING,
    "with its own signature only": lambda current: current.phase is Phase.PROPOSED and len(current.votes) == 1,
}


@pytest.mark.parametrize("step", OWNER_FAILS)
@pytest.mark.parametrize("back", [True, False])
def test_an_owner_that_dies_before_its_certificate(step: str, back: bool) -> None:
    """The slot stays without one, nobody's anchor or work changes, and the work is offered again a window later."""

    async def story(world: World) -> None:
        await world.begin()
        slot, owner = await next_owned(world)
        others = [machine for machine in world.machines if machine is not owner]
        fragment = world.manifest.fragment_of(slot)
        before = {m.name: engine_of(m).anchors()[fragment] for m in others}
        if step == "with its own signature only":
            world.network.weather.cuts |= {(m.identity.peer_id, owner.identity.peer_id) for m in others}
            # Their payloads cannot reach it either, so it merges its own work alone, when the slot is over.
        reached = OWNER_FAILS[step]
        await world.until(lambda: (c := round_of(owner, slot)) is not None and reached(c), 3, 0.001)
        life_of(owner).kill("power")
        world.mend()
        await world.until(lambda: world.slot > slot + limits.PROPOSAL_OPEN_SLOTS + 1, 6)
        assert digests(world, slot, others) == {None}
        states = {m.name: engine_of(m).anchors()[fragment] for m in others}
        assert states == before
        first = world.slot
        if back:
            owner.start()
        await world.slots(limits.ROSTER_LIVE_SLOTS + 2 * WINDOW)
        for machine in others:
            assert merged(world, machine, first) > 0

    tell(story, 0, 0, 0, 0)


def test_an_owner_that_dies_with_the_signatures_in_hand() -> None:
    """It has certified and told nobody. What it applied was not durable everywhere else, so it is as if never done."""

    async def story(world: World) -> None:
        await world.begin()
        slot, owner = await next_owned(world)
        others = [machine for machine in world.machines if machine is not owner]
        await world.until(lambda: any((c := round_of(m, slot)) and c.voted for m in others), 2, 0.001)
        world.network.weather.cuts |= {(owner.identity.peer_id, m.identity.peer_id) for m in others}
        await world.until(lambda: (c := round_of(owner, slot)) and c.phase is Phase.CERTIFIED, 1, 0.001)
        life_of(owner).kill("power")
        world.mend()
        await world.until(lambda: world.slot > slot + limits.PROPOSAL_OPEN_SLOTS + 1, 6)
        assert digests(world, slot, others) == {None}
        owner.start()
        await world.slots(2 * WINDOW)

    tell(story, 0, 0, 0, 0)


@pytest.mark.parametrize("away_slots", [2, WINDOW, HORIZON + WINDOW])
def test_an_owner_that_dies_while_it_serves_the_update(away_slots: int) -> None:
    """Everybody hears of the certificate and the owner is dead: the seats have merged it too, and serve its update."""

    async def story(world: World) -> None:
        await world.begin()
        slot, owner = await next_owned(world)
        others = [machine for machine in world.machines if machine is not owner]

        def published() -> bool:
            histories = [engine_of(m).history for m in others]
            return any((entry := history.entry(slot)) is not None and not entry.handed for history in histories)

        await world.until(published, 2, 0.001)
        life_of(owner).kill("kill")
        fragment = world.manifest.fragment_of(slot)
        anchors = [engine_of(m).anchors for m in others]
        await world.until(lambda: all(anchor()[fragment].slot >= slot for anchor in anchors), 4)
        await world.slots(away_slots)
        owner.start()

    tell(story, 0, 0, 0, 0)


# --- two certificates ------------------------------------------------------------------------------------------------


def halves(world: World) -> tuple[list[Machine], list[Machine]]:
    """The founder's side is the smaller one."""
    middle = max(1, (len(world.machines) - 1) // 2)
    return world.machines[:middle], world.machines[middle:]


@pytest.mark.parametrize(("slots", "tiers"), [(6.5, (0, 0, 0, 0)), (6.5, (0, 0)), (6.5, (0, 0, 0, 0, 0))])
def test_halves_that_meet_within_a_window(slots: float, tiers: tuple[int, ...]) -> None:
    """Both sides go on and certify the same slots in different ways. One certificate of each stands in the end."""

    async def story(world: World) -> None:
        await world.begin()
        left, right = halves(world)
        parted = world.slot + 1
        world.cut(left, right)
        await world.slots(slots)
        met = world.slot
        world.mend()
        both = [s for s in range(parted, met) if len(digests(world, s, left) - digests(world, s, right) - {None})]
        assert both, "the sides never certified the same slot"
        await world.slots(2 * WINDOW)
        for machine in world.machines:
            assert merged(world, machine, met) > 0

    tell(story, *tiers)


@pytest.mark.parametrize("slots", [2 * WINDOW, HORIZON, HORIZON + 2 * WINDOW])
def test_halves_that_meet_after_their_slots_are_final(slots: int) -> None:
    """Where both sides had certified, the larger side's anchors stand, and the smaller side downloads them.

    What it had merged in those fragments meanwhile, and its own work on them, is lost; of the others nothing is.
    """

    async def story(world: World) -> None:
        await world.begin()
        left, right = halves(world)
        world.cut(left, right)
        parted = world.slot + 1
        await world.slots(slots)
        kept = {m.name: downloads(m) for m in right}
        trained_apart = [merged(world, machine, world.slot - WINDOW) for machine in world.machines]
        assert all(trained_apart), "both sides go on training and merging by themselves"
        final = range(parted, world.slot + 1 - WINDOW + 1)  # when the sides hear of each other in the next slot
        both = [s for s in final if None not in digests(world, s, left) | digests(world, s, right)]
        disputed = {world.manifest.fragment_of(slot) for slot in both}
        assert disputed
        world.mend()
        await world.until(lambda: not world.ailment(), HORIZON + 4 * WINDOW)
        assert {downloads(machine) for machine in left} == {len(disputed)}
        assert {m.name: downloads(m) for m in right} == kept

    tell(story, 0, 0, 0, 0, 0)


# --- away ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slots", "size"), [(1, 3), (10, 3), (1000, 2)])
@pytest.mark.parametrize("how", ["frozen", "killed"])
def test_a_peer_that_was_away(slots: int, size: int, how: str) -> None:
    """Within the history it takes up what it missed and its own work stays; after it, it downloads everything."""

    async def story(world: World) -> None:
        await world.begin()
        machine = world.machines[-1]
        if how == "frozen":
            life_of(machine).frozen = True
        else:
            life_of(machine).kill("power")
        await world.slots(slots)
        if how == "frozen":
            world.loop.thaw(life_of(machine))
        else:
            machine.start()
        back = world.slot
        await world.slots(2 * WINDOW)
        # Not at once: an update may be on its way, or random work contradict the others' and be left out of a slot.
        await world.until(lambda: not world.ailment(), 2 * WINDOW)
        assert downloads(machine) == (0 if slots < HORIZON - WINDOW else len(FRAGMENT_TABLE))
        assert merged(world, machine, back) > 0

    tell(story, *[0] * size)


# --- clocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
def test_no_start_speaks_with_the_voice_of_an_earlier_one(known: bool) -> None:
    """Not even if the wall clock was set back, and the earlier one ended before it had saved anything."""

    async def story(world: World) -> None:
        machine = world.machines[-1]
        await world.begin(*range(len(world.machines) - 1 + known))
        if known:
            life_of(machine).kill("kill")
            await world.slots(0.1)
        for _ in range(2):
            machine.start()
            await world.until(lambda: machine.life is not None and machine.life.daemon is not None, 8, 0.01)
            await world.slots(0.1)
            life_of(machine).kill("kill")
            machine.jump_wall(-HOUR_S)
            await world.slots(0.1)
        machine.start()
        await world.slots(limits.ROSTER_LIVE_SLOTS + WINDOW)

    tell(story, 0, 0, 0)


def test_a_founder_that_was_joined_never_goes_by_its_wall_clock_again() -> None:
    """Even if it ended before its next generation: alone and ahead it would decide slots of its own."""

    async def story(world: World) -> None:
        founder, other = world.machines
        founder.start()
        await world.until(lambda: founder.life is not None and founder.life.daemon is not None, 8, 0.01)
        slot = engine_of(founder).slot
        other.start()
        await world.until(lambda: engine_of(founder).live_peers(), 8, 0.01)
        await world.slots(0.1)
        assert world.slot == slot, "no slot has begun since, so no work was offered and stored"
        life_of(founder).kill("power")
        founder.jump_wall(HOUR_S)
        await world.slots(0.1)
        founder.start()
        await world.until(lambda: founder.life is not None and founder.life.daemon is not None, 8, 0.01)
        assert engine_of(founder).slot <= world.slot + 1

    tell(story, 0, 0)


# --- almost nobody ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [3, HORIZON + WINDOW])
def test_the_last_holder_of_a_ring_leaves_and_comes_back(slots: int) -> None:
    """Nobody else trains the ring meanwhile, so it stands still and goes on where it was."""

    async def story(world: World) -> None:
        await world.begin()
        holder = world.machines[0]
        rings = [f.index for f in FRAGMENT_TABLE if f.ring > 0]
        life_of(holder).leave()
        before = {f: engine_of(holder).anchors()[f] for f in rings}
        await world.until(lambda: holder.life is None, 5)
        await world.slots(slots)
        holder.start()
        await world.until(lambda: holder.life is not None and holder.life.engine is not None, 8)
        for f, state in before.items():
            found = engine_of(holder).anchors()[f]
            assert found.slot >= state.slot

    tell(story, 0, 2, 2)


def test_a_ring_that_was_begun_anew_while_its_last_holder_was_away() -> None:
    """Somebody else wants the ring and nobody has it: it begins again. Its old holder then takes over the new one."""

    async def story(world: World) -> None:
        await world.begin(0, 1)
        holder, _, newcomer = world.machines
        life_of(holder).leave()
        await world.until(lambda: holder.life is None, 5)
        newcomer.start()
        await world.until(lambda: newcomer.training, 4 * WINDOW)
        await world.slots(WINDOW)
        holder.start()

    tell(story, 0, 2, 0)


@pytest.mark.parametrize("size", [1, 2])
def test_a_small_swarm(size: int) -> None:
    """A committee of one or two decides as well: every slot gets its certificate, with everybody's work."""

    async def story(world: World) -> None:
        await world.begin()
        first = world.slot
        await world.slots(3 * WINDOW)
        assert world.checks.incomplete(world.machines, first, world.slot - 2) == ""
        for machine in world.machines:  # each in turn is all that is left
            life_of(machine).kill("power")
            await world.slots(limits.ROSTER_LIVE_SLOTS + 2)
            machine.start()
            await world.until(lambda: not world.ailment(), 6 * WINDOW)

    tell(story, *[0] * size)
