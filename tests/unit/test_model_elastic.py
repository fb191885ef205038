"""The width controller: single decisions by hand, and what must hold for every series of requests."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braniac.model.elastic import (
    Decision,
    Demand,
    ElasticController,
    ElasticSettings,
    Hold,
    WidthCost,
)
from braniac.model.errors import ConfigError, ModelError

COSTS = (
    WidthCost(width=512, seconds=0.8, loss=1.5),
    WidthCost(width=256, seconds=0.5, loss=1.6),
    WidthCost(width=128, seconds=0.3, loss=1.8),
)
EASY, MIDDLE, HARD = 0.5, 1.5, 2.5

Request = tuple[float, int, float | None]

entropies = st.none() | st.floats(0, 6) | st.sampled_from([1.0, 2.0])
requests = st.lists(st.tuples(st.floats(0, 8), st.integers(0, 12), entropies), max_size=40)


@st.composite
def controllers(draw: st.DrawFn) -> ElasticController:
    """Any controller that may be built: thresholds, times and costs of all sizes, losses in any order."""
    quiet, calm, busy, flooded = sorted(draw(st.lists(st.integers(0, 10), min_size=4, max_size=4)))
    chosen = ElasticSettings(
        quiet=quiet,
        calm=calm,
        busy=max(busy, calm + 1),
        flooded=max(flooded, calm + 1),
        dwell_seconds=draw(st.floats(0, 20)),
        switch_seconds=draw(st.floats(0, 3)),
        seconds_per_nat=draw(st.floats(0, 10)),
    )
    times = sorted(draw(st.sets(st.floats(0.01, 5), min_size=1, max_size=4)))
    costs = [
        WidthCost(width=64 << place, seconds=seconds, loss=draw(st.floats(0, 5))) for place, seconds in enumerate(times)
    ]
    return ElasticController(costs, chosen)


def run(controller: ElasticController, series: list[Request]) -> list[Decision]:
    """Decide for requests that come `pause` seconds after each other."""
    now, decisions = 0.0, []
    for pause, queue, entropy in series:
        now += pause
        decisions.append(controller.decide(now, queue, entropy))
    return decisions


def at(width: int) -> ElasticController:
    """A controller at this width, whose last switch is long ago at time 1000."""
    controller = ElasticController(COSTS)
    now = 0.0
    while controller.width > width:
        controller.decide(now, 100)
        now += 10.0
    return controller


@pytest.mark.parametrize(
    ("start", "queue", "entropy", "width", "demand", "held"),
    [
        (256, 0, EASY, 512, Demand.WIDER_QUIET, None),
        (256, 1, HARD, 512, Demand.WIDER_HARD, Hold.COST),  # 0.3 s of waiting for 0.1 nats: not worth it
        (128, 1, MIDDLE, 128, Demand.STAY, None),
        (128, 1, None, 128, Demand.STAY, None),
        (256, 3, HARD, 256, Demand.STAY, None),
        (256, 3, EASY, 256, Demand.STAY, None),
        (512, 5, EASY, 256, Demand.NARROWER_EASY, None),
        (512, 5, MIDDLE, 512, Demand.STAY, None),
        (512, 5, None, 512, Demand.STAY, None),
        (512, 8, HARD, 256, Demand.NARROWER_FLOODED, None),
        (256, 9, None, 128, Demand.NARROWER_FLOODED, None),
        (128, 9, None, 128, Demand.NARROWER_FLOODED, Hold.BOUND),
        (512, 0, None, 512, Demand.WIDER_QUIET, Hold.BOUND),
    ],
)
def test_one_decision(
    start: int, queue: int, entropy: float | None, width: int, demand: Demand, held: Hold | None
) -> None:
    controller = at(start)
    decision = controller.decide(1000.0, queue, entropy)
    assert (decision.demand, decision.held, decision.previous) == (demand, held, start)
    assert decision.width == controller.width == (start if held else width)
    assert (decision.now, decision.queue, decision.entropy) == (1000.0, queue, entropy)


def test_hard_text_goes_wider_where_a_nat_is_worth_the_wait() -> None:
    controller = ElasticController(COSTS, ElasticSettings(seconds_per_nat=10.0))
    controller.decide(0.0, 100)
    decision = controller.decide(10.0, 1, HARD)
    assert (decision.width, decision.held) == (512, None)
    assert decision.gain == pytest.approx(10.0 * (1.6 - 1.5) - 1 * (0.8 - 0.5))


def test_a_switch_that_does_not_pay_is_not_made() -> None:
    # Ten requests save 0.3 s each and lose 0.1 nats: 2.9 s.
    for cost, width in ((2.8, 256), (3.0, 512)):
        controller = ElasticController(COSTS, ElasticSettings(switch_seconds=cost))
        decision = controller.decide(0.0, 10)
        assert decision.gain == pytest.approx(2.9)
        assert decision.width == width
        assert decision.held == (None if width == 256 else Hold.COST)


def test_a_switch_waits_for_the_dwell_time() -> None:
    controller = ElasticController(COSTS)
    series: list[Request] = [(0.0, 9, None), (4.75, 9, None), (0.25, 0, None), (4.75, 9, None), (0.25, 9, None)]
    decisions = run(controller, series)
    assert [decision.width for decision in decisions] == [256, 256, 512, 512, 256]
    assert [decision.held for decision in decisions] == [None, Hold.DWELL, None, Hold.DWELL, None]


@given(controllers(), requests)
@settings(max_examples=60)
def test_two_switches_are_a_dwell_time_apart_and_one_width_each(
    controller: ElasticController, series: list[Request]
) -> None:
    widths = [cost.width for cost in controller._costs]
    switched: float | None = None
    before = controller.width
    assert before == max(widths)
    for decision in run(controller, series):
        assert decision.previous == before
        assert abs(widths.index(decision.width) - widths.index(before)) <= 1
        if decision.width != before:
            assert switched is None or decision.now - switched >= controller.settings.dwell_seconds
            assert decision.held is None
            assert decision.gain is not None
            assert decision.queue == 0 or decision.gain > controller.settings.switch_seconds
            switched = decision.now
        elif decision.demand is not Demand.STAY:
            assert decision.held is not None
        before = decision.width


@given(controllers(), requests, st.floats(0, 30), st.lists(st.integers(0, 14), min_size=2, max_size=2), entropies)
@settings(max_examples=60)
def test_a_longer_queue_never_gets_a_wider_model(
    controller: ElasticController, series: list[Request], pause: float, queues: list[int], entropy: float | None
) -> None:
    now = sum(request[0] for request in series) + pause
    run(controller, series)
    short, long = (copy.copy(controller).decide(now, queue, entropy).width for queue in sorted(queues))
    assert long <= short


@given(controllers(), requests, st.floats(0, 30), st.integers(0, 14), st.floats(0, 6), st.floats(0, 6))
@settings(max_examples=60)
def test_harder_text_never_gets_a_narrower_model(
    controller: ElasticController, series: list[Request], pause: float, queue: int, one: float, other: float
) -> None:
    now = sum(request[0] for request in series) + pause
    run(controller, series)
    easy, hard = (copy.copy(controller).decide(now, queue, entropy).width for entropy in sorted((one, other)))
    assert easy <= hard


@given(controllers(), requests, entropies)
@settings(max_examples=50)
def test_an_idle_machine_returns_to_the_widest(
    controller: ElasticController, series: list[Request], entropy: float | None
) -> None:
    now = sum(request[0] for request in series)
    run(controller, series)
    for _ in controller._costs[1:]:
        now += controller.settings.dwell_seconds + 1e-6
        controller.decide(now, 0, entropy)
    assert controller.width == max(cost.width for cost in controller._costs)


@given(controllers(), requests, st.sampled_from([1024.0, -4096.0, 2.0**30]))
@settings(max_examples=50)
def test_only_differences_of_time_matter(controller: ElasticController, series: list[Request], start: float) -> None:
    # Pauses in eighths of a second keep the shifted times exact.
    exact = [(round(pause * 8) / 8, queue, entropy) for pause, queue, entropy in series]
    late = [(start, *exact[0][1:]), *exact[1:]] if exact else []
    early = [(0.0, *exact[0][1:]), *exact[1:]] if exact else []
    shifted, plain = run(copy.copy(controller), late), run(controller, early)
    assert [(d.width, d.demand, d.held) for d in shifted] == [(d.width, d.demand, d.held) for d in plain]


def test_a_steady_queue_between_the_thresholds_never_switches() -> None:
    controller = at(256)
    for step in range(100):
        decision = controller.decide(1000.0 + 10 * step, 3, EASY if step % 2 else HARD)
        assert (decision.width, decision.demand) == (256, Demand.STAY)


def test_a_clock_that_went_back_only_holds() -> None:
    controller = ElasticController(COSTS)
    controller.decide(100.0, 9)
    assert controller.decide(0.0, 0).held is Hold.DWELL
    assert controller.decide(105.0, 0).width == 512


@pytest.mark.parametrize(
    "values",
    [
        {"quiet": -1},
        {"calm": 4},
        {"quiet": 3},
        {"busy": 9},
        {"easy_entropy": 2.0},
        {"hard_entropy": math.nan},
        {"dwell_seconds": -1.0},
        {"dwell_seconds": math.inf},
        {"switch_seconds": math.nan},
        {"seconds_per_nat": -0.1},
    ],
)
def test_settings_that_contradict_each_other_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        ElasticSettings(**values)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ((), "at least one width"),
        ((*COSTS, COSTS[0]), "width 512"),
        ((*COSTS, WidthCost(width=64, seconds=0.3, loss=2.0)), "width 128 takes 0.3 s per request and width 64 0.3 s"),
        ((WidthCost(width=64, seconds=math.nan, loss=2.0),), "not finite"),
        ((WidthCost(width=64, seconds=1.0, loss=math.inf),), "not finite"),
    ],
)
def test_costs_that_leave_no_order_are_refused(costs: tuple[WidthCost, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ElasticController(costs)


@pytest.mark.parametrize(
    ("now", "queue", "entropy"),
    [(0.0, -1, None), (0.0, 9, math.nan), (0.0, 9, -0.1), (0.0, 9, math.inf), (math.nan, 9, 0)],
)
def test_a_bad_request_is_refused_and_changes_nothing(now: float, queue: int, entropy: float | None) -> None:
    controller = ElasticController(COSTS)
    with pytest.raises(ModelError, match=f"queue {queue}, entropy {entropy}"):
        controller.decide(now, queue, entropy)
    assert controller.width == 512
    assert controller.decide(0.0, 9).width == 256
