"""The checkers: what they watch in every node, and the invariants that need no books (I3, I5, I7).

They stand beside the code under test: they see what it says on the wire and what it answers to its engine, and share
none of its decisions. The ledger and the agreement are in books.py.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from braniac.node.startup import Membership
from braniac.protocol import events, limits
from braniac.protocol import messages_pb2 as pb
from braniac.protocol.bitpack import Int64Array
from braniac.protocol.identity import PeerId
from braniac.protocol.merge import Contribution, merge
from braniac.protocol.messages import FragmentState, Verdict
from tests.sim.books import Anchors, Ledger

if TYPE_CHECKING:
    from tests.sim.node import Life, Machine
    from tests.sim.world import World

_EVENTS_MAX = 256
_JOBS_MAX = 64
_FILES_PER_GENERATION = 64
_TASKS_MAX = 512


class Statements:
    """What each identity has ever signed or numbered, in all its lives (I3)."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._said: dict[tuple[str, PeerId, int], bytes] = {}
        self._sequences: dict[PeerId, set[int]] = defaultdict(set)
        self._last: bytes = b""

    def sent(self, life: Life, data: bytes) -> None:
        """A sealed message leaves a node. The same one to many peers counts once."""
        if data is self._last:
            return
        self._last = data
        content = pb.Content.FromString(pb.Envelope.FromString(data).content)
        me, name = PeerId(content.sender), life.machine.name
        if content.sequence in self._sequences[me]:
            self._world.violated("I3 monotone", name, f"sequence number {content.sequence} was used twice")
        self._sequences[me].add(content.sequence)
        match content.WhichOneof("body"):
            case "vote":
                self._note("votes", me, content.vote.slot, content.vote.verdict_digest, name)
            case "proposal":  # an owner signs what it proposes
                digest = hashlib.sha256(content.proposal.verdict).digest()
                self._note("votes", me, pb.Verdict.FromString(content.proposal.verdict).slot, digest, name)
            case "certificate":
                digest = hashlib.sha256(content.certificate.verdict).digest()
                slot = pb.Verdict.FromString(content.certificate.verdict).slot
                for signature in content.certificate.signatures:
                    self._note("votes", PeerId(signature.peer), slot, digest, name)
            case "offer":
                commitment = pb.Commitment.FromString(content.offer.commitment.body)
                self._note("commitments", me, commitment.slot, content.offer.commitment.body, name)

    def _note(self, kind: str, peer: PeerId, slot: int, what: bytes, name: str) -> None:
        if self._said.setdefault((kind, peer, slot), what) != what:
            self._world.violated("I3 monotone", name, f"signed two different {kind} for slot {slot}")


