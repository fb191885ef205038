"""What an observer tells Prometheus about a whole swarm, from the signed heartbeats and certificates that it hears.

Gauges are computed when somebody looks, counters follow the engine's events. Loss, speed and version are what peers
say of themselves: signed, and not checked by anybody. So the loss is a median, and the number of versions is bounded.
"""

from __future__ import annotations

import statistics
from collections import Counter as Tally
from collections import defaultdict
from collections.abc import Iterator

from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from braniac.node.clock import Clock, SwarmClock
from braniac.node.metrics import BaseMetrics, fill
from braniac.node.splits import Splits
from braniac.protocol import events
from braniac.protocol.engine import Engine
from braniac.protocol.messages import Certificate
from braniac.protocol.roster import Member

PEER_STATES = ("ready", "joining", "silent", "gone")
OUTCOMES = ("certified", "no_certificate")
CHURN = ("joined", "left", "silent")
BLOBS = ("contribution", "update")
_VERSIONS_MAX = 8  # the rest is "other": what peers say of themselves must not become any number of series
_NOBODY = "unknown"  # tier of a contributor that was not heard


class SwarmMetrics(BaseMetrics):
    """The series of one observer."""

    STATES = ("starting", "joining", "observing", "leaving")
    READY_STATES = ("observing",)

    def __init__(self, version: str, protocol_version: int) -> None:
        super().__init__(version, protocol_version)
        registry = self.registry
        self.slots = Counter(
            "braniac_swarm_slots", "Slots that ended, by whether a verified certificate came.", ["outcome"],
            registry=registry,
        )  # fmt: skip
        self.contributions = Counter(
            "braniac_swarm_contributions", "Contributions in certificates, by tier of the peer.", ["tier"],
            registry=registry,
        )  # fmt: skip
        self.tokens = Counter("braniac_swarm_tokens", "Tokens that certified contributions declare.", registry=registry)
        self.certified_bytes = Counter(
            "braniac_swarm_certified_bytes", "Size of what certificates name.", ["kind"], registry=registry
        )
        self.churn = Counter("braniac_swarm_churn", "Peers that came or went.", ["event"], registry=registry)
        self.bans = Counter("braniac_swarm_bans", "Peers banned for signing two things.", registry=registry)
        fill(self.slots, OUTCOMES)
        fill(self.certified_bytes, BLOBS)
        fill(self.churn, CHURN)

    def note(self, event: events.Event, engine: Engine) -> None:
        """Count an event of the engine."""
        match event:
            case events.SlotSettled(certificate=None):
                self.slots.labels("no_certificate").inc()
            case events.SlotSettled(certificate=certificate) if certificate is not None:
                self.slots.labels("certified").inc()
                self._count(certificate, engine)
            case events.PeerJoined(tier=tier) if tier < engine.manifest.observer_tier:
                self.churn.labels("joined").inc()
            case events.PeerLeft(peer, said_goodbye):
                member = engine.roster.get(peer)
                if member is None or member.tier < engine.manifest.observer_tier:
                    self.churn.labels("left" if said_goodbye else "silent").inc()
            case events.Equivocated():
                self.bans.inc()

    def _count(self, certificate: Certificate, engine: Engine) -> None:
        verdict = certificate.verdict
        self.tokens.inc(certificate.weight)
        self.certified_bytes.labels("update").inc(verdict.update_bytes)
        for share in verdict.shares:
            member = engine.roster.get(share.commitment.peer)
            self.contributions.labels(str(member.tier) if member else _NOBODY).inc()
            self.certified_bytes.labels("contribution").inc(share.commitment.payload_bytes)


