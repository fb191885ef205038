"""Resting and going on: a peer says goodbye, is silent, listens until it has caught up, and takes part again."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import pytest

from braniac.protocol import events, limits
from braniac.protocol.engine import Engine
from braniac.protocol.tiles import TileLayout
from tests.unit.swarm_checks import WINDOW, acknowledged_and_listed, assert_flowing, converge, owner_of
from tests.unit.swarm_harness import Peer, Swarm


def offers_after(peer: Peer, slot: int) -> list[int]:
    return [at for at in peer.offered if at > slot]


def owed(peer: Peer) -> int:
    """How much of its work no certificate holds, as the sum of all magnitudes."""
    return sum(int(abs(books.owed()).sum()) for books in peer.books.values())


def assert_contributing(swarm: Swarm, peer: Peer, first: int) -> None:
    merged = [slot for slot, event in peer.settled.items() if slot >= first and event.merged]
    assert merged, f"peer {peer.number} has nothing merged since slot {first}"


@pytest.mark.parametrize(
    ("size", "slots", "loss"), [(2, 1, 0.0), (5, 1, 0.15), (3, 10, 0.0), (4, 10, 0.15), (2, 100, 0.0), (3, 40, 0.15)]
)
def test_rest_and_go_on(size: int, slots: int, loss: float) -> None:
    swarm = Swarm.running([0] * size, slots=4, seed=size + slots)
    swarm.loss = loss
    peer = swarm.peers[-1]
    peer.rest()
    swarm.run(2.5)
    assert not peer.awake
    began = swarm.slot
    swarm.run(slots)
    if loss == 0:
        assert_flowing(swarm, began + 1, swarm.slot - 2)
    assert not offers_after(peer, began)
    work = owed(peer)
    woke = swarm.slot
    peer.wake()
    assert peer.catching_up, "it must listen first"
    assert owed(peer) == work
    swarm.run(2 * limits.ROSTER_LIVE_SLOTS)
    assert peer.engine.ready
    swarm.loss = 0.0
    converge(swarm, 2 * WINDOW + 4)
    assert_contributing(swarm, peer, woke)
    assert_flowing(swarm, swarm.slot - WINDOW, swarm.slot - 1)
    if slots <= WINDOW:
        acknowledged_and_listed(swarm)


def test_it_offers_nothing_before_it_has_caught_up() -> None:
    """Its first offer is read against anchors that hold every certificate of the rest."""
    swarm = Swarm.running([0] * 3, slots=2)
    peer = swarm.peers[2]
    peer.rest()
    swarm.run(8)
    swarm.latency_s = (0.2, 0.3)  # so that catching up takes its time
    heard = len(peer.log)
    peer.wake()
    while peer.catching_up:
        assert not peer.engine.ready
        assert not [event for event in peer.log[heard:] if isinstance(event, events.FragmentDue)]
        swarm.run(0.1)
    others = swarm.peers[0].engine.history.recent(swarm.slot)
    mine = {name.slot for name in peer.engine.history.recent(swarm.slot)}
    behind = [name.slot for name in others if name.slot not in mine and name.slot < swarm.slot - 2]
    assert not behind


def test_what_was_heard_before_the_rest_is_no_news() -> None:
    """After a short rest the others still count as live; it must hear them again before it believes to be current."""
    swarm = Swarm.running([0] * 3, slots=1)
    peer = swarm.peers[2]
    peer.rest()
    swarm.run(1.2)
    assert not peer.awake
    swarm.cut((0, 1), (2,))
    peer.wake()
    swarm.run(2.5)
    assert peer.catching_up
    swarm.cuts.clear()
    converge(swarm, 6)
    assert peer.engine.ready


@pytest.mark.parametrize("slots", [3, 20])
def test_the_founder_rests(slots: int) -> None:
    swarm = Swarm.running([0] * 3)
    founder = swarm.peers[0]
    founder.rest()
    swarm.run(3 + slots)
    founder.wake()
    converge(swarm, 12 + WINDOW)
    assert founder.engine.ready
    assert_contributing(swarm, founder, swarm.slot - 2 * WINDOW)


def test_the_only_peer_rests() -> None:
    """Nobody is there to catch up with: it listens a while, then goes on with what it has."""
    swarm = Swarm.running([0], slots=3)
    peer = swarm.peers[0]
    work = {f: books.owed() for f, books in peer.books.items()}
    peer.rest()
    swarm.run(30)
    assert not peer.awake
    peer.wake()
    swarm.run(limits.ROSTER_LIVE_SLOTS + 2)
    first = swarm.slot + limits.ELIGIBLE_SLOTS
    converge(swarm, 2 * WINDOW + 2)
    assert_flowing(swarm, first, swarm.slot - 1)
    assert work


@pytest.mark.parametrize(("size", "slots"), [(2, 10), (3, 100), (5, 2)])
def test_everybody_rests_and_goes_on(size: int, slots: int) -> None:
    swarm = Swarm.running([0] * size, slots=2)
    for peer in swarm.peers:
        peer.rest()
        swarm.run(0.3)
    swarm.run(3 + slots)
    assert not swarm.live
    for peer in swarm.peers:
        peer.wake()
        swarm.run(0.4)
    swarm.run(2 * limits.ROSTER_LIVE_SLOTS + 4)
    assert all(peer.engine.ready for peer in swarm.peers)
    first = swarm.slot
    converge(swarm, 2 * WINDOW)
    assert_flowing(swarm, first, swarm.slot - 1)
    for peer in swarm.peers:
        assert_contributing(swarm, peer, first)


@pytest.mark.parametrize("moment", [0.0, 0.05, 0.9])
def test_rest_during_an_own_slot(moment: float) -> None:
    """The slot in hand is finished: resting costs nobody a certificate."""
    swarm = Swarm.running([0] * 3, slots=1)
    slot = swarm.slot + 1
    owner = owner_of(swarm, slot)
    swarm.run_until(swarm.manifest.slot_start(slot) + moment)
    owner.rest()
    swarm.run(3.5)
    assert not owner.awake
    assert swarm.certified(slot, slot)[slot] is not None
    owner.wake()
    converge(swarm, 5 + WINDOW)
    assert_flowing(swarm, slot, swarm.slot - 1)


def test_going_on_before_the_rest_has_begun() -> None:
    """Pause and resume within a slot."""
    swarm = Swarm.running([0] * 3, slots=1)
    peer = swarm.peers[1]
    for _ in range(6):
        peer.rest()
        swarm.run(0.15)
        peer.wake()
        swarm.run(0.35)
    converge(swarm, 10)
    assert peer.engine.ready
    assert_contributing(swarm, peer, swarm.slot - 2 * WINDOW)


def test_a_rest_that_ends_with_a_kill() -> None:
    swarm = Swarm.running([0] * 3, slots=2)
    peer = swarm.peers[1]
    peer.rest()
    swarm.run(6)
    work = owed(peer)
    peer.kill()
    peer.restart()
    assert owed(peer) == work
    converge(swarm, 12)
    assert_contributing(swarm, peer, swarm.slot - 2 * WINDOW)


# --- a day -----------------------------------------------------------------------------------------------------------


def sizes(thing: object, depth: int = 4) -> dict[str, int]:
    """How many items each table within an object holds, by its path."""
    found: dict[str, int] = {}
    for name, value in vars(thing).items():
        if isinstance(value, Mapping | set | frozenset | list | tuple | deque):
            found[name] = len(value)
            if isinstance(value, Mapping):
                found[f"{name}.*"] = sum(len(v) for v in value.values() if isinstance(v, Mapping | set | list | tuple))
        elif depth and type(value).__module__.startswith("braniac.protocol") and hasattr(value, "__dict__"):
            found |= {f"{name}.{key}": size for key, size in sizes(value, depth - 1).items()}
    return found


def tidy(peer: Peer) -> None:
    """What a daemon's store does: drop what nothing refers to. And close the books on slots that are final."""
    wanted = peer.engine.history.blobs() | {state.digest for state in peer.states.values()}
    peer.blobs = {digest: data for digest, data in peer.blobs.items() if digest in wanted}
    edge = peer.engine.slot - peer.engine.history.horizon
    for books in peer.books.values():
        for slot in [slot for slot in books.taken if slot < edge]:
            del books.taken[slot]


