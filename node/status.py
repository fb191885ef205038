"""What this node can say about itself: the control API's answers, the log line per slot, the metrics that follow from
both."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import structlog

from braniac.node import control_pb2 as pb
from braniac.node.governor import MANUAL, Governor
from braniac.node.metrics import EventLoopLag
from braniac.node.startup import Equipment
from braniac.protocol import events, limits
from braniac.protocol.identity import peer_id_text, short_name

if TYPE_CHECKING:
    from braniac.node.joiner import DownloadBar
    from braniac.node.reachability import Reachability
    from braniac.node.replica import Replica
    from braniac.protocol.engine import Engine

log = structlog.get_logger(__name__)

_RECORDS_MAX = 4096


class Status:
    """Watches a daemon. Before it takes part in a run there is little to say."""

    def __init__(self, node: Equipment, lag: EventLoopLag, governor: Governor, leave: Callable[..., None]) -> None:
        self.engine: Engine | None = None
        self.bar: DownloadBar | None = None
        self.dialled: Reachability | None = None
        self._node = node
        self._lag = lag
        self._governor = governor
        self._leave = leave
        self._replica: Replica | None = None
        self._began_s = node.clock.monotonic()
        self._records: deque[pb.SlotRecord] = deque(maxlen=_RECORDS_MAX)
        self._payload_bytes: dict[int, int] = {}
        self._sent_bytes: dict[int, int] = {}
        self._sent_before = 0
        self._received_bytes: dict[int, int] = {}
        self._received_before = 0
        self._join_received_bytes = 0
        self._troubles: dict[str, str] = {}
        self._forfeits: Counter[str] = Counter()
        self._reported_tokens = 0
        self._reported_steps = 0
        self._reported_throttled_s = 0.0

    # --- what the daemon reports -------------------------------------------------------------------------------------

    def take_part(self, engine: Engine, replica: Replica) -> None:
        """The run is known."""
        self.engine, self._replica = engine, replica
        self._reported_tokens, self._reported_steps = replica.trainer.progress.tokens, replica.trainer.progress.steps

    def training_began(self) -> None:
        """The join, if there was one, is over."""
        self._join_received_bytes = self._node.exchange.received.total() if self.bar else 0

    def trouble(self, kind: str, sentence: str) -> None:
        """Something that does not stop the node but should be known; an empty sentence ends it."""
        if sentence and self._troubles.get(kind) != sentence:
            log.warning("trouble", reason=sentence)
        self._troubles[kind] = sentence

    def forfeit(self, reason: str) -> None:
        """Own work was given up."""
        self._forfeits[reason] += 1
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
        assert self._replica is not None
        metrics, progress = self._node.metrics, self._replica.trainer.progress
        metrics.slot.set(event.slot)
        sent, received = self._node.exchange.sent, self._node.exchange.received
        steady = sent["message"] + sent["blob"]
        self._sent_bytes[event.slot - 1], self._sent_before = steady - self._sent_before, steady
        steady = received["message"] + received["blob"]
        self._received_bytes[event.slot - 1], self._received_before = steady - self._received_before, steady
        _forget_oldest(self._sent_bytes)
        _forget_oldest(self._received_bytes)
        metrics.peers.set(self._live())
        metrics.clock_offset.set(self._clock_offset_s())
        metrics.tokens.inc(progress.tokens - self._reported_tokens)
        metrics.training_steps.inc(progress.steps - self._reported_steps)
        self._reported_tokens, self._reported_steps = progress.tokens, progress.steps
        throttled_s = self._replica.trainer.throttled_s
        metrics.cpu_throttled.inc(throttled_s - self._reported_throttled_s)
        self._reported_throttled_s = throttled_s
        metrics.tokens_per_second.set(progress.tokens_per_s)
        metrics.tokens_merged.set(self.engine.history.contributions.of(self.engine.me).tokens)
        if progress.loss is not None:
            metrics.loss.labels("train").set(progress.loss)
        self.trouble("training", "the loss is not finite, waiting for better weights" if progress.stalled else "")
        self.trouble("peers", self._lonely())
        if metrics.state in ("training", "degraded"):
            metrics.set_state("degraded" if self._reason() else "training")

    def report(self, event: events.SlotSettled | events.Equivocated) -> None:
        """The readable line per slot, and its record."""
        if isinstance(event, events.Equivocated):
            log.warning("banned a peer that signed two things", peer=short_name(event.peer), slot=event.slot)
            return
        assert self.engine is not None
        assert self._replica is not None
        outcome = self._outcome(event)
        record = pb.SlotRecord(
            slot=event.slot,
            fragment=event.fragment,
            outcome=outcome,
            at_s=self._node.swarm_clock.now(),
            payload_bytes=self._payload_bytes.get(event.slot, 0),
            loss=self._replica.trainer.progress.loss,
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
        assert self._replica is not None
        if outcome == "not_held" or self._node.metrics.state == "joining":
            return
        progress = self._replica.trainer.progress
        certificate = event.certificate.verdict.digest.hex()[:8] if event.certificate else "none"
        contributors = len(event.certificate.verdict.shares) if event.certificate else 0
        log.info(
            f"slot {event.slot}",
            fragment=event.fragment,
            outcome=outcome,
            loss=round(progress.loss, 3) if progress.loss is not None else None,
            tokens_per_s=round(progress.tokens_per_s),
            peers=self._live(),
            contributors=contributors,
            certificate=certificate,
        )

    # --- what others ask ---------------------------------------------------------------------------------------------

    def status(self, since_slot: int) -> pb.StatusReply:
        """See ControlSource."""
        node = self._node
        slots = [record for record in self._records if record.slot >= since_slot]
        for record in slots:  # how much it was is known only when a slot is over
            record.bytes_sent = self._sent_bytes.get(record.slot, 0)
            record.bytes_received = self._received_bytes.get(record.slot, 0)
        reply = pb.StatusReply(
            peer_id=peer_id_text(node.identity.peer_id),
            state=node.metrics.state,
            state_reason=self._reason(),
            protocol_version=limits.PROTOCOL_VERSION,
            uptime_s=node.clock.monotonic() - self._began_s,
            clock_offset_s=self._clock_offset_s(),
            bytes_sent=node.exchange.sent.total(),
            bytes_received=node.exchange.received.total(),
            join_bytes_received=self._join_received_bytes or (node.exchange.received.total() if self.bar else 0),
            join_bytes_needed=self.bar.total_bytes if self.bar else 0,
            loop_lag_p50_s=self._lag.quantile(0.5),
            loop_lag_p99_s=self._lag.quantile(0.99),
            slots=slots,
            reasons=self._governor.messages(),
            caps=self._caps(),
            reachability=self.dialled.latest.reachability if self.dialled else "unknown",
            newest_protocol=node.exchange.newest_protocol,
        )
        if self.engine is not None and self._replica is not None:
            self._add_run(reply, self.engine, self._replica)
        return reply

    def _caps(self) -> pb.Caps:
        config, throttle, sample = self._node.config, self._node.exchange.throttle, self._governor.sample
        return pb.Caps(
            threads=config.train.threads,
            duty_fraction=config.caps.duty_percent / 100,
            upload_bytes_per_s=throttle.upload.rate,
            download_bytes_per_s=throttle.download.rate,
            daily_bytes=throttle.daily_bytes,
            daily_bytes_used=throttle.meter.used_bytes(),
            disk_bytes=config.caps.disk_mib << 20,
            disk_bytes_used=sample.disk_used_bytes or 0,
            memory_bytes=config.caps.memory_mib << 20,
            memory_bytes_used=sample.memory_bytes or 0,
        )

    def _add_run(self, reply: pb.StatusReply, engine: Engine, replica: Replica) -> None:
        manifest, progress, totals = engine.manifest, replica.trainer.progress, replica.totals
        reply.run_id = manifest.run_id.hex()
        reply.addresses.extend(engine.addresses)
        reply.peers_live = self._live()
        for member in engine.roster.live(engine.slot):
            reply.peers_by_tier[member.tier] += 1
        reply.tier, reply.tiers = engine.tier, manifest.tiers
        reply.parameters, reply.fragments = manifest.parameters(engine.tier), manifest.window
        reply.steps, reply.tokens, reply.tokens_per_s = progress.steps, progress.tokens, progress.tokens_per_s
        if progress.loss is not None:
            reply.train_loss = progress.loss
        reply.slot, reply.slot_s = max(0, engine.slot), manifest.slot_s
        reply.window = max(0, engine.slot) // manifest.window
        reply.certificates, reply.contributions_merged = totals.certificates, totals.merged
        reply.tokens_merged = engine.history.contributions.of(engine.me).tokens
        offered = len(engine.history.offers)
        reply.contributions_unacknowledged = offered - engine.history.acknowledged()
        for reason, count in self._forfeits.items():
            reply.forfeited[reason] = count
        for refusal, count in engine.refused.items():
            reply.refused[refusal.value] = count
        reply.generation = replica.generation
        for state in engine.anchors().values():
            ring = manifest.fragments[state.fragment].ring
            reply.digests.add(fragment=state.fragment, ring=ring, slot=max(0, state.slot), digest=state.digest)

    def peers(self) -> pb.PeersReply:
        """See ControlSource."""
        reply = pb.PeersReply()
        if (engine := self.engine) is None:
            return reply
        for member in engine.roster:
            reply.peers.add(
                peer_id=peer_id_text(member.peer),
                tier=member.tier,
                state="live" if member.live(engine.slot) else "silent",
                last_heard_s=max(0, engine.slot - member.heard_slot) * engine.manifest.slot_s,
                addresses=member.addresses,
                merged=member.merged,
            )
        for peer in engine.roster.banned:
            reply.peers.add(peer_id=peer_id_text(peer), state="banned")
        return reply

    def pause(self, seconds: float, finish: bool) -> None:
        """See ControlSource."""
        self._governor.pause(seconds, finish)

    def resume(self) -> pb.ResumeReply:
        """See ControlSource."""
        self._governor.resume()
        return pb.ResumeReply(reasons=[reason for reason in self._governor.messages() if reason.code != MANUAL])

    async def reachability(self) -> pb.ReachabilityReply:
        """See ControlSource."""
        if self.dialled is None:
            return pb.ReachabilityReply(reachability="unknown", detail="this node has not joined a run yet")
        return await self.dialled.check()

    def contributions(self) -> pb.ContributionsReply:
        """See ControlSource."""
        if (engine := self.engine) is None:
            return pb.ContributionsReply()
        record = engine.history.contributions
        reply = pb.ContributionsReply(first_slot=record.first_slot or 0, certificates=record.certificates)
        for peer, total in record.ranking():
            member, me = engine.roster.get(peer), peer == engine.me
            reply.contributors.add(
                peer_id=peer_id_text(peer),
                tier=engine.tier if me else member.tier if member else 0,
                contributions=total.contributions,
                tokens=total.tokens,
                me=me,
            )
        return reply

    async def leave(self, now: bool) -> None:
        """See ControlSource."""
        self._leave(now=now)

    def _live(self) -> int:
        return len(self.engine.roster.live(self.engine.slot)) if self.engine else 0

    def _reason(self) -> str:
        if self.engine is None:  # no slots yet in which troubles would be looked for
            return self._lonely()
        return "; ".join(sentence for sentence in self._troubles.values() if sentence)

    def _lonely(self) -> str:
        """Nobody there though somebody should be, and why; empty if all is well."""
        if self._live() or not self._node.config.network.peers:
            return ""
        why = "; ".join(f"{address}: {reason}" for address, reason in self._node.network.failures.items())
        return f"0 peers ({why})" if why else "0 peers"

    def _clock_offset_s(self) -> float:
        return self._node.swarm_clock.now() - self._node.clock.wall()


def _forget_oldest(by_slot: dict[int, int]) -> None:
    """Keep as many slots as there are records: a slot may have been skipped, so its number alone does not tell."""
    while len(by_slot) > _RECORDS_MAX:
        del by_slot[next(iter(by_slot))]
