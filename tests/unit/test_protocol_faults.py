"""Loss, partitions, sleep, late joiners: whatever the network does, all agree soon after it stops.

One fault at a time, and the engine alone; everything at once happens to whole nodes in tests/sim.
"""

from __future__ import annotations

from collections import Counter

import pytest

from braniac.protocol import events, limits
from braniac.protocol.errors import Refusal
from tests.unit.swarm_checks import WINDOW, acknowledged_and_listed, assert_flowing, converge
from tests.unit.swarm_harness import Swarm, identity

# --- the network -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_loss_and_duplication(seed: int) -> None:
    swarm = Swarm.running([0] * 4, seed=seed)
    swarm.loss, swarm.duplication = 0.2, 0.3
    swarm.refusals.clear()
    first = swarm.slot + 1
    swarm.run(4 * WINDOW)
    flowing = [digest is not None for digest in swarm.certified(first, swarm.slot - 2).values()]
    assert sum(flowing) > len(flowing) // 2
    swarm.loss = swarm.duplication = 0.0
    converge(swarm, 2)
    acknowledged_and_listed(swarm)
    refused = Counter(error.refusal for _, error in swarm.refusals)
    assert refused[Refusal.REPLAYED] > 20
    assert set(refused) <= {Refusal.REPLAYED, Refusal.NOT_COMMITTEE, Refusal.CONFLICT}


def test_a_network_that_is_slower_than_a_slot() -> None:
    """Whatever arrives late is refused or ignored; nothing breaks, and it flows again when it is fast again."""
    swarm = Swarm.running([0] * 3)
    swarm.latency_s = (0.5, 2.5)
    swarm.run(2 * WINDOW)
    swarm.latency_s = (0.01, 0.04)
    swarm.run(3)
    first = swarm.slot
    converge(swarm, WINDOW + 1)
    assert_flowing(swarm, first, swarm.slot - 1)
    acknowledged_and_listed(swarm)


@pytest.mark.parametrize(("slots", "sizes"), [(3, (2, 3)), (12, (1, 2)), (66, (1, 1))])
def test_a_partition_heals(slots: int, sizes: tuple[int, int]) -> None:
    """The smaller half goes on by itself, and takes the larger half's anchors in the end."""
    size = sum(sizes)
    swarm = Swarm.running([0] * size)
    swarm.cut(range(sizes[0]), range(sizes[0], size))
    swarm.run(slots)
    swarm.cuts.clear()
    if slots > 64:
        swarm.run(64)  # who was silent for so long is tried only once in a while
    first = swarm.slot + 4
    converge(swarm, 4 * WINDOW + 4)
    assert_flowing(swarm, first, swarm.slot - 1)
    certificate = swarm.peers[0].settled[swarm.slot - 1].certificate
    assert certificate is not None
    assert len(certificate.verdict.shares) == size


def test_peers_that_missed_each_other_are_introduced() -> None:
    """Else their committees would differ for good, long after the network is well again."""
    swarm = Swarm([0] * 4)
    swarm.cut((1,), (3,))
    swarm.peers[0].found()
    for peer in swarm.peers[1:]:
        peer.join()
    swarm.run(20)
    one, other = swarm.peers[1], swarm.peers[3]
    assert one.engine.roster.get(other.id) is None
    swarm.cuts.clear()
    swarm.run(5)
    assert one.engine.roster.get(other.id) is not None
    assert other.engine.roster.get(one.id) is not None
    first = swarm.slot
    converge(swarm, WINDOW)
    assert_flowing(swarm, first, swarm.slot - 1)


def test_a_peer_that_hears_but_is_not_heard() -> None:
    swarm = Swarm.running([0] * 4)
    swarm.cuts = {(3, other) for other in range(3)}
    swarm.run(limits.ROSTER_LIVE_SLOTS + 3)
    first = swarm.slot
    swarm.run(WINDOW)
    swarm.check_counters()
    found = [slot for slot, digest in swarm.certified(first, swarm.slot - 1).items() if digest]
    assert found == list(range(first, swarm.slot))
    swarm.cuts.clear()
    converge(swarm, 3 * WINDOW + 3)