def tables(engine: Engine) -> dict[str, int]:
    return sizes(engine)


def test_a_day_of_pause_and_resume_every_minute() -> None:
    """24 hours of slots of two minutes, in which every minute somebody goes to rest or goes on."""
    swarm = Swarm.running([0] * 3, slot_s=120.0, layout=TileLayout(((16, 1),)))
    for peer in swarm.peers:
        peer.log = deque(maxlen=64)  # type: ignore[assignment]
    first, largest = swarm.slot, [dict[str, int]() for _ in range(2)]
    for minute in range(24 * 60):
        peer = swarm.peers[minute // 2 % 3]
        if minute % 2 == 0:
            peer.rest()
        else:
            peer.wake()
        swarm.run(0.5)
        for other in swarm.peers:
            tidy(other)
        if 120 <= minute < 240 or minute >= 22 * 60:
            known = largest[minute >= 22 * 60]
            for other in swarm.live:
                for name, size in tables(other.engine).items():
                    known[name] = max(known.get(name, 0), size)
    early, late = largest
    grown = {name: (early[name], late[name]) for name in late if late[name] > 1.2 * early.get(name, 0) + 2}
    assert not grown
    converge(swarm, 8)
    assert all(peer.engine.ready for peer in swarm.peers)
    certified = [digest is not None for digest in swarm.certified(first, swarm.slot - 1).values()]
    assert sum(certified) > 0.98 * len(certified)
    for peer in swarm.peers:
        assert_contributing(swarm, peer, swarm.slot - 2 * WINDOW)
