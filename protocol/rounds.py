"""The slots that are open now: this peer's own offers, and the rounds in which it has a seat."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from braniac.protocol import events, limits, messages, statements
from braniac.protocol.admission import Places
from braniac.protocol.checking import Checking
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.identity import Identity, PeerId
from braniac.protocol.manifest import Manifest
from braniac.protocol.merge import Merged
from braniac.protocol.messages import Certificate, Commitment, Message, SignedVerdict, Verdict, Vote
from braniac.protocol.roster import Roster
from braniac.protocol.round import Phase, SlotRound
from braniac.protocol.standing import Standing


class Rounds:
    """Open slots, at most a handful: the current one, the next, and those still waiting for signatures."""

    def __init__(
        self,
        manifest: Manifest,
        identity: Identity,
        roster: Roster,
        standing: Standing,
        start_slot: int,
        send: Callable[[PeerId, Message], None],
        emit: Callable[[events.Event], None],
    ) -> None:
        self._manifest = manifest
        self._identity = identity
        self._me = identity.peer_id
        self._roster = roster
        self._standing = standing
        self._send = send
        self._emit = emit
        self._rounds: dict[int, SlotRound] = {}
        self.slot = start_slot
        self._closed_at = float("-inf")
        self._checking = Checking(identity, manifest.run_id)

    def begin_slot(self, slot: int) -> int:
        """Enter `slot`: the slot whose time for a certificate is over now."""
        self.slot = slot
        over = slot - limits.PROPOSAL_OPEN_SLOTS - 1
        self._rounds = {s: r for s, r in self._rounds.items() if s > over}
        self._standing.forget(over)
        return over

    @property
    def busy(self) -> bool:
        """Whether a slot that this peer owns still waits for its certificate."""
        return any(r.owned and r.phase not in (Phase.CERTIFIED, Phase.ABANDONED) for r in self._rounds.values())

    def next_deadline(self) -> float:
        """When the next round of this peer's own must close with what it has."""
        collecting = [s for s, r in self._rounds.items() if r.owned and r.phase is Phase.COLLECTING]
        fractions = (limits.ANNOUNCE_FRACTION, limits.CLOSE_FRACTION)
        # One that is overdue has nothing yet, and closes with the first payload that arrives.
        ahead = [at for slot in collecting for at in (self._at(slot, f) for f in fractions) if at > self._closed_at]
        return min(ahead, default=float("inf"))

    def _at(self, slot: int, fraction: float) -> float:
        return self._manifest.slot_start(slot) + fraction * self._manifest.slot_s

    def offer(self, slot: int, payload_digest: bytes, payload_bytes: int, weight: int) -> None:
        """Announce this peer's contribution to the committee; nothing if another is known in its name already."""
        if not slot <= self.slot <= slot + limits.PROPOSAL_OPEN_SLOTS:
            return  # encoding took too long; the work is still in the weights and is offered when it is next due
        fragment = self._manifest.fragment_of(slot)
        weight = max(1, min(weight, limits.WEIGHT_MAX))
        commitment = statements.make_commitment(
            self._identity, self._manifest.run_id, slot, fragment, payload_digest, payload_bytes, weight
        )
        if self.contradiction(commitment) is not None:
            self._emit(events.IdentityShared(slot))
            return
        for peer in self._standing.committee(slot):
            if peer == self._me:
                with contextlib.suppress(WireError):  # a full slot: the work is offered again, like anybody's
                    self.note_commitment(commitment)
                continue
            if self._standing.said is not None:  # a seat that has never heard of a contributor would not sign
                self._send(peer, messages.Gossip((self._standing.said,)))
            self._send(peer, messages.Offer(commitment))

    def note_commitment(self, commitment: Commitment) -> None:
        """A contribution was announced to this seat. Raises WireError."""
        self._check_slot(commitment.slot, commitment.fragment)
        self._check_contribution(commitment)
        current = self._seat(commitment.slot)
        if commitment.peer not in current.commitments and not self._has_place(current, commitment.peer):
            raise WireError(Refusal.CROWDED, "no place for it in this slot")
        if current.commit(commitment):
            self._emit(events.BlobWanted(commitment.payload_digest, commitment.payload_bytes, (commitment.peer,)))

    def _check_contribution(self, commitment: Commitment) -> None:
        """Might its peer make it, and is it no larger than it may be? Raises WireError."""
        tier = self._standing.tier_of(commitment.peer)
        if tier is None or not self._manifest.holds(tier, commitment.fragment):
            raise WireError(Refusal.UNKNOWN_PEER, "a contribution of a peer that does not hold the fragment")
        if commitment.payload_bytes > self._manifest.contribution_bytes_max(commitment.fragment):
            raise WireError(Refusal.OVERSIZE, f"a contribution of {commitment.payload_bytes} bytes")

    def _has_place(self, current: SlotRound, peer: PeerId) -> bool:
        """Whether a contribution of `peer` is taken, as far as this seat decides that."""
        if not current.owned or peer == self._me:
            return True
        if not self._standing.draws(current.slot, peer, spare=2):  # it may know of fewer peers
            return False
        wanting = (
            member
            for member in self._roster
            if self._manifest.holds(member.tier, current.fragment)
            and (member.live(current.slot) or member.peer == peer)
            and self._standing.draws(current.slot, member.peer, spare=2)
        )
        return current.places.admit(peer, wanting, current.commitments)

    def contradiction(self, commitment: Commitment) -> messages.Equivocation | None:
        """The proof, if its peer has announced something else for the same slot."""
        current = self._rounds.get(commitment.slot)
        known = current.commitments.get(commitment.peer) if current else None
        return messages.Equivocation(known, commitment) if known and known.body != commitment.body else None

    def exclude(self, peer: PeerId) -> None:
        """A peer was banned: nothing of it is merged any more."""
        for current in self._rounds.values():
            current.exclude(peer)

    def payload_arrived(self, digest: bytes, now: float) -> None:
        """A blob is here; if it is a contribution, a round may close."""
        for current in list(self._rounds.values()):
            if any(c.payload_digest == digest for c in current.commitments.values()):
                current.payloads.add(digest)
                self._try_close(current, now)
                self._recompute(current)

    def close_due(self, now: float) -> None:
        """Close the rounds whose time is up."""
        self._closed_at = now
        for current in list(self._rounds.values()):
            self._try_close(current, now)

    def _try_close(self, current: SlotRound, now: float) -> None:
        """If this peer owns the slot and it is time, ask for the merge."""
        slot, fragment = current.slot, current.fragment
        holders = [m.peer for m in self._roster.eligible(slot) if self._manifest.holds(m.tier, fragment)]
        expected = [peer for peer in holders if self._standing.draws(slot, peer) and self._has_place(current, peer)]
        if self._standing.contributes(slot):
            expected.append(self._me)
        if self._roster.neighbours is not None and now >= self._at(slot, limits.ANNOUNCE_FRACTION):
            # Who vanishes from a large swarm is expected for up to an hour. If most are silent, it is this peer's line.
            announced = [peer for peer in expected if peer in current.commitments]
            expected = announced if 2 * len(announced) >= len(expected) else expected
        overdue = now >= self._at(slot, limits.CLOSE_FRACTION)
        if self._standing.may_sign(slot) and current.may_close(expected, overdue=overdue):
            self._close(current)

    def _close(self, current: SlotRound) -> None:
        current.phase = Phase.MERGING
        arrived = tuple((c.peer, c.weight, c.payload_digest) for c in current.arrived())
        self._roster.note_deliveries(current.commitments, {peer for peer, _, _ in arrived})
        self._emit(events.MergeDue(current.slot, current.fragment, arrived))

    def merged(self, slot: int, merged: Merged | None) -> Certificate | None:
        """The merge of an own slot is done: propose it. A committee of one certifies at once."""
        current = self._rounds.get(slot)
        if current is None or current.phase is not Phase.MERGING:
            return None
        if merged is None:
            current.phase = Phase.ABANDONED
            return None
        if any(peer in current.excluded for peer, _ in (*merged.admitted, *merged.refused)):
            # Somebody was banned while the merge ran: once more without them, if anybody is left.
            current.phase = Phase.COLLECTING
            if current.may_close((), overdue=True):
                self._close(current)
            return None
        verdict = current.propose(self._identity, merged)
        for peer in current.silent():
            self._send(peer, messages.Proposal(verdict))
        return current.certificate()

    def check_proposal(self, sender: PeerId, verdict: Verdict) -> None:
        """Take up an owner's proposal: it is signed once its merge was found to be right. Raises WireError."""
        self._check_slot(verdict.slot, verdict.fragment)
        if self._standing.silent_in(verdict.slot):
            raise WireError(Refusal.NOT_READY, "this peer may have signed for that slot before it was restarted")
        if not self._standing.may_sign(verdict.slot):
            raise WireError(Refusal.NOT_READY, "this peer could not note yet that it signs for that slot")
        current = self._seat(verdict.slot)
        for commitment in verdict.commitments:
            self._check_contribution(commitment)
        if verdict.update_bytes > self._manifest.update_bytes_max(verdict.fragment):
            raise WireError(Refusal.OVERSIZE, f"an update of {verdict.update_bytes} bytes")
        current.consider(sender, verdict)
        if current.voted is not None or not self._checking.looks_at(verdict):
            return self._vote(current)
        for commitment in current.missing():
            # A contributor might keep it from the seats, to stop the slot, but the owner must have it. The owner comes
            # second, or it would have to send all that it has pulled once more to every seat.
            holders = tuple(dict.fromkeys((commitment.peer, verdict.owner)))
            self._emit(events.BlobWanted(commitment.payload_digest, commitment.payload_bytes, holders))
        self._recompute(current)

    def _recompute(self, current: SlotRound) -> None:
        """If a proposal waits for it and its payloads are here, ask for the merge."""
        if current.may_recompute():
            current.recomputing = True
            given = tuple((c.peer, c.weight, c.payload_digest) for c in current.proposed())
            self._emit(events.CheckDue(current.slot, current.fragment, given))

    def checked(self, slot: int, merged: Merged | None) -> None:
        """The merge of another's slot was done again: sign the proposal if that is what it says."""
        current = self._rounds.get(slot)
        if current is None or not current.recomputing:
            return  # the slot is over
        current.recomputing = False
        if current.is_made_of(merged):
            if not any(c.peer in current.excluded for c in current.proposed()):
                self._vote(current)
            return
        current.wrong = True
        owner = current.committee[0]
        self._checking.distrust(owner, slot)
        self._emit(events.WrongMerge(owner, slot))

    def check_failed(self, slot: int) -> None:
        """The payloads of a proposal could not be read: with the next repeat of it they are fetched once more."""
        if (current := self._rounds.get(slot)) is not None:
            current.give_up_check()

    def _vote(self, current: SlotRound) -> None:
        assert current.verdict is not None
        self._send(current.committee[0], current.sign(self._identity, current.verdict))

    def count_vote(self, sender: PeerId, vote: Vote) -> Certificate | None:
        """A vote for an own proposal: the certificate, once a majority has signed. Raises WireError."""
        current = self._rounds.get(vote.slot)
        if current is None:
            raise WireError(Refusal.STALE, f"a vote for slot {vote.slot}, which is over")
        return current.count(sender, vote)

    def counted(self, sender: PeerId, vote: Vote) -> SignedVerdict:
        """A vote that was counted, as a statement for others."""
        verdict = self._rounds[vote.slot].verdict
        assert verdict is not None
        return SignedVerdict(sender, vote.slot, verdict.body, vote.signature)

    def repeat_proposals(self) -> None:
        """Ask the seats that have not voted once more."""
        for current in self._rounds.values():
            if current.phase is Phase.PROPOSED and current.verdict is not None:
                for peer in current.silent():
                    self._send(peer, messages.Proposal(current.verdict))

    def _seat(self, slot: int) -> SlotRound:
        """The round of `slot`. Raises WireError if this peer has no seat in it."""
        if slot not in self._rounds:
            committee = self._standing.committee(slot)
            if self._me not in committee:
                raise WireError(Refusal.NOT_COMMITTEE, f"this peer has no seat in slot {slot}")
            fragment = self._manifest.fragment_of(slot)
            places = Places(self._manifest.run_id, slot, self._manifest.window)
            self._rounds[slot] = SlotRound(self._manifest.run_id, slot, fragment, committee, self._me, places)
        return self._rounds[slot]

    def _check_slot(self, slot: int, fragment: int) -> None:
        if fragment != self._manifest.fragment_of(slot):
            raise WireError(Refusal.MALFORMED, f"fragment {fragment} is not due in slot {slot}")
        if slot > self.slot + 1:
            raise WireError(Refusal.EARLY, f"slot {slot} has not begun")
        if slot < self.slot - limits.PROPOSAL_OPEN_SLOTS:
            raise WireError(Refusal.STALE, f"slot {slot} is over")
