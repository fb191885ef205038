"""What a daemon tells Prometheus: every series by name and meaning, and the measure of the event loop's lag.

Every label value exists from the start, so that a rate is zero rather than absent. No label names a peer: the number of
series must not grow with the swarm; rows per peer are in the control API.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from braniac.node.clock import Clock
from braniac.node.policy import CODES
from braniac.protocol.errors import Refusal

SLOT_OUTCOMES = ("merged", "missed", "no_certificate", "not_held")
CONTRIBUTION_OUTCOMES = ("merged", "unacknowledged", "refused")
FORFEIT_REASONS = ("killed", "too_old", "refused", "clipped", "diverged")
# Two certificates for one slot; other bytes than the majority; own loss; an owner's update is not what it merged.
DIVERGENCES = ("fork", "digest", "loss", "merge")
DIRECTIONS = ("sent", "received")
TRAFFIC_KINDS = ("message", "blob", "anchor")  # signed messages; contributions and updates; downloads of joiners
SPLITS = ("train", "validation")
PAUSE_REASONS = ("manual", *CODES)
PHASES = ("compress", "offer", "merge", "check", "fetch", "apply", "checkpoint")

_PHASE_BUCKETS_S = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
_LAG_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_LAG_PERIOD_S = 0.02
_LAG_PERIOD_RESTING_S = 5.0
_LAGS_KEPT = 4096

_Metric = TypeVar("_Metric", Counter, Gauge, Histogram)


class BaseMetrics:
    """What every kind of daemon has: build, state, messages, traffic and the event loop, in a registry of their own."""

    STATES: tuple[str, ...]
    READY_STATES: tuple[str, ...]
    """Those in which it does what it is for."""

    def __init__(self, version: str, protocol_version: int) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # otherwise each counter has a second series
        self.version = version
        self.registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self.registry)
        build = Info("braniac_build", "What is running.", registry=self.registry)
        build.info({"version": version, "protocol": str(protocol_version)})
        self._state = Gauge("braniac_node_state", "1 for the node's state.", ["state"], registry=self.registry)
        self._add_network(self.registry)
        self.set_state("starting")

    def _add_network(self, registry: CollectorRegistry) -> None:
        self.peers = Gauge("braniac_peers", "Peers heard lately.", registry=registry)
        self.clock_offset = Gauge("braniac_clock_offset_seconds", "Swarm time less local time.", registry=registry)
        self.messages_received = Counter(
            "braniac_messages_received_total", "Messages from peers, accepted and refused.", registry=registry
        )
        self.messages_accepted = Counter(
            "braniac_messages_accepted_total", "Messages from peers that passed every check.", registry=registry
        )
        self.messages_refused = Counter(
            "braniac_messages_refused_total", "Messages from peers that failed a check.", ["code"], registry=registry
        )
        self.net_bytes = Counter(
            "braniac_net_bytes_total", "Bytes exchanged with peers.", ["direction", "kind"], registry=registry
        )
        self.event_loop_lag = Histogram(
            "braniac_event_loop_lag_seconds",
            "How much later than asked the event loop woke a task.",
            buckets=_LAG_BUCKETS_S,
            registry=registry,
        )
        fill(self.messages_refused, Refusal)
        fill(self.net_bytes, DIRECTIONS, TRAFFIC_KINDS)

    @property
    def state(self) -> str:
        """One of STATES."""
        return self._current

    @property
    def ready(self) -> bool:
        """Whether it is in one of READY_STATES."""
        return self._current in self.READY_STATES

    def set_state(self, state: str) -> None:
        """Enter one of STATES."""
        assert state in self.STATES, state
        self._current = state
        for other in self.STATES:
            self._state.labels(other).set(other == state)

    def set_run(self, run_id: str, name: str, tier: str) -> None:
        """Note, once, which run this is about."""
        run = Info("braniac_run", "Which run, and how much of its model is held.", registry=self.registry)
        run.info({"run_id": run_id, "name": name, "tier": tier})

    def accept_message(self) -> None:
        """Count a message from a peer as received and accepted."""
        self.messages_received.inc()
        self.messages_accepted.inc()

    def refuse_message(self, refusal: Refusal) -> None:
        """Count a message from a peer as received and refused."""
        self.messages_received.inc()
        self.messages_refused.labels(refusal.value).inc()

    def exposition(self) -> bytes:
        """All series, in Prometheus' text format."""
        return generate_latest(self.registry)


