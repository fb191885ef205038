"""The fake clock, and the swarm's clock: median of the peers, bounded steps, never backwards."""

import math
import random
import time

import pytest

from braniac.node.clock import FORGET_S, PEERS_MAX, SLEW_S_MAX, STEP_AFTER, FakeClock, SwarmClock, SystemClock
from braniac.protocol.identity import PeerId


def peer(number: int) -> PeerId:
    return PeerId(number.to_bytes(38))


def exchange(
    swarm: SwarmClock, clock: FakeClock, number: int, ahead_s: float, up_s: float = 0.0, down_s: float = 0.0
) -> bool:
    """One heartbeat to a peer whose clock is `ahead_s` ahead of ours, with these travel times."""
    sent_s = clock.monotonic()
    clock.advance(up_s)
    their_time_s = clock.monotonic() + swarm.offset_s + ahead_s
    clock.advance(down_s)
    return swarm.observe(peer(number), their_time_s, sent_s, clock.monotonic())


def test_system_clock_runs() -> None:
    clock = SystemClock()
    assert clock.monotonic() <= clock.monotonic()
    assert clock.wall() > 1_700_000_000


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="only Linux tells how long a device slept")
def test_the_clock_goes_on_while_the_device_sleeps() -> None:
    before_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before_s <= SystemClock().monotonic() <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_fake_clock_moves_only_when_told() -> None:
    clock = FakeClock(monotonic_s=5.0, wall_s=100.0)
    clock.advance(2.5)
    clock.set_wall(7.0)
    assert (clock.monotonic(), clock.wall()) == (7.5, 7.0)


def test_swarm_time_starts_at_the_wall_clock_and_ignores_its_jumps() -> None:
    clock = FakeClock()
    swarm = SwarmClock(clock)
    assert swarm.now() == pytest.approx(clock.wall())
    before_s = swarm.now()
    clock.set_wall(0.0)
    clock.advance(1.0)
    assert swarm.now() == pytest.approx(before_s + 1.0)


def test_alone_nothing_moves() -> None:
    swarm = SwarmClock(FakeClock())
    assert swarm.adjust() == 0.0
    assert swarm.step() == 0.0


def test_step_takes_the_peers_time_at_once_in_both_directions() -> None:
    for ahead_s in (3600.0, -3600.0):
        clock = FakeClock()
        swarm = SwarmClock(clock)
        before_s = swarm.now()
        for number in range(3):
            assert exchange(swarm, clock, number, ahead_s)
        assert swarm.step() == pytest.approx(ahead_s)
        assert swarm.now() == pytest.approx(before_s + ahead_s)


def test_half_the_round_trip_is_allowed_for() -> None:
    clock = FakeClock()
    swarm = SwarmClock(clock, offset_s=0.0)
    exchange(swarm, clock, 1, ahead_s=1.0, up_s=0.4, down_s=0.4)
    assert swarm.step() == pytest.approx(1.0)


def test_of_a_peers_samples_the_fastest_counts() -> None:
    clock = FakeClock()
    swarm = SwarmClock(clock, offset_s=0.0)
    exchange(swarm, clock, 1, ahead_s=1.0, up_s=0.01, down_s=0.01)
    exchange(swarm, clock, 1, ahead_s=1.0, up_s=0.0, down_s=1.5)  # lopsided: alone it would say 1.75
    assert swarm.step() == pytest.approx(1.0)


def test_old_samples_make_room() -> None:
    clock = FakeClock()
    swarm = SwarmClock(clock, offset_s=0.0)
    exchange(swarm, clock, 1, ahead_s=5.0)
    for _ in range(8):
        exchange(swarm, clock, 1, ahead_s=1.0, up_s=0.1, down_s=0.1)
    assert swarm.step() == pytest.approx(1.0)