# --- coming and going ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [0, 1])
def test_a_late_joiner_downloads_and_agrees(tier: int) -> None:
    swarm = Swarm.running([0, 0, 1], rings=(0, 1, 0), slots=5)
    joiner = swarm.add(tier)
    joiner.join()
    converge(swarm, 4)
    assert joiner.engine.ready
    assert set(joiner.anchors) == set(swarm.manifest.held(tier))
    assert {e.state.fragment for e in joiner.log if isinstance(e, events.FragmentLost)} == set(joiner.anchors)
    converge(swarm, limits.ELIGIBLE_SLOTS + WINDOW)
    mine = [joiner.settled[slot] for slot in range(swarm.slot - WINDOW, swarm.slot)]
    assert any(event.merged for event in mine)
    assert all(event.merged == event.offered for event in mine)


def test_a_joiner_with_a_slow_line() -> None:
    """Certificates go on while it downloads: it fetches what it missed and applies it to what it got."""
    swarm = Swarm.running([0] * 3, slots=3)
    swarm.download_s = 2.5
    joiner = swarm.add()
    joiner.join()
    swarm.run(8)
    assert joiner.engine.ready
    converge(swarm, 2 * WINDOW)


def test_a_joiner_whose_download_fails_asks_again() -> None:
    swarm = Swarm.running([0] * 3)
    joiner = swarm.add()
    hidden = {id(peer): peer.blobs for peer in swarm.peers[:3]}
    for peer in swarm.peers[:3]:
        peer.blobs = {}
    joiner.join()
    swarm.run(2.5)
    assert not joiner.engine.ready
    for peer in swarm.peers[:3]:
        peer.blobs = hidden[id(peer)] | peer.blobs
    converge(swarm, 4)
    assert joiner.engine.ready


@pytest.mark.parametrize(("windows", "size"), [(1, 3), (10, 3), (100, 2)])
def test_asleep_for(windows: int, size: int) -> None:
    swarm = Swarm.running([0] * size)
    sleeper = swarm.peers[-1]
    swarm.run(0.4)
    sleeper.pause()
    fell_asleep = swarm.slot
    swarm.run(windows * WINDOW)
    assert any(swarm.certified(fell_asleep + 1, swarm.slot - 1).values())
    sleeper.resume()
    woke = swarm.slot
    converge(swarm, 2 * WINDOW)
    assert_flowing(swarm, woke + 3, swarm.slot - 1)
    since = [event.certificate for event in sleeper.settled.values() if event.slot >= woke]
    alone = [certificate for certificate in since if certificate and certificate.verdict.committee == (sleeper.id,)]
    assert not alone, "it certified slots all by itself before it had heard of anybody"
    lost = [e for e in sleeper.log if isinstance(e, events.FragmentLost)][WINDOW:]
    assert len(lost) == (0 if windows == 1 else WINDOW)
    last = sleeper.settled[swarm.slot - 1]
    assert last.merged
    acknowledged_and_listed(swarm)


def test_everybody_sleeps() -> None:
    swarm = Swarm.running([0] * 3)
    for peer in swarm.peers:
        peer.pause()
    swarm.run(200)
    for peer in swarm.peers:
        peer.resume()
    swarm.run(5)
    first = swarm.slot
    converge(swarm, WINDOW)
    assert_flowing(swarm, first, swarm.slot - 1)


def test_introductions_end() -> None:
    """Somebody who never answers is greeted for a while; the greetings stop."""
    swarm = Swarm.running([0])
    peer = swarm.peers[0]
    peer.engine.introduce(identity(77).peer_id)
    sent = []
    swarm.send = lambda source, target, data: sent.append(swarm.slot)  # type: ignore[method-assign]
    swarm.run(40)
    assert len(sent) > 16
    assert max(sent) < swarm.slot - 16
    peer.engine.introduce(peer.id)
    peer.pump()
    assert max(sent) < swarm.slot - 16
