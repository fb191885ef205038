"""What this node answers to `status`, `peers` and their like, on the control API and on its web page."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from braniac.node import control_pb2 as pb
from braniac.node.governor import MANUAL, Governor
from braniac.node.metrics import EventLoopLag
from braniac.node.startup import Equipment
from braniac.node.status import Status
from braniac.protocol import limits
from braniac.protocol.identity import peer_id_text

if TYPE_CHECKING:
    from braniac.node.reachability import Reachability
    from braniac.node.replica import Replica
    from braniac.protocol.engine import Engine
    from braniac.protocol.roster import Member


class Answers:
    """The daemon as its owner sees it, a ControlSource."""

    def __init__(
        self, node: Equipment, status: Status, lag: EventLoopLag, governor: Governor, leave: Callable[..., None]
    ) -> None:
        self.dialled: Reachability | None = None
        """Known once the node takes part in a run."""
        self._node = node
        self._status = status
        self._lag = lag
        self._governor = governor
        self._leave = leave
        self._began_s = node.clock.monotonic()

    def status(self, since_slot: int) -> pb.StatusReply:
        """See ControlSource."""
        node, status = self._node, self._status
        received = node.exchange.received.total()
        reply = pb.StatusReply(
            peer_id=peer_id_text(node.identity.peer_id),
            state=node.metrics.state,
            state_reason=status.reason(),
            protocol_version=limits.PROTOCOL_VERSION,
            uptime_s=node.clock.monotonic() - self._began_s,
            clock_offset_s=status.clock_offset_s(),
            bytes_sent=node.exchange.sent.total(),
            bytes_received=received,
            join_bytes_received=status.join_received_bytes or (received if status.bar else 0),
            join_bytes_needed=status.bar.total_bytes if status.bar else 0,
            loop_lag_p50_s=self._lag.quantile(0.5),
            loop_lag_p99_s=self._lag.quantile(0.99),
            slots=status.records(since_slot),
            reasons=self._governor.messages(),
            caps=self._caps(),
            reachability=self.dialled.latest.reachability if self.dialled else "unknown",
            newest_protocol=node.exchange.newest_protocol,
        )
        if status.engine is not None and status.replica is not None:
            self._add_run(reply, status.engine, status.replica)
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
        reply.peers_live = self._status.peers_live()
        for member in engine.live_peers():
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
        for reason, count in self._status.forfeits.items():
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
        if (engine := self._status.engine) is None:
            return reply
        for member in engine.roster:
            reply.peers.add(
                peer_id=peer_id_text(member.peer),
                tier=member.tier,
                state=_state(engine, member),
                last_heard_s=max(0, engine.slot - member.heard_slot) * engine.manifest.slot_s,
                addresses=member.addresses,
                merged=member.merged,
            )
        for peer in engine.roster.banned:
            reply.peers.add(peer_id=peer_id_text(peer), state="banned")
        return reply

    def contributions(self) -> pb.ContributionsReply:
        """See ControlSource."""
        if (engine := self._status.engine) is None:
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

    async def reachability(self) -> pb.ReachabilityReply:
        """See ControlSource."""
        if self.dialled is None:
            return pb.ReachabilityReply(reachability="unknown", detail="this node has not joined a run yet")
        return await self.dialled.check()

    def pause(self, seconds: float, finish: bool) -> None:
        """See ControlSource."""
        self._governor.pause(seconds, finish)

    def resume(self) -> pb.ResumeReply:
        """See ControlSource."""
        self._governor.resume()
        return pb.ResumeReply(reasons=[reason for reason in self._governor.messages() if reason.code != MANUAL])

    async def leave(self, now: bool) -> None:
        """See ControlSource."""
        self._leave(now=now)


def _state(engine: Engine, member: Member) -> str:
    if not member.live(engine.slot):
        return "silent"
    return "live" if member.tier < engine.manifest.observer_tier else "observer"
