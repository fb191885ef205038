"""Updates on their way down the tree of a slot: nobody sends many, and who fails on the way keeps none from anybody."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from braniac.node.exchange import Exchange
from braniac.protocol import committee
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.tree import ancestors
from tests.sim.node import Machine
from tests.sim.stories import engine_of, life_of, tell
from tests.sim.training import FRAGMENTS
from tests.sim.world import World

SIZE = 8


def ways(world: World, slot: int) -> dict[str, list[Machine]]:
    """Of each machine that has no seat in a slot: who stands above it, the nearest first."""
    machines = {machine.identity.peer_id: machine for machine in world.machines}
    run_id = world.manifest.run_id
    seats = committee.committee(run_id, slot, machines)
    return {
        machine.name: [machines[above] for above in ancestors(run_id, slot, seats, machines, peer)]
        for peer, machine in machines.items()
        if peer not in seats
    }


def inner(world: World, slot: int) -> list[Machine]:
    """Machines without a seat that somebody stands below."""
    found = ways(world, slot)
    return [m for m in world.machines if m.name in found and any(way[0] is m for way in found.values())]


async def next_deep(world: World) -> int:
    """Wait for a slot to begin whose tree has an inner peer other than the founder."""
    slot = world.slot + 1
    while not inner(world, slot) or world.machines[0] in inner(world, slot):
        slot += 1
    await world.until(lambda: world.slot >= slot, 40, 0.01)
    return slot


def has_merged(machine: Machine, slot: int) -> bool:
    entry = engine_of(machine).history.entry(slot)
    return entry is not None and entry.handed


def has_heard(machine: Machine, slot: int) -> bool:
    return engine_of(machine).history.entry(slot) is not None


def test_nobody_sends_an_update_to_more_than_two(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: Counter[tuple[Exchange, bytes]] = Counter()
    read = Exchange._read_chunk

    async def counting(self: Exchange, request: pb.ChunkRequest, reply: pb.Reply) -> None:
        await read(self, request, reply)
        sent[self, request.digest] += request.offset == 0

    async def story(world: World) -> None:
        await world.begin()
        monkeypatch.setattr(Exchange, "_read_chunk", counting)
        first = world.slot + 1
        await world.slots(2 * FRAGMENTS)
        updates = set()
        for slot in range(first, world.slot - 2):
            settled = [report for report in world.checks.settled[slot].values() if report.certificate is not None]
            updates |= {report.certificate.verdict.update_digest for report in settled if report.certificate}
        assert len(updates) > FRAGMENTS
        copies = {key: count for key, count in sent.items() if key[1] in updates}
        assert max(copies.values()) <= 2
        assert sum(copies.values()) >= len(updates) * (SIZE - 3)
        assert max(sent.values()) <= 3, "no contribution goes to more than the seats"

    tell(story, *[0] * SIZE)


def test_a_parent_that_dies_with_the_update() -> None:
    """Those below it have heard of the certificate, and get the update from those above it."""

    async def story(world: World) -> None:
        await world.begin()
        slot = await next_deep(world)
        parent = inner(world, slot)[0]
        await world.until(lambda: has_heard(parent, slot), 3, 0.001)
        below = [m for m in world.machines if (way := ways(world, slot).get(m.name)) and parent in way]
        life_of(parent).kill("kill")
        await world.until(lambda: all(has_merged(machine, slot) for machine in below), 2, 0.05)
        parent.start()

    tell(story, *[0] * SIZE)


def test_inner_peers_that_fall_silent_keep_an_update_from_nobody() -> None:
    """They go on sending heartbeats of the slot, so everybody counts on them, and give nothing to anybody."""

    async def story(world: World) -> None:
        await world.begin()
        slot = await next_deep(world)
        silent = inner(world, slot)
        await world.until(lambda: any(has_heard(machine, slot) for machine in silent), 3, 0.001)
        world.network.weather.cuts |= {
            (a.identity.peer_id, b.identity.peer_id) for a in silent for b in world.machines if a is not b
        }
        others = [machine for machine in world.machines if machine not in silent]
        await world.until(lambda: all(has_merged(machine, slot) for machine in others), 3, 0.05)
        world.mend()

    tell(story, *[0] * SIZE)


def says_that_it_has_nothing(request: pb.ChunkRequest, reply: pb.Reply) -> None:
    raise WireError(Refusal.NOT_READY, "no such blob here")


def gives_other_bytes(request: pb.ChunkRequest, reply: pb.Reply) -> None:
    reply.chunk = bytes(len(reply.chunk))


@pytest.mark.parametrize("lie", [says_that_it_has_nothing, gives_other_bytes])
def test_inner_peers_that_lie_keep_an_update_from_nobody(
    monkeypatch: pytest.MonkeyPatch, lie: Callable[[pb.ChunkRequest, pb.Reply], None]
) -> None:
    read = Exchange._read_chunk
    liars: set[Exchange] = set()
    lies = []

    async def lying(self: Exchange, request: pb.ChunkRequest, reply: pb.Reply) -> None:
        await read(self, request, reply)
        if self in liars:
            lies.append(request.digest)
            lie(request, reply)

    async def story(world: World) -> None:
        monkeypatch.setattr(Exchange, "_read_chunk", lying)
        await world.begin()
        slot = await next_deep(world)
        await world.until(lambda: any(has_heard(machine, slot) for machine in world.machines), 3, 0.001)
        liars.update(life_of(machine).equipment.exchange for machine in inner(world, slot))  # type: ignore[union-attr]
        await world.until(lambda: all(has_merged(machine, slot) for machine in world.machines), 3, 0.05)
        assert lies, "nobody asked a liar"
        liars.clear()

    tell(story, *[0] * SIZE)
