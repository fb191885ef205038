"""One phone: a production engine, and answers to its events that move sizes instead of payloads."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from braniac.protocol import events
from braniac.protocol.engine import Engine
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.history import History
from braniac.protocol.identity import PeerId
from braniac.protocol.merge import Merged
from braniac.protocol.messages import FragmentState
from phones.links import REPLY_BYTES, Link, Pace
from phones.run import identity

if TYPE_CHECKING:
    from phones.swarm import Swarm

CHUNK_BYTES = 1 << 18
CHUNKS_AT_ONCE = 4
FRAGMENTS_AT_ONCE = 4  # downloads of a joiner
ASK_BYTES = 60  # a request for a chunk
PATIENCE_S = 20.0  # until a holder that says nothing, or does not have a blob, is given up
ENCODE_S = (1.0, 5.0)  # of an offer, by device
MERGE_S = 2.0

Done = Callable[[bool], None]


class Phone:
    """A peer, its link, and what it holds."""

    def __init__(self, swarm: Swarm, number: int, history: History) -> None:
        self.swarm = swarm
        self.number = number
        self.identity = identity(number)
        self.id: PeerId = self.identity.peer_id
        self.link = Link(swarm.time)
        self.pace = Pace(swarm.time, swarm.pace_bytes_per_s)
        self.alive = True
        self.joined_s = swarm.time.now
        self.ready_s: float | None = None
        self.blobs: set[bytes] = set()
        self.applied_s: dict[int, float] = {}
        """slot -> when its update was in the anchor."""
        self.refused: list[Refusal] = []
        self._fetching: set[bytes] = set()
        self._downloads: list[events.FragmentLost] = []
        self._downloading = 0
        self._timer_s = float("inf")
        self.engine = Engine(swarm.manifest, self.identity, 0, incarnation=1, now=swarm.time.now, history=history)
        self.engine.addresses = (f"/ip4/203.0.113.{number % 256}/tcp/{1024 + number}/p2p/12D3KooW{'x' * 44}",)

    # --- driving the engine ------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Handle events and send messages until nothing is left, and wake up when the engine asks for it."""
        while True:
            while (event := self.engine.next_event()) is not None:
                self._handle(event)
            messages = self.engine.messages_to_send()
            for peer, data in messages:
                self.swarm.deliver(self, peer, data)
            if not messages:
                break
        self._set_timer()

    def _set_timer(self) -> None:
        due_s = self.engine.get_timer()
        if due_s != self._timer_s:
            self._timer_s = due_s
            self.swarm.time.at(due_s, lambda: self._on_timer(due_s))

    def _on_timer(self, due_s: float) -> None:
        if self.alive and due_s == self._timer_s:
            self._timer_s = float("inf")
            self.engine.handle_timer(self.swarm.time.now)
            self.pump()

    def receive(self, data: bytes) -> None:
        """A message has arrived."""
        if not self.alive:
            return
        try:
            self.engine.receive(data, self.swarm.time.now)
        except WireError as error:
            self.refused.append(error.refusal)
        self.pump()

    def _later(self, delay_s: float, action: Callable[[], None]) -> None:
        def act() -> None:
            if self.alive:
                action()
                self.pump()

        self.swarm.time.later(delay_s, act)

    # --- the daemon's part -------------------------------------------------------------------------------------------

    def _handle(self, event: events.Event) -> None:
        match event:
            case events.FragmentDue(slot):
                self._later(self.swarm.rng.uniform(*ENCODE_S), lambda: self._offer(slot))
            case events.BlobWanted():
                self._want(event)
            case events.MergeDue(slot):
                self._later(MERGE_S, lambda: self.engine.merged(slot, self._merge(event)))
            case events.CheckDue(slot):
                self._later(MERGE_S, lambda: self.engine.checked(slot, self._merge(event)))
            case events.UpdateDue():
                self._apply(event)
            case events.FragmentLost():
                self._downloads.append(event)
                self._download_next()
            case events.PeerMentioned(peer):
                self.engine.introduce(peer)
            case events.FragmentUnheld():
                raise AssertionError("everybody holds every fragment")

    def _offer(self, slot: int) -> None:
        digest = hashlib.sha256(b"%d in %d" % (self.number, slot)).digest()
        self.blobs.add(digest)
        self.swarm.kinds[digest] = "contributions"
        self.engine.offer(slot, digest, self.swarm.sizes.contribution, 1000)

    def _merge(self, due: events.MergeDue | events.CheckDue) -> Merged:
        """An update of the right size, the same for the same contributions."""
        given = sorted(due.contributions)
        content = hashlib.sha256(b"".join(digest for _, _, digest in given)).digest()
        merged = Merged(
            content.ljust(self.swarm.sizes.update, b"\0"), tuple((peer, 1 << 16) for peer, _, _ in given), ()
        )
        self.blobs.add(merged.digest)
        self.swarm.kinds[merged.digest] = "updates"
        return merged

    def _apply(self, due: events.UpdateDue) -> None:
        """An anchor is the sum of what was merged into it, in any order."""
        verdict = due.certificate.verdict
        before = self.engine.anchors()[verdict.fragment]
        digest = bytes(a ^ b for a, b in zip(before.digest, verdict.digest, strict=True))
        self.engine.anchor_moved(due, FragmentState(verdict.fragment, max(before.slot, verdict.slot), digest))
        self.applied_s.setdefault(verdict.slot, self.swarm.time.now)

    def _download_next(self) -> None:
        while self._downloads and self._downloading < FRAGMENTS_AT_ONCE:
            self._downloading += 1
            self._download(self._downloads.pop(0))

    def _download(self, lost: events.FragmentLost) -> None:
        def done(ok: bool) -> None:
            self._downloading -= 1
            if ok:
                self.engine.fragment_restored(lost.state)
            else:
                self.engine.fragment_unavailable(lost.state.fragment)
            if not self.engine.ready and len(self.engine.anchors()) == self.swarm.manifest.window:
                self.engine.set_ready()
                self.ready_s = self.swarm.time.now
            self._download_next()

        holders = list(lost.holders)
        self.swarm.rng.shuffle(holders)
        self._pull(holders, self.swarm.sizes.anchor, "anchors", done)

    # --- blobs -------------------------------------------------------------------------------------------------------

    def _want(self, wanted: events.BlobWanted) -> None:
        digest = wanted.digest
        if digest in self.blobs:
            return self.engine.blob_fetched(digest, True, self.swarm.time.now)
        if digest in self._fetching:
            return
        self._fetching.add(digest)

        def done(ok: bool) -> None:
            self._fetching.discard(digest)
            if ok:
                self.blobs.add(digest)
            self.engine.blob_fetched(digest, ok, self.swarm.time.now)

        kind = self.swarm.kinds[digest]
        self._pull(wanted.holders, wanted.size, kind, done, digest, patient=wanted.patient)

    def _pull(
        self,
        holders: Sequence[PeerId],
        size: int,
        kind: str,
        done: Done,
        digest: bytes | None = None,
        *,
        patient: bool = False,
    ) -> None:
        """Ask the holders in turn, each until its patience is over; anchors are with whoever said so.

        `patient`: who does not have it yet is asked again with the engine's next repeat, as nodes do.
        """
        if not holders:
            return self._later(0.0, lambda: done(False))
        source = self.swarm.by_id.get(holders[0])
        attempt = {"begun": False, "over": False}

        def fail() -> None:
            if not attempt["over"]:
                attempt["over"] = True
                self._pull(holders[1:], size, kind, done, digest, patient=patient)

        def give_up() -> None:
            if not attempt["begun"]:
                fail()

        def not_there() -> None:
            if not patient:
                fail()
            elif not attempt["over"] and self.alive:
                attempt["over"] = True
                self._later(0.0, lambda: done(False))

        def finish() -> None:
            if not attempt["over"]:
                attempt["over"] = True
                done(True)

        self._later(PATIENCE_S, give_up)
        if source is None or not source.alive:
            return
        if digest is None or digest in source.blobs:
            attempt["begun"] = True
            _Transfer(self, source, size, kind, finish, fail)
        else:
            answer = functools.partial(source.link.send, self.link, REPLY_BYTES, kind, not_there)
            self.link.send(source.link, ASK_BYTES, kind, answer)