class SwarmCollector(Collector):
    """The swarm at the moment of looking."""

    def __init__(self, engine: Engine, splits: Splits, clock: Clock, swarm_clock: SwarmClock) -> None:
        self._engine = engine
        self._splits = splits
        self._clock = clock
        self._swarm_clock = swarm_clock
        self.certified_at_s = clock.monotonic()
        """When the last certificate came, or this began."""

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """See prometheus_client."""
        yield from self._run()
        yield from self._peers()
        yield from self._training()
        yield from self._agreement()

    def _run(self) -> Iterator[GaugeMetricFamily]:
        manifest = self._engine.manifest
        yield _gauge("slot", "The slot the swarm is in, by its own clock.", self._engine.slot)
        yield _gauge("slot_seconds", "Length of a slot.", manifest.slot_s)
        yield _gauge(
            "window_seconds", "Length of a window, in which every fragment is due once.", self._splits.window_s
        )

    def _peers(self) -> Iterator[GaugeMetricFamily]:
        engine, slot, tiers = self._engine, self._engine.slot, self._engine.manifest.tiers
        members = [member for member in engine.roster if member.tier < tiers]
        live = engine.live_peers()
        tally = Tally((_state(member, slot), str(member.tier)) for member in members)
        peers = GaugeMetricFamily("braniac_swarm_peers", "Peers, by state and tier.", labels=["state", "tier"])
        for state in PEER_STATES:
            for tier in map(str, range(tiers)):
                peers.add_metric([state, tier], tally[state, tier])
        yield peers
        yield _gauge("observers", "Others that only listen.", len(engine.roster.live(slot)) - len(live))
        unreachable = sum(not member.dialable(slot) for member in live)
        yield _gauge("unreachable_peers", "Live peers that say nobody can dial them.", unreachable)
        versions = GaugeMetricFamily("braniac_swarm_peer_versions", "Live peers, by their version.", labels=["version"])
        for version, count in _bounded(Tally(member.version or _NOBODY for member in live)).items():
            versions.add_metric([version], count)
        yield versions
        lags = [slot - member.heard_slot for member in live]
        yield _gauge("lag_slots_max", "How far the slowest live peer is behind.", max(lags, default=0))
        yield _gauge("lag_slots_mean", "How far live peers are behind.", statistics.fmean(lags) if lags else 0.0)
        spread_s = self._swarm_clock.spread_s()
        yield _gauge("clock_spread_seconds", "How far a peer's swarm clock is from their median.", spread_s)

    def _training(self) -> Iterator[GaugeMetricFamily]:
        losses: dict[str, list[float]] = defaultdict(list)
        live = self._engine.live_peers()
        for member in live:
            if member.loss is not None:
                losses[str(member.tier)].append(member.loss)
        help_text = "Training loss that live peers say they have: the median."
        loss = GaugeMetricFamily("braniac_swarm_loss_nats_per_byte", help_text, labels=["tier"])
        for tier, values in sorted(losses.items()):
            loss.add_metric([tier], statistics.median(values))
        yield loss
        speed = sum(member.tokens_per_s for member in live)
        yield _gauge("tokens_per_second", "Training speed that live peers say they have: the sum.", speed)

    def _agreement(self) -> Iterator[GaugeMetricFamily]:
        open_s = self._splits.open_s()
        help_text = "Fragments of which live peers show different bytes after the same last slot."
        yield _gauge("split_fragments", help_text, len(open_s))
        yield _gauge("split_seconds", "For how long the oldest of them has been so.", max(open_s, default=0.0))
        age_s = self._clock.monotonic() - self.certified_at_s
        yield _gauge("certificate_age_seconds", "Since the last certificate, or since the observer began.", age_s)


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"braniac_swarm_{name}", help_text, value=value)


def _state(member: Member, slot: int) -> str:
    if member.gone:
        return "gone"
    if not member.live(slot):
        return "silent"
    return "ready" if member.ready_slot >= 0 else "joining"


def _bounded(tally: Tally[str]) -> dict[str, int]:
    """The versions that most peers have, and the others together."""
    most = dict(tally.most_common(_VERSIONS_MAX))
    rest = tally.total() - sum(most.values())
    return most | ({"other": rest} if rest else {})
