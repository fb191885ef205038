"""The protocol object: fed with messages, answers and `now`; gives back messages to send and events to handle.

It follows aioquic's pattern. It has no clock, no socket and no randomness; `now` is swarm time in seconds and never
goes backwards. The daemon and the tests drive the same object:

    engine.receive(data, now)                 a message arrived (raises WireError with the refusal to answer)
    engine.handle_timer(now)                  call at engine.get_timer() or later
    engine.messages_to_send()                 [(peer, bytes)]
    engine.next_event()                       see events.py; answers go back through offer, blob_fetched, merged, ...

One slot, from here: SlotBegan -> FragmentDue -> offer() -> commitments to the committee -> owner: BlobWanted,
MergeDue -> merged() -> proposal -> the other seats: BlobWanted, CheckDue -> checked() -> votes -> certificate to
everybody -> BlobWanted (the update) -> UpdateDue -> anchor_moved().
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

from braniac.protocol import events, limits, listing, messages, wire
from braniac.protocol.agreement import Agreement
from braniac.protocol.certificates import Certificates
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.gossip import Gossiper
from braniac.protocol.greetings import Greetings
from braniac.protocol.history import History
from braniac.protocol.identity import Identity, PeerId
from braniac.protocol.inbox import Inbox
from braniac.protocol.manifest import Manifest
from braniac.protocol.merge import Merged
from braniac.protocol.messages import FragmentState, Heartbeat, Message
from braniac.protocol.outbox import Outbox
from braniac.protocol.roster import Member, Roster
from braniac.protocol.rounds import Rounds
from braniac.protocol.spans import Spans
from braniac.protocol.standing import Standing
from braniac.protocol.witness import Witness


class Engine:
    """The outer protocol of one peer in one run."""

    def __init__(
        self,
        manifest: Manifest,
        identity: Identity,
        tier: int,
        *,
        incarnation: int,
        now: float,
        history: History,
        signed: Spans | None = None,
    ) -> None:
        """`incarnation` must grow with every start of an identity; `history` is what was recovered, or new.

        An earlier life may have signed for the slots in `signed`: nothing is signed for these again, nor for others
        before `may_sign`. None: there was no earlier life, and there will be no later one.
        At `manifest.observer_tier` it holds nothing and only listens: it must not be `set_ready`.
        """
        assert 0 <= tier <= manifest.observer_tier
        self.manifest = manifest
        self.tier = tier
        self.me = identity.peer_id
        self.roster = Roster()
        self.history = history
        history.prune(manifest.slot_at(now))  # of slots that have passed since it was saved
        self.addresses: tuple[str, ...] = ()
        self.tokens_per_s = 0.0
        self.loss: float | None = None
        """Of the training, as others are told."""
        self.version = ""
        """Of the program, as others are told."""
        self.received = 0
        self.accepted = 0
        self.refused: Counter[Refusal] = Counter()
        self.refused_payloads: Counter[Refusal] = Counter()
        self._outbox = Outbox(identity, manifest.run_id, incarnation, self.roster)
        self._parts = listing.parts_of(manifest)
        self._slot = self._rejoined_slot = manifest.slot_at(now)
        self._agreement = Agreement(manifest, self.me, manifest.held(tier), self._slot)
        self._greetings = Greetings(self.me, self.roster, self._outbox.send, self._heartbeat)
        self._repeat_at = now
        self._events: deque[events.Event] = deque()
        send, emit = self._outbox.send, self._events.append
        self._standing = Standing(manifest, self.me, tier, self.roster, self._slot, signed)
        self._rounds = Rounds(manifest, identity, self.roster, self._standing, self._slot, send, emit)
        standing, outbox = self._standing, self._outbox
        self._certificates = Certificates(
            manifest, self.me, tier, self._slot, history, self._agreement, self.roster, standing, outbox, emit
        )
        self._gossiper = Gossiper(manifest, identity, tier, self.roster, standing, outbox, emit)
        self._witness = Witness(self._slot - manifest.window)
        self._inbox = Inbox(
            manifest,
            self.me,
            roster=self.roster,
            history=history,
            agreement=self._agreement,
            rounds=self._rounds,
            certificates=self._certificates,
            greetings=self._greetings,
            gossiper=self._gossiper,
            witness=self._witness,
            outbox=self._outbox,
            queue=self._events,
        )

    # --- what the daemon calls ---------------------------------------------------------------------------------------

    @property
    def slot(self) -> int:
        """The slot the engine is in."""
        return self._slot

    @property
    def ready(self) -> bool:
        return self._standing.ready_slot >= 0

    def live_peers(self) -> list[Member]:
        """Who else takes part, as far as was heard lately: observers do not."""
        return [member for member in self.roster.live(self._slot) if member.tier < self.manifest.observer_tier]

    def anchors(self) -> Mapping[int, FragmentState]:
        """Hash and last slot of every anchor this peer holds."""
        return self._agreement.mine

    def next_event(self) -> events.Event | None:
        return self._events.popleft() if self._events else None

    def messages_to_send(self) -> list[tuple[PeerId, bytes]]:
        """Messages since the last call; each may be lost."""
        return self._outbox.drain()

    def get_timer(self) -> float:
        """Swarm time at which `handle_timer` should be called next."""
        return min(self.manifest.slot_start(self._slot + 1), self._repeat_at, self._rounds.next_deadline())

    def receive(self, data: bytes, now: float) -> None:
        """A message from a peer. Raises WireError with the reason if it is refused; it is counted either way (I7)."""
        self.received += 1
        try:
            opened = wire.open_envelope(data, self.manifest.run_id)
            self.roster.check_fresh(opened.sender, opened.sequence)
            self._inbox.take(opened, self._slot)
        except WireError as error:
            self.refused[error.refusal] += 1
            raise
        self.accepted += 1

    def handle_timer(self, now: float) -> None:
        """Let time pass: new slots, repeats, rounds that close or end."""
        present = self.manifest.slot_at(now)
        if present > self._slot + limits.ROSTER_LIVE_SLOTS:
            self._wake_up(present)
        while self._slot < present:
            # A peer that slept through many slots wakes up in the present.
            self._begin_slot(max(self._slot + 1, present - 1))
        self._rounds.close_due(now)
        if now >= self._repeat_at:
            self._repeat_at = now + self.manifest.slot_s / limits.REPEATS_PER_SLOT
            self._repeat()

    def introduce(self, peer: PeerId) -> None:
        """Somebody says this peer exists: greet it until it answers or enough was tried."""
        self._greetings.greet(peer, self._slot)

    def anchor_known(self, state: FragmentState) -> None:
        """At start: this anchor is on disk, as `history` says."""
        if state.fragment in self.history.last:  # else it was lost when the state was stored, and is downloaded anew
            self._agreement.set_mine(state)

    def set_ready(self) -> None:
        """All anchors are here: take part from now on."""
        assert self.tier < self.manifest.observer_tier, "an observer takes no part"
        assert len(self._agreement.mine) == len(self.manifest.held(self.tier))
        self._standing.ready_slot = max(0, self._slot)
        self._broadcast(self._heartbeat(self._parts))

    def may_sign(self, noted: Spans) -> None:
        """It is durable that this peer may have signed for these slots: now it may, but for those of earlier lives."""
        self._standing.noted = noted

    def set_reachable(self, reachable: bool) -> None:
        """Whether others can dial this peer. If not it goes on contributing and leaves the seats to those that can be.

        Either way it takes effect a little later, for everybody in the same slot.
        """
        if reachable == (self._standing.unreachable_slot == 0):
            return
        self._standing.unreachable_slot = 0 if reachable else max(1, self._slot)
        if reachable and self.ready:
            self._standing.ready_slot = max(0, self._slot)
        self._broadcast(self._heartbeat(self._parts))

    def offer(self, slot: int, payload_digest: bytes, payload_bytes: int, weight: int) -> None:
        """Answer to FragmentDue: the payload is stored durably and can be fetched from here."""
        self.history.offers[slot] = payload_digest
        self._rounds.offer(slot, payload_digest, payload_bytes, weight)

    def blob_fetched(self, digest: bytes, ok: bool, now: float) -> None:
        """Answer to BlobWanted."""
        if not ok:
            return  # payloads: the slot closes without it; updates: asked for again with the next repeat
        self._rounds.payload_arrived(digest, now)
        self._certificates.update_arrived(digest)

    def merged(self, slot: int, merged: Merged | None) -> None:
        """Answer to MergeDue; None if nothing could be admitted."""
        for _, refusal in merged.refused if merged else ():
            self.refused_payloads[refusal] += 1
        if (certificate := self._rounds.merged(slot, merged)) is not None:
            self._certificates.publish(certificate, self._slot)

    def checked(self, slot: int, merged: Merged | None) -> None:
        """Answer to CheckDue; None if nothing could be admitted."""
        self._rounds.checked(slot, merged)

    def check_failed(self, slot: int) -> None:
        """Answer to CheckDue if the payloads could not be read."""
        self._rounds.check_failed(slot)

    def anchor_moved(self, update: events.UpdateDue, state: FragmentState) -> None:
        """Answer to UpdateDue: anchor and weights hold it now."""
        certificate = update.certificate
        if state.fragment not in self.history.last:
            return  # the fragment was lost meanwhile: what is downloaded replaces this anchor
        self.history.confirm(certificate, update.acknowledged, undo=update.undo)
        self._agreement.set_mine(state)

    def fragment_restored(self, state: FragmentState) -> None:
        """Answer to FragmentLost: the anchor was downloaded and the weights were set to it."""
        self.history.restore(state.fragment, state.slot)
        self._agreement.set_mine(state)
        self._certificates.want_updates(self._slot)

    def fragment_unavailable(self, fragment: int) -> None:
        """Answer to FragmentLost: nobody could deliver it; the next heartbeats say what to ask for instead."""
        self._agreement.ask_again(fragment)

    def fragment_damaged(self, fragment: int) -> None:
        """The anchor was lost on disk: it is downloaded like a joiner's."""
        self.history.lose(fragment)
        self._agreement.forget(fragment)

    @property
    def busy(self) -> bool:
        """Whether something is still open that others or this peer's own work wait for."""
        return self._rounds.busy

    def retire(self) -> None:
        """Begin to leave: no new offers, no more committees; what is open goes on."""
        self._standing.ready_slot = -1
        self._broadcast(self._heartbeat(self._parts))

    def goodbye(self) -> None:
        """Tell everybody that this peer leaves."""
        self._gossiper.speak(self._slot, self._addresses, gone=True)
        self._broadcast(messages.Goodbye(max(0, self._slot)))

    def rejoin(self, now: float) -> None:
        """After a rest that began with `retire` and `goodbye`: hear what has happened, until `caught_up`."""
        self._outbox.drain()  # what was said of the past
        self.handle_timer(now)
        self._rejoined_slot = self._slot
        self._agreement.listen_anew(self._slot)
        self._greetings.look_for_members(self._slot)

    @property
    def caught_up(self) -> bool:
        """Whether this peer has applied all that live peers have, or has listened in vain; then it may `set_ready`."""
        if self._slot <= self._rejoined_slot or len(self._agreement.mine) < len(self.manifest.held(self.tier)):
            return False
        voices = [member for member in self.roster.speaking(self._slot) if member.ready_slot >= 0]
        if not voices:
            return self._slot > self._rejoined_slot + limits.ROSTER_LIVE_SLOTS
        if any(member.heard_slot < self._rejoined_slot for member in voices):
            return False  # that is from before the rest: it speaks again or lapses
        if self._agreement.overtaken(voices, self._slot - self.history.horizon) or self.history.missing_updates():
            return False
        return not any(self._certificates.lacking(member.recent, self._slot) for member in voices)

    def state(self, offered: tuple[int, bytes] | None = None) -> dict[str, Any]:
        """What a generation must keep, with an offer that is about to be made."""
        stored = self.history.to_json()
        if offered is not None:
            stored["offers"][str(offered[0])] = offered[1].hex()
        return stored

    # --- time --------------------------------------------------------------------------------------------------------

    def _wake_up(self, slot: int) -> None:
        """This peer slept until the others stopped counting on it, and has heard nothing of them.

        It takes no seat before it has heard who is there: alone in its own eyes it would certify slots all by itself.
        """
        if self.ready:
            self._standing.ready_slot = slot
        self._agreement.listen_anew(slot)
        self._greetings.look_for_members(slot)

    def _begin_slot(self, slot: int) -> None:
        self._slot = slot
        fragment = self.manifest.fragment_of(slot)
        self._events.append(events.SlotBegan(slot, fragment))
        for member in self.roster.lapsed(slot):
            self._events.append(events.PeerLeft(member.peer, said_goodbye=False))
        self._gossiper.begin_slot(slot, self._addresses)
        self._broadcast(self._heartbeat(self._parts))
        self._greetings.spread(slot)
        self._certificates.settle(self._rounds.begin_slot(slot), None)
        self._certificates.forget(slot)
        self._witness.forget(slot - self.manifest.window)
        self.history.prune(slot)
        self.roster.forget(slot)
        due = slot >= 0 and slot not in self.history.offers  # one offer per slot, ever
        due = due and self._standing.may_sign(slot) and self._standing.draws(slot, self.me)
        if self.ready and due and fragment in self.history.last and not self._agreement.outdated(fragment, slot):
            self._events.append(events.FragmentDue(slot, fragment))

    def _repeat(self) -> None:
        """What may have been lost: proposals without enough votes, updates that did not come, greetings."""
        self._rounds.repeat_proposals()
        self._certificates.want_updates(self._slot)
        self._greetings.repeat(self._slot)
        self._gossiper.pass_on()

    def _heartbeat(self, parts: int = 1) -> Heartbeat:
        slot = max(-1, self._slot)
        return Heartbeat(
            slot,
            self.tier,
            self._standing.ready_slot,
            self._addresses,
            listing.named(self.history.recent(self._slot), slot, parts),
            listing.stated(self._agreement.mine.values(), slot, parts),
            self.tokens_per_s,
            self._standing.unreachable_slot,
            self.loss,
            self.version,
            parts,
            every=1 if self.roster.neighbours is None else limits.PRESENCE_SLOTS,
            known=self.roster.live_count,
        )

    @property
    def _addresses(self) -> tuple[str, ...]:
        return self.addresses[: limits.ADDRESSES_MAX]

    def _broadcast(self, message: Message) -> None:
        self._outbox.broadcast(message, self._slot)
