"""What a message does once its envelope is found to be in order: one branch per kind.

Whatever this peer must not believe is refused by the part that knows: roster.py, rounds.py, certificates.py.
"""

from __future__ import annotations

from collections import deque

from braniac.protocol import events, limits, messages
from braniac.protocol.agreement import Agreement
from braniac.protocol.certificates import Certificates
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.gossip import Gossiper
from braniac.protocol.greetings import Greetings
from braniac.protocol.history import History
from braniac.protocol.identity import PeerId
from braniac.protocol.manifest import Manifest
from braniac.protocol.messages import Heartbeat
from braniac.protocol.outbox import Outbox
from braniac.protocol.roster import Roster
from braniac.protocol.rounds import Rounds
from braniac.protocol.witness import Witness


class Inbox:
    """Gives each message to the parts of the engine that it concerns."""

    def __init__(
        self,
        manifest: Manifest,
        me: PeerId,
        *,
        roster: Roster,
        history: History,
        agreement: Agreement,
        rounds: Rounds,
        certificates: Certificates,
        greetings: Greetings,
        gossiper: Gossiper,
        witness: Witness,
        outbox: Outbox,
        queue: deque[events.Event],
    ) -> None:
        """`queue` holds the events that the daemon has not taken yet."""
        self._manifest = manifest
        self._me = me
        self._roster = roster
        self._history = history
        self._agreement = agreement
        self._rounds = rounds
        self._certificates = certificates
        self._greetings = greetings
        self._gossiper = gossiper
        self._witness = witness
        self._outbox = outbox
        self._queue = queue

    def take(self, opened: messages.Opened, slot: int) -> None:
        """Do what a message asks for. Raises WireError if it is refused."""
        sender, message = opened.sender, opened.message
        if sender == self._me:
            raise WireError(Refusal.REPLAYED, "this peer's own message came back, or another peer has its identity")
        if isinstance(message, Heartbeat):
            return self._on_heartbeat(sender, message, opened.sequence, slot)
        if isinstance(message, messages.Gossip):
            return self._gossiper.hear(sender, message.presences, slot)
        if self._roster.get(sender) is None:
            raise WireError(Refusal.UNKNOWN_PEER, "no heartbeat of the sender was heard yet")
        match message:
            case messages.Offer(commitment):
                if commitment.peer != sender:
                    raise WireError(Refusal.BAD_SIGNATURE, "a commitment of somebody else")
                self._check_honest([commitment], slot)
                self._rounds.note_commitment(commitment)
            case messages.Proposal(verdict):
                self._check_honest(verdict.commitments, slot)
                self._rounds.check_proposal(sender, verdict)
            case messages.Vote():
                certificate = self._rounds.count_vote(sender, message)
                vote = self._rounds.counted(sender, message)
                self._convict([vote], slot)
                self._witness.note(vote)
                if certificate is not None:
                    self._certificates.publish(certificate, slot)
            case messages.Certificate():
                self._convict(message.signed(), slot)
                self._certificates.check(message, slot)
                for signed in message.signed():
                    self._witness.note(signed)
                self._certificates.take(message, slot)
                self._certificates.pass_on(message)
            case messages.CertificateRequest(names):
                for name in names[: limits.REQUEST_NAMES_MAX]:
                    entry = self._history.entry(name.slot)
                    if entry is not None and entry.certificate.name == name:
                        self._outbox.send(sender, entry.certificate)
            case messages.Goodbye():
                if self._roster.leave(sender, opened.sequence):
                    self._queue.append(events.PeerLeft(sender, said_goodbye=True))
            case messages.Introduction(peers):
                for peer, addresses in peers:
                    member = self._roster.get(peer)
                    if peer != self._me and (member is None or not member.live(slot)):
                        self._queue.append(events.PeerMentioned(peer, addresses))
            case messages.RosterRequest():
                self._gossiper.answer(sender, slot)
            case messages.Equivocation():
                self._ban(message, slot)

    def _on_heartbeat(self, sender: PeerId, heartbeat: Heartbeat, sequence: int, slot: int) -> None:
        observes = heartbeat.tier == self._manifest.observer_tier and heartbeat.ready_slot < 0
        if heartbeat.tier >= self._manifest.tiers and not observes:
            raise WireError(Refusal.MALFORMED, f"tier {heartbeat.tier} does not exist in this run")
        member, returned = self._roster.hear(sender, heartbeat, slot, sequence)
        self._greetings.answered(sender)
        if returned:
            self._queue.append(events.PeerJoined(sender, member.tier, member.addresses))
            self._greetings.welcome(sender, slot)
        if missing := self._certificates.missing(heartbeat.recent, slot):
            self._outbox.send(sender, messages.CertificateRequest(missing))
        self._gossiper.compare(sender, heartbeat.known, slot)
        spoken_of = {state.fragment for state in heartbeat.anchors}
        for lost in self._agreement.review(self._roster.speaking(slot), slot, self._history, spoken_of):
            if isinstance(lost, events.FragmentUnheld):
                self._queue.append(lost)
            else:
                self.lose(lost)

    def lose(self, lost: events.FragmentLost) -> None:
        """Have a fragment downloaded; updates that are not applied yet are in the new anchor or come again."""
        fragment = lost.state.fragment
        self._history.lose(fragment)
        kept = [e for e in self._queue if not (isinstance(e, events.UpdateDue) and e.fragment == fragment)]
        self._queue.clear()
        self._queue.extend([*kept, lost])

    def _check_honest(self, commitments: list[messages.Commitment], slot: int) -> None:
        """Ban a peer that has announced something else for the same slot before. Raises WireError for the message."""
        for commitment in commitments:
            if (proof := self._rounds.contradiction(commitment)) is not None:
                self._ban(proof, slot)
                raise WireError(Refusal.EQUIVOCATION, "two contributions of one peer to one slot")

    def _convict(self, signed: list[messages.SignedVerdict], slot: int) -> None:
        """Ban whoever has signed another verdict on the same slot. Which certificate stands is another matter."""
        for each in signed:
            if (proof := self._witness.contradiction(each)) is not None:
                self._ban(proof, slot)

    def _ban(self, proof: messages.Equivocation, slot: int) -> None:
        """Drop a peer for good and pass on the proof: who sits in committees must stay the same for everybody."""
        if proof.peer == self._me:  # not this peer's doing: somebody else has its key, and is as good a signer of it
            self._queue.append(events.IdentityShared(proof.slot))
        elif self._roster.ban(proof):
            self._rounds.exclude(proof.peer)
            self._queue.append(events.Equivocated(proof.peer, proof.slot))
            self._outbox.broadcast(proof, slot)