class _Transfer:
    """A blob on its way, a few chunks at a time."""

    def __init__(
        self, target: Phone, source: Phone, size: int, kind: str, done: Callable[[], None], failed: Callable[[], None]
    ) -> None:
        self._target, self._source, self._kind = target, source, kind
        self._unasked, self._missing = size, size
        self._done, self._failed = done, failed
        for _ in range(CHUNKS_AT_ONCE):
            self._ask()

    def _ask(self) -> None:
        if not self._unasked:
            return
        chunk = min(CHUNK_BYTES, self._unasked)
        self._unasked -= chunk
        target, source = self._target, self._source
        target.link.send(source.link, ASK_BYTES, self._kind, lambda: self._answer(chunk))

    def _answer(self, chunk: int) -> None:
        if not self._source.alive:
            return self._target._later(PATIENCE_S, self._failed)
        source, target = self._source, self._target

        def leave() -> None:
            source.link.send(target.link, chunk + REPLY_BYTES, self._kind, lambda: self._arrive(chunk))

        if self._kind == "anchors":
            leave()
        else:
            source.swarm.time.later(source.pace.wait_s(chunk, first=self._kind == "contributions"), leave)

    def _arrive(self, chunk: int) -> None:
        if not self._target.alive:
            return
        self._missing -= chunk
        self._ask()
        if not self._missing:
            self._done()
            self._target.pump()