class Metrics(BaseMetrics):
    """The series of one node that trains, each a typed attribute."""

    STATES = ("starting", "joining", "training", "degraded", "paused", "leaving")
    READY_STATES = ("training", "degraded")  # a founder trains alone until others come

    def __init__(self, version: str, protocol_version: int) -> None:
        super().__init__(version, protocol_version)
        self._add_rounds(self.registry)
        self._add_training(self.registry)
        self._add_limits(self.registry)
        self.set_paused(())

    def _add_rounds(self, registry: CollectorRegistry) -> None:
        self.slot = Gauge("braniac_slot", "The slot the swarm is in, by this node's clock.", registry=registry)
        self.slot_outcomes = Counter(
            "braniac_slot_outcomes_total", "Slots that ended, by their outcome here.", ["outcome"], registry=registry
        )
        self.slot_phase_duration = Histogram(
            "braniac_slot_phase_duration_seconds",
            "How long each phase of a slot took.",
            ["phase"],
            buckets=_PHASE_BUCKETS_S,
            registry=registry,
        )
        self.certificates = Counter("braniac_certificates_total", "Certificates applied.", registry=registry)
        self.contributions = Counter(
            "braniac_contributions_total", "Own contributions, by what came of them.", ["outcome"], registry=registry
        )
        self.forfeited = Counter(
            "braniac_forfeited_total", "Times that own work was given up.", ["reason"], registry=registry
        )
        self.divergences = Counter(
            "braniac_divergences_total", "Disagreements with the swarm that were found.", ["kind"], registry=registry
        )
        fill(self.slot_outcomes, SLOT_OUTCOMES)
        fill(self.slot_phase_duration, PHASES)
        fill(self.contributions, CONTRIBUTION_OUTCOMES)
        fill(self.forfeited, FORFEIT_REASONS)
        fill(self.divergences, DIVERGENCES)

    def _add_training(self, registry: CollectorRegistry) -> None:
        self.loss = Gauge("braniac_loss_nats_per_byte", "The latest loss.", ["split"], registry=registry)
        self.tokens = Counter("braniac_tokens_total", "Tokens trained on.", registry=registry)
        self.tokens_merged = Gauge(  # no counter: a certificate that is replaced takes its tokens back
            "braniac_tokens_merged", "Weight of own contributions in certificates, over all lives.", registry=registry
        )
        self.tokens_per_second = Gauge("braniac_tokens_per_second", "Training speed, lately.", registry=registry)
        self.training_steps = Counter("braniac_training_steps_total", "Inner optimizer steps.", registry=registry)
        self.checkpoint_generation = Gauge(
            "braniac_checkpoint_generation", "The last generation that is durable.", registry=registry
        )
        self.checkpoint_failures = Counter(
            "braniac_checkpoint_failures_total", "Generations that could not be written.", registry=registry
        )
        self.checkpoint_time = Gauge(
            "braniac_checkpoint_timestamp_seconds",
            "Unix time at which the last generation became durable; of the start, before the first.",
            registry=registry,
        )
        self.diverged_steps = Counter(
            "braniac_training_diverged_steps_total",
            "Inner steps that were given up because the loss was not finite.",
            registry=registry,
        )
        self.stalled = Gauge(
            "braniac_training_stalled",
            "1 while no step has a finite loss and the trainer waits for better weights.",
            registry=registry,
        )
        for split in SPLITS:
            self.loss.labels(split).set(float("nan"))  # not yet known, which a zero would not say

    def _add_limits(self, registry: CollectorRegistry) -> None:
        help_text = "1 for each reason to rest that holds."
        self._paused = Gauge("braniac_paused", help_text, ["reason"], registry=registry)
        self.cpu_throttled = Counter(
            "braniac_cpu_throttled_seconds_total",
            "Time not spent on training for the sake of the cap on the duty cycle.",
            registry=registry,
        )
        self.quota = Gauge("braniac_quota_bytes", "Bytes to exchange per day at most; 0: any.", registry=registry)
        self.quota_used = Gauge("braniac_quota_used_bytes", "Bytes exchanged since midnight.", registry=registry)

    def set_paused(self, reasons: Iterable[str]) -> None:
        """Note which of PAUSE_REASONS hold."""
        holding = set(reasons)
        assert holding <= set(PAUSE_REASONS), holding
        for reason in PAUSE_REASONS:
            self._paused.labels(reason).set(reason in holding)


def fill(metric: _Metric, *values: Iterable[str]) -> None:
    """Make the child of every combination of label values, so that each series starts at zero."""
    for combination in itertools.product(*values):
        metric.labels(*combination)


class EventLoopLag:
    """Measures how late the event loop runs what is due, as any other task would suffer it."""

    def __init__(
        self,
        histogram: Histogram,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        resting: Callable[[], bool] = lambda: False,
    ) -> None:
        """While `resting` says so it looks seldom, because a node at rest should hardly wake the processor."""
        self._histogram = histogram
        self._clock = clock
        self._sleep = sleep
        self._resting = resting
        self._lags_s: deque[float] = deque(maxlen=_LAGS_KEPT)

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            period_s = _LAG_PERIOD_RESTING_S if self._resting() else _LAG_PERIOD_S
            due_s = self._clock.monotonic() + period_s
            await self._sleep(period_s)
            lag_s = max(0.0, self._clock.monotonic() - due_s)
            self._lags_s.append(lag_s)
            self._histogram.observe(lag_s)

    def quantile(self, q: float) -> float:
        """The q-quantile in seconds of the last 4096 samples (82 s of work), nearest rank; 0 before the first."""
        assert 0 <= q <= 1
        lags_s = sorted(self._lags_s)
        return lags_s[min(int(q * len(lags_s)), len(lags_s) - 1)] if lags_s else 0.0
