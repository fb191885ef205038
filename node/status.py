"""What this node knows about itself: a record and a log line per slot, troubles, and the metrics that follow from them.

The daemon reports here; answers.py makes replies of it.
"""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import structlog

from braniac.node import control_pb2 as pb
from braniac.node.startup import Equipment
from braniac.node.trainer_thread import Progress
from braniac.protocol import events
from braniac.protocol.identity import peer_id_text, short_name

if TYPE_CHECKING:
    from braniac.node.joiner import DownloadBar
    from braniac.node.replica import Replica
    from braniac.protocol.engine import Engine

log = structlog.get_logger(__name__)

_RECORDS_MAX = 4096


class Status:
    """Watches a daemon. Before it takes part in a run there is little to say."""

    def __init__(self, node: Equipment) -> None:
        self.engine: Engine | None = None
        self.replica: Replica | None = None
        self.bar: DownloadBar | None = None
        """Of the join, if there was one."""
        self.join_received_bytes = 0
        """When training began."""
        self.forfeits: Counter[str] = Counter()
        self._node = node
        self._records: deque[pb.SlotRecord] = deque(maxlen=_RECORDS_MAX)
        self._payload_bytes: dict[int, int] = {}
        self._sent_bytes: dict[int, int] = {}
        self._sent_before = 0
        self._received_bytes: dict[int, int] = {}
        self._received_before = 0
        self._troubles: dict[str, str] = {}
        self._reported = Progress()
        self._reported_throttled_s = 0.0

    # --- what the daemon reports -------------------------------------------------------------------------------------

    def take_part(self, engine: Engine, replica: Replica) -> None:
        """The run is known."""
        self.engine, self.replica = engine, replica
        self._reported = replica.trainer.progress
        self._node.metrics.set_run(engine.manifest.run_id.hex(), engine.manifest.name, str(engine.tier))

    def training_began(self) -> None:
        """The join, if there was one, is over."""
        self.join_received_bytes = self._node.exchange.received.total() if self.bar else 0

    def trouble(self, kind: str, sentence: str) -> None:
        """Something that does not stop the node but should be known; an empty sentence ends it."""
        if sentence and self._troubles.get(kind) != sentence:
            log.warning("trouble", reason=sentence)
        self._troubles[kind] = sentence

    def forfeit(self, reason: str) -> None:
        """Own work was given up."""
        self.forfeits[reason] += 1
        self._node.metrics.forfeited.labels(reason).inc()

    def offered(self, slot: int, payload_bytes: int) -> None:
        """A contribution was announced."""
        self._payload_bytes[slot] = payload_bytes
        _forget_oldest(self._payload_bytes)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one phase of a slot."""
        with self._node.metrics.slot_phase_duration.labels(name).time():
            yield

    def slot_began(self, event: events.SlotBegan) -> None:
        """Once a slot: metrics that follow from counters elsewhere, and whether anybody is there."""
        assert self.engine is not None
        assert self.replica is not None
        metrics, progress = self._node.metrics, self.replica.trainer.progress
        metrics.slot.set(event.slot)
        sent, received = self._node.exchange.sent, self._node.exchange.received
        steady = sent["message"] + sent["blob"]
        self._sent_bytes[event.slot - 1], self._sent_before = steady - self._sent_before, steady
        steady = received["message"] + received["blob"]
        self._received_bytes[event.slot - 1], self._received_before = steady - self._received_before, steady
        _forget_oldest(self._sent_bytes)
        _forget_oldest(self._received_bytes)
        metrics.peers.set(self.peers_live())
        metrics.clock_offset.set(self.clock_offset_s())
        metrics.tokens.inc(progress.tokens - self._reported.tokens)
        metrics.training_steps.inc(progress.steps - self._reported.steps)
        metrics.diverged_steps.inc(progress.diverged - self._reported.diverged)
        metrics.stalled.set(progress.stalled)
        self._reported = progress
        throttled_s = self.replica.trainer.throttled_s
        metrics.cpu_throttled.inc(throttled_s - self._reported_throttled_s)
        self._reported_throttled_s = throttled_s
        metrics.tokens_per_second.set(progress.tokens_per_s)
        metrics.tokens_merged.set(self.engine.history.contributions.of(self.engine.me).tokens)
        if progress.loss is not None:
            metrics.loss.labels("train").set(progress.loss)
        ruined = "the loss is not finite or jumped, going back to the agreed weights"
        self.trouble("training", ruined if progress.stalled else "")
        self.trouble("peers", self._lonely())
        if metrics.state in ("training", "degraded"):
            metrics.set_state("degraded" if self.reason() else "training")

    def report(self, event: events.SlotSettled | events.Equivocated | events.WrongMerge) -> None:
        """The readable line per slot, and its record."""
        if isinstance(event, events.Equivocated):
            log.warning("banned a peer that signed two things", peer=short_name(event.peer), slot=event.slot)
            return
        if isinstance(event, events.WrongMerge):
            log.warning("did not sign a wrong merge", owner=short_name(event.owner), slot=event.slot)
            self._node.metrics.divergences.labels("merge").inc()
            return
        assert self.engine is not None
        assert self.replica is not None
        outcome = self._outcome(event)
        record = pb.SlotRecord(
            slot=event.slot,
            fragment=event.fragment,
            outcome=outcome,
            at_s=self._node.swarm_clock.now(),
            payload_bytes=self._payload_bytes.get(event.slot, 0),
            loss=self.replica.trainer.progress.loss,
        )
        if event.certificate is not None:
            verdict = event.certificate.verdict
            record.certificate, record.contributors = verdict.digest, len(verdict.shares)
            record.owner = peer_id_text(verdict.owner)
        self._records.append(record)
        self._count(event, outcome)
        self._log(event, outcome)

    def _outcome(self, event: events.SlotSettled) -> str:
        assert self.engine is not None
        if not self.engine.manifest.holds(self.engine.tier, event.fragment):
            return "not_held"
        if event.certificate is None:
            return "no_certificate"
        return "merged" if event.merged else "missed"

    def _count(self, event: events.SlotSettled, outcome: str) -> None:
        metrics = self._node.metrics
        metrics.slot_outcomes.labels(outcome).inc()
        if event.certificate is not None and outcome != "not_held":
            metrics.certificates.inc()
        if event.offered:
            metrics.contributions.labels("merged" if event.merged else "unacknowledged").inc()

    def _log(self, event: events.SlotSettled, outcome: str) -> None:
        assert self.engine is not None
        assert self.replica is not None
        if outcome == "not_held" or self._node.metrics.state == "joining":
            return
        progress = self.replica.trainer.progress
        certificate = event.certificate.verdict.digest.hex()[:8] if event.certificate else "none"
        contributors = len(event.certificate.verdict.shares) if event.certificate else 0
        log.info(
            f"slot {event.slot}",
            fragment=event.fragment,
            outcome=outcome,
            loss=round(progress.loss, 3) if progress.loss is not None else None,
            tokens_per_s=round(progress.tokens_per_s),
            peers=self.peers_live(),
            contributors=contributors,
            certificate=certificate,
        )

    # --- what answers.py asks ----------------------------------------------------------------------------------------

    def records(self, since_slot: int) -> list[pb.SlotRecord]:
        """The slots remembered from `since_slot` on."""
        found = [record for record in self._records if record.slot >= since_slot]
        for record in found:  # how much it was is known only when a slot is over
            record.bytes_sent = self._sent_bytes.get(record.slot, 0)
            record.bytes_received = self._received_bytes.get(record.slot, 0)
        return found

    def peers_live(self) -> int:
        """How many peers are there."""
        return len(self.engine.live_peers()) if self.engine else 0

    def reason(self) -> str:
        """What troubles this node; empty if nothing does."""
        if self.engine is None:  # no slots yet in which troubles would be looked for
            return self._lonely()
        return "; ".join(sentence for sentence in self._troubles.values() if sentence)

    def _lonely(self) -> str:
        """Nobody there though somebody should be, and why; empty if all is well."""
        if self.peers_live() or not self._node.config.network.peers:
            return ""
        why = "; ".join(f"{address}: {reason}" for address, reason in self._node.network.failures.items())
        return f"0 peers ({why})" if why else "0 peers"

    def clock_offset_s(self) -> float:
        """How far swarm time is ahead of this machine's clock."""
        return self._node.swarm_clock.now() - self._node.clock.wall()


def _forget_oldest(by_slot: dict[int, int]) -> None:
    """Keep as many slots as there are records: a slot may have been skipped, so its number alone does not tell."""
    while len(by_slot) > _RECORDS_MAX:
        del by_slot[next(iter(by_slot))]