def test_adjust_moves_by_at_most_the_slew_and_converges_to_the_median() -> None:
    clock = FakeClock()
    swarm = SwarmClock(clock, offset_s=0.0)
    for number in range(4):
        exchange(swarm, clock, number, ahead_s=0.2)
    assert swarm.adjust() == pytest.approx(SLEW_S_MAX)
    for _ in range(10):
        swarm.adjust()
    assert swarm.offset_s == pytest.approx(0.2)


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0])
def test_whoever_is_far_off_for_long_catches_up_at_once(ahead_s: float) -> None:
    """It may have started while nobody could tell it the time."""
    clock = FakeClock()
    swarm = SwarmClock(clock, offset_s=0.0)
    before_s = swarm.now()
    for number in range(3):
        exchange(swarm, clock, number, ahead_s)
    moves_s = [abs(swarm.adjust()) for _ in range(STEP_AFTER)]
    assert moves_s == pytest.approx([SLEW_S_MAX] * STEP_AFTER)
    swarm.adjust()
    assert swarm.offset_s == pytest.approx(ahead_s)
    assert swarm.now() == max(before_s, clock.monotonic() + swarm.offset_s)
    assert swarm.adjust() == pytest.approx(0.0)


def test_what_passes_is_no_reason_to_jump() -> None:
    clock = FakeClock()
    swarm = SwarmClock(clock, offset_s=0.0)
    for turn in range(3 * STEP_AFTER):
        for number in range(3):
            exchange(swarm, clock, number, ahead_s=9.0 if turn % STEP_AFTER else 0.0, up_s=1e-3 / (turn + 1))
        assert abs(swarm.adjust()) <= SLEW_S_MAX


def test_two_that_are_apart_meet_and_stay_together() -> None:
    clock = FakeClock()
    pair = [SwarmClock(clock, offset_s=0.0), SwarmClock(clock, offset_s=100.0)]
    for _ in range(10 * STEP_AFTER):
        clock.advance(1.0)
        times_s = [swarm.now() for swarm in pair]
        for number, swarm in enumerate(pair):
            swarm.observe(peer(1 - number), times_s[1 - number], clock.monotonic(), clock.monotonic())
            swarm.adjust()
    assert pair[0].offset_s == pytest.approx(pair[1].offset_s, abs=0.1)


def test_a_minority_of_liars_moves_nothing() -> None:
    clock = FakeClock()
    swarm = SwarmClock(clock, offset_s=0.0)
    for number in range(3):
        exchange(swarm, clock, number, ahead_s=1e9)
    for number in range(3, 6):
        exchange(swarm, clock, number, ahead_s=0.0)
    assert swarm.adjust() == 0.0  # ourselves are the fourth honest one


@pytest.mark.parametrize("their_time_s", [math.nan, math.inf, -math.inf])
def test_a_time_that_is_no_number_does_not_count(their_time_s: float) -> None:
    swarm = SwarmClock(FakeClock())
    assert not swarm.observe(peer(1), their_time_s, 1.0, 1.0)
    assert swarm.peers == 0


def test_a_slow_exchange_does_not_count() -> None:
    clock = FakeClock()
    swarm = SwarmClock(clock)
    assert not exchange(swarm, clock, 1, ahead_s=1.0, up_s=1.0, down_s=1.01)
    assert exchange(swarm, clock, 1, ahead_s=1.0, up_s=1.0, down_s=0.99)


def test_silent_peers_lose_their_vote() -> None:
    clock = FakeClock()
    swarm = SwarmClock(clock, offset_s=0.0)
    exchange(swarm, clock, 1, ahead_s=9.0)
    clock.advance(FORGET_S + 1)
    assert swarm.adjust() == 0.0
    assert swarm.peers == 0


def test_the_number_of_peers_is_bounded() -> None:
    clock = FakeClock()
    swarm = SwarmClock(clock)
    for number in range(PEERS_MAX + 10):
        exchange(swarm, clock, number, ahead_s=0.0)
    assert swarm.peers == PEERS_MAX


def test_swarm_time_never_goes_back_while_adjusting() -> None:
    clock = FakeClock()
    swarm = SwarmClock(clock)
    rng = random.Random(7)
    latest_s = swarm.now()
    for _ in range(500):
        exchange(swarm, clock, rng.randrange(5), rng.uniform(-2, 1), up_s=rng.random() / 100)
        swarm.adjust()
        assert swarm.now() >= latest_s
        latest_s = swarm.now()
