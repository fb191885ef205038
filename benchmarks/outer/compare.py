"""Running methods on the same plan: figures of one run, and a sweep of plans and learning rates per method."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from braniac.model.errors import TrainingDiverged
from braniac.model.sources import Corpus
from outer.methods import Method
from outer.swarm import Plan

POINTS = 6
"""At most so many evaluations in the course of a run."""

PHONE_UP_BYTES_PER_S = 1_250_000
PHONE_DOWN_BYTES_PER_S = 6_250_000
"""10 Mbit/s up, 50 down."""


@dataclass(frozen=True)
class Point:
    """How far a run has come after a window."""

    step: int
    loss: float
    """Held-out, in nats per byte; learning rates have not fallen yet, unless it is the last."""
    bytes_per_peer: float
    """Uplink so far."""
    link_s: float
    """How long the busiest phone's link was occupied so far."""


@dataclass(frozen=True)
class Outcome:
    """What one run of one method gave: a row of a CSV, and its course."""

    method: str
    seed: int
    rate: float
    outer_rate: float
    missing_percent: int
    windows: int
    up: int
    """Braniac: values of 4,096 in a contribution."""
    down: int
    """Braniac: values of 4,096 in an update."""
    loss: float
    """Held-out, in nats per byte; infinite if the training diverged."""
    bytes_per_peer: float
    """Uplink of the run."""
    downlink_bytes_per_peer: float
    largest_message_bytes: int
    peak_to_mean: float
    """Of the uplink in the course of one step, of the peer with the worst."""
    cpu_s: float
    course: tuple[Point, ...] = ()


