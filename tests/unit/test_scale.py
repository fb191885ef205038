"""The simulated phones of benchmarks/scale.py: links that queue, and figures that add up."""

from __future__ import annotations

import json

import pytest
import scale
from phones.links import DOWNLINK_BITS_PER_S, LATENCY_S, UPLINK_BITS_PER_S, Link, Time

SIZE = 1_000_000
UP_S, DOWN_S = SIZE * 8 / UPLINK_BITS_PER_S, SIZE * 8 / DOWNLINK_BITS_PER_S


def arrivals(*sends: tuple[int, int]) -> list[float]:
    """When a megabyte each arrives, sent from and to devices of these numbers, all at once."""
    time, times = Time(100.0), list[float]()
    links = [Link(time) for _ in range(8)]
    for source, target in sends:
        links[source].send(links[target], SIZE, "blob", lambda: times.append(time.now - 100.0))
    time.run_until(200.0)
    assert sum(link.sent["blob"] for link in links) == sum(link.received["blob"] for link in links)
    return times


def test_what_one_sends_goes_out_one_after_another() -> None:
    first = UP_S + LATENCY_S + DOWN_S
    assert arrivals((0, 1), (0, 2), (0, 1)) == pytest.approx([first, first + UP_S, first + 2 * UP_S])


def test_what_one_receives_waits_where_it_comes_in() -> None:
    first = UP_S + LATENCY_S + DOWN_S
    assert arrivals((1, 0), (2, 0), (3, 0)) == pytest.approx([first, first + DOWN_S, first + 2 * DOWN_S])


def test_small_messages_are_counted_and_wait_for_the_uplink_only() -> None:
    time, arrived = Time(0.0), list[float]()
    one, other = Link(time), Link(time)
    one.send(other, SIZE, "blob", lambda: None)
    one.send(other, 100, "vote", lambda: arrived.append(time.now))
    time.run_until(10.0)
    assert arrived == pytest.approx([UP_S + 800 / UPLINK_BITS_PER_S + LATENCY_S])
    assert (one.sent["vote"], other.received["vote"]) == (100, 100)


def test_a_small_swarm_of_phones_certifies_all_slots(capsys: pytest.CaptureFixture[str]) -> None:
    found = scale.measure(3, slots=5, churn_per_h=0.0, pace=0.0, seed=0)
    assert (found["certificate_share"], found["applied_share"]) == (1.0, 1.0)
    assert found["join_s"] is None
    assert found["joining_bytes_per_peer_window"] == 0
    kinds = found["sent_by_kind"]
    assert found["bytes_per_peer_window"] == pytest.approx(sum(kinds.values()), abs=len(kinds))
    manifest, sizes = scale.make_run()
    # Two of three pull each update, unless they have merged it themselves, and the owner and seats each contribution.
    assert kinds.get("updates", 0) <= manifest.window * sizes.update
    assert kinds["contributions"] == pytest.approx(2 * manifest.window * sizes.contribution, rel=0.05)
    assert json.loads(json.dumps(found)) == found


def test_newcomers_join_while_others_vanish() -> None:
    found = scale.measure(4, slots=6, churn_per_h=5.0, pace=1.5, seed=1)
    assert found["departures"] >= 1
    assert found["joining_bytes_per_peer_window"] > 0