class Checks:
    """All checkers of one simulation."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.anchors = Anchors(world)
        self.ledgers = {
            machine.identity.peer_id: Ledger(world, machine.name, self.anchors) for machine in world.machines
        }
        self.statements = Statements(world)
        self.settled: dict[int, dict[str, events.SlotSettled]] = defaultdict(dict)
        """slot -> machine -> what it reported, the last time."""
        self.payloads: dict[bytes, bytes] = {}
        """Every payload that was offered."""
        self._merges: dict[bytes, bytes] = {}
        """Verdict digest -> hash of the update that its contributions make."""
        self._swarm_time_s: dict[PeerId, float] = {}

    # --- watching ----------------------------------------------------------------------------------------------------

    def began(self, life: Life, membership: Membership) -> None:
        """A process has its replica and its engine, and does nothing yet: look at them, and watch them from now on."""
        engine, replica, trainer, equipment = life.engine, life.replica, life.trainer, life.equipment
        assert engine is not None
        assert replica is not None
        assert trainer is not None
        assert equipment is not None
        saved = membership.saved
        if saved is not None and equipment.swarm_clock.now() < saved.swarm_time_s:
            self._world.violated("I3 monotone", life.machine.name, "swarm time went back over a restart")
        ledger = self.ledgers[life.machine.identity.peer_id]
        ledger.began(life, saved is not None)
        trainer.watcher = _Watcher(life, ledger)

        def offered(slot: int, digest: bytes, size: int, weight: int) -> None:
            self.payloads[digest] = equipment.store.get(digest)
            ledger.offered(slot, digest)

        def moved(update: events.UpdateDue, state: FragmentState) -> None:
            ledger.applied(update, state)
            self._check_merge(life, update.certificate.verdict)

        _before(engine, "offer", offered, life)
        _before(engine, "anchor_moved", moved, life)
        _before(engine, "fragment_restored", ledger.restored, life)
        sending, next_event = engine.messages_to_send, engine.next_event

        def messages_to_send() -> list[tuple[PeerId, bytes]]:
            messages = sending()
            if not life.dead:
                for _, data in messages:
                    self.statements.sent(life, data)
            return messages

        def watched_event() -> events.Event | None:
            event = next_event()
            if isinstance(event, events.SlotSettled) and not life.dead:
                self.settled[event.slot][life.machine.name] = event
            return event

        engine.messages_to_send = messages_to_send  # type: ignore[method-assign]
        engine.next_event = watched_event  # type: ignore[method-assign]

    def _check_merge(self, life: Life, verdict: Verdict) -> None:
        """I4: the update is what its contributions make, in whatever order they come."""
        if verdict.digest in self._merges:
            return
        given = [
            Contribution(commitment.peer, commitment.weight, self.payloads[commitment.payload_digest])
            for commitment in verdict.commitments
            if commitment.payload_digest in self.payloads
        ]
        merged = merge(self._world.manifest, verdict.fragment, given[::-1])
        if merged is None or merged.digest != verdict.update_digest or len(given) != len(verdict.commitments):
            self._world.violated("I4 no poison", life.machine.name, f"slot {verdict.slot}: not what its shares make")
        self._merges[verdict.digest] = verdict.update_digest

    # --- now and then ------------------------------------------------------------------------------------------------

    def look(self) -> None:
        """What must hold at every moment in every process that is awake."""
        for machine in self._world.machines:
            life = machine.life
            if life is None or life.engine is None or life.daemon is None or life.dead:
                continue
            self._check_counters(life)
            self._check_bans(life)
            self._check_bounds(life)

    def _check_counters(self, life: Life) -> None:
        engine = life.engine
        assert engine is not None
        if engine.received != engine.accepted + sum(engine.refused.values()):
            self._world.violated("I7 honest refusals", life.machine.name, "a message is not accounted for")
        assert life.transport is not None
        if life.transport.traffic.answers["failed"]:
            self._world.violated("I7 honest refusals", life.machine.name, "a request made the node fail")

    def _check_bans(self, life: Life) -> None:
        engine = life.engine
        assert engine is not None
        for machine in self._world.machines:
            if machine.identity.peer_id in engine.roster.banned:
                self._world.violated("I3 monotone", life.machine.name, f"holds a proof against {machine.name}")

    def _check_bounds(self, life: Life) -> None:
        engine, daemon, manifest = life.engine, life.daemon, self._world.manifest
        assert engine is not None
        assert daemon is not None
        horizon = engine.history.horizon + limits.ROSTER_LIVE_SLOTS
        ahead = sum(slot > engine.slot for slot in engine.history._entries)  # of a life whose clock was ahead
        sizes: dict[str, tuple[int, int]] = {
            "certificates": (len(engine.history._entries) - ahead, horizon),
            "certificates of slots to come": (ahead, horizon),
            "offers": (len(engine.history.offers), horizon),
            "open rounds": (len(engine._rounds._rounds), limits.PROPOSAL_OPEN_SLOTS + 4),
            "witnessed slots": (len(engine._witness._signed), manifest.window + 2),
            "members": (len(engine.roster), len(self._world.machines)),
            "events": (len(engine._events), _EVENTS_MAX),
            "jobs": (daemon.path._ordered.qsize(), _JOBS_MAX + 4 * manifest.window),
            "tasks": (len(daemon._tasks._tasks), _TASKS_MAX),
        }
        for what, (count, most) in sizes.items():
            if count > most:
                self._world.violated("I5 bounded", life.machine.name, f"{count} {what}, and {most} are enough")

    # --- what became of slots ----------------------------------------------------------------------------------------

    def settled_since(self, slot: int) -> list[int]:
        """Slots after that one which got a certificate."""
        return [
            s
            for s, reports in self.settled.items()
            if s > slot and any(report.certificate for report in reports.values())
        ]

    def incomplete(self, machines: Sequence[Machine], first: int, last: int) -> str:
        """Which of these slots lacks a certificate with the work of all of them in it; empty if none does."""
        for slot in range(first, last + 1):
            fragment = self._world.manifest.fragment_of(slot)
            holders = {m.identity.peer_id for m in machines if self._world.manifest.holds(m.tier, fragment)}
            for machine in machines:
                report = self.settled[slot].get(machine.name)
                certificate = report.certificate if report else None
                if certificate is None:
                    return f"slot {slot} has no certificate at {machine.name}"
                listed = {share.commitment.peer for share in certificate.verdict.shares}
                if listed != holders:
                    return f"slot {slot} lacks the work of {len(holders - listed)} of {len(holders)}"
        return ""

    def check_disks(self) -> None:
        """I5 on disk: files do not pile up."""
        for machine in self._world.machines:
            files = sum(1 for path in (machine.root / "blobs").rglob("*") if path.is_file())
            horizon = limits.HISTORY_WINDOWS * self._world.manifest.window
            if files > 8 * _FILES_PER_GENERATION + 8 * horizon:
                self._world.violated("I5 bounded", machine.name, f"{files} files in its store")


class _Watcher:
    """See training.Watcher: for as long as the process lives."""

    def __init__(self, life: Life, ledger: Ledger) -> None:
        self._life = life
        self._ledger = ledger

    def stepped(self, fragment: int, change: Int64Array) -> None:
        if not self._life.dead:
            self._ledger.stepped(fragment, change)

    def seen(self, fragment: int, weights: Tensor) -> None:
        if not self._life.dead:
            self._ledger.seen(fragment, weights)

    def loaded(self, fragment: int) -> None:
        if not self._life.dead:
            self._ledger.loaded(fragment)


def _before(engine: Any, method: str, look: Callable[..., None], life: Life) -> None:
    """Let a checker look at what the engine is told, just before it hears it."""
    told = getattr(engine, method)

    def tell(*args: Any, **kwargs: Any) -> Any:
        if not life.dead:
            look(*args, **kwargs)
        return told(*args, **kwargs)

    setattr(engine, method, tell)