def run(name: str, method: Method, plan: Plan, corpus: Corpus) -> Outcome:
    """Train from the beginning, and take the loss now and then; a line on stderr says what came of it."""
    began_s = time.process_time()
    swarm = method(plan, corpus)
    course: list[Point] = []
    period = -(-plan.windows // POINTS) * swarm.slots_per_window

    def watch(slot: int) -> None:
        if (slot + 1) % period and slot + 1 < swarm.slots:
            return
        step, books = swarm.steps_until(slot + 1), swarm.books
        link_s = books.link_s(step, PHONE_UP_BYTES_PER_S, PHONE_DOWN_BYTES_PER_S)
        course.append(Point(step, swarm.loss(), float(books.uplink[:step].sum(0).mean()), link_s))

    try:
        swarm.run(watch)
        loss = course[-1].loss
    except TrainingDiverged:
        loss = math.inf
    outcome = Outcome(
        method=name,
        seed=plan.seed,
        rate=plan.rate,
        outer_rate=plan.outer_rate,
        missing_percent=plan.missing_percent,
        windows=plan.windows,
        up=plan.up.per_tile,
        down=plan.down.per_tile,
        loss=loss if math.isfinite(loss) else math.inf,
        bytes_per_peer=swarm.books.bytes_per_peer,
        downlink_bytes_per_peer=swarm.books.downlink_bytes_per_peer,
        largest_message_bytes=swarm.books.largest_message,
        peak_to_mean=round(swarm.books.peak_to_mean(), 3),
        cpu_s=round(time.process_time() - began_s, 2),
        course=tuple(course),
    )
    rates = f"rates {plan.rate:g}, {plan.outer_rate:g}"
    sys.stderr.write(f"{name}, seed {plan.seed}, {rates}: {outcome.loss:.4f} after {outcome.cpu_s:.0f} s of a core\n")
    return outcome


Runs = Callable[[str, Method, Plan, Corpus], Outcome]
"""Does a run like `run`, and may do it somewhere else."""


@contextmanager
def workers(jobs: int) -> Iterator[Runs]:
    """Runs in so many processes, for as many threads that wait for them; one job is done where it is asked for."""
    if jobs == 1:
        yield run
        return
    spawning = multiprocessing.get_context("spawn")  # forking would copy locks that torch's threads hold
    with ProcessPoolExecutor(jobs, spawning, torch.set_num_threads, (torch.get_num_threads(),)) as processes:

        def elsewhere(name: str, method: Method, plan: Plan, corpus: Corpus) -> Outcome:
            return processes.submit(run, name, method, plan, corpus).result()

        yield elsewhere


@dataclass(frozen=True)
class Contest:
    """A method and what it is to be tried with, on the first seed."""

    name: str
    method: Method
    plans: Sequence[Plan]
    rates: Sequence[float] = (1.0,)
    outer_rates: Sequence[float] = (1.0,)


@dataclass(frozen=True)
class Sweep:
    """All runs of one method."""

    tried: tuple[Outcome, ...]
    """One per plan and pair of learning rates that was tried, with the first seed."""
    best: tuple[Outcome, ...]
    """One per seed, with the plan and rates of the lowest loss."""
    plan: Plan = field(repr=False)
    """The best."""

    def summary(self) -> dict[str, object]:
        """Means over the seeds, in a form for JSON; no figures if a run diverged at the best rates."""
        losses = [outcome.loss for outcome in self.best]
        first = self.best[0]
        if not all(map(math.isfinite, losses)):
            return {"diverged": True, "rate": first.rate, "outer_rate": first.outer_rate}
        up, down = (
            round(statistics.mean(getattr(outcome, name) for outcome in self.best))
            for name in ("bytes_per_peer", "downlink_bytes_per_peer")
        )
        return {
            "loss": round(statistics.mean(losses), 5),
            "loss_by_seed": [round(loss, 5) for loss in losses],
            "bytes_per_peer": up,
            "downlink_bytes_per_peer": down,
            "traffic_per_peer": up + down,
            "largest_message_bytes": max(outcome.largest_message_bytes for outcome in self.best),
            "peak_to_mean": max(outcome.peak_to_mean for outcome in self.best),
            "rate": first.rate,
            "outer_rate": first.outer_rate,
        }


def sweep(contest: Contest, corpus: Corpus, seeds: Sequence[int], do: Runs = run) -> Sweep:
    """Try the plans and inner rates with the first outer rate, then the other outer rates with the best of these.

    All that with the first seed; the others get what was best.
    """

    def each(plans: Sequence[Plan]) -> list[tuple[Outcome, Plan]]:
        with ThreadPoolExecutor(max(1, len(plans))) as threads:
            found = threads.map(lambda plan: do(contest.name, contest.method, plan, corpus), plans)
            return list(zip(found, plans, strict=True))

    def best_of(tried: Sequence[tuple[Outcome, Plan]]) -> Plan:
        return min(tried, key=lambda pair: pair[0].loss)[1]

    first = [replace(plan, seed=seeds[0], outer_rate=contest.outer_rates[0]) for plan in contest.plans]
    tried = each([replace(plan, rate=rate) for plan in first for rate in contest.rates])
    better = best_of(tried)
    tried += each([replace(better, outer_rate=outer_rate) for outer_rate in contest.outer_rates[1:]])
    plan = best_of(tried)
    (best,) = (outcome for outcome, its_plan in tried if its_plan is plan)
    others = each([replace(plan, seed=seed) for seed in seeds[1:]])
    return Sweep(tuple(outcome for outcome, _ in tried), (best, *(outcome for outcome, _ in others)), plan)


def sweeps(contests: Sequence[Contest], corpus: Corpus, seeds: Sequence[int], do: Runs) -> Iterator[Sweep]:
    """All of them, side by side if runs are; each comes when it and those before it are over."""
    with ThreadPoolExecutor(max(1, len(contests) if do is not run else 1)) as threads:
        waiting: list[Future[Sweep]] = [threads.submit(sweep, each, corpus, seeds, do) for each in contests]
        for future in waiting:
            yield future.result()


def rates_for(given: Sequence[str], known: Sequence[str]) -> Mapping[str, list[float]]:
    """Rates per method, from options like `0.5,1,2` (for all) and `demo=1,4` (for one).

    Raises ValueError for what is no list of positive numbers, or for no method.
    """
    found: dict[str, list[float]] = {name: [1.0] for name in known}
    for option in sorted(given, key=lambda text: "=" in text):  # what is for one method counts more
        name, _, numbers = option.rpartition("=")
        if name and name not in known:
            raise ValueError(f"rates are given for {name!r}, which is not compared: choose from {', '.join(known)}.")
        try:
            rates = [float(number) for number in numbers.split(",")]
        except ValueError:
            rates = []
        if not rates or not all(rate > 0 and math.isfinite(rate) for rate in rates):
            raise ValueError(f"{option!r} is no list of rates: give positive numbers like 0.5,1,2 or demo=1,4.")
        found |= dict.fromkeys([name] if name else known, rates)
    return found
