"""One slot, seen from a committee seat: collect commitments, merge, propose, vote, certify.

The owner (rank 0) pulls the payloads, merges what has arrived when all expected peers are in or the slot is over,
and proposes the result; the other seats check the proposal against what they heard themselves, pull the payloads and
merge them again, and sign at most one verdict per slot. Two of three signatures make the certificate. An owner that
dies or lies leaves a slot without a certificate, which changes nothing for anybody: the work is offered again when the
fragment is next due.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from dataclasses import dataclass, field

from braniac.protocol import committee as seats
from braniac.protocol import limits, statements
from braniac.protocol.admission import Places
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.identity import Identity, PeerId
from braniac.protocol.merge import Merged
from braniac.protocol.messages import Certificate, Commitment, Share, Verdict, Vote


class Phase(enum.Enum):
    """Where an owner stands; other seats stay COLLECTING."""

    COLLECTING = enum.auto()
    MERGING = enum.auto()
    PROPOSED = enum.auto()
    CERTIFIED = enum.auto()
    ABANDONED = enum.auto()
    """Nothing was admissible, or what was proposed holds work of a peer that was banned since."""


@dataclass
class SlotRound:
    """State of one slot in which this peer has a seat."""

    run_id: bytes
    slot: int
    fragment: int
    committee: tuple[PeerId, ...]
    me: PeerId
    places: Places
    phase: Phase = Phase.COLLECTING
    commitments: dict[PeerId, Commitment] = field(default_factory=dict)
    payloads: set[bytes] = field(default_factory=set)
    """Digests of the payloads that have arrived."""
    excluded: set[PeerId] = field(default_factory=set)
    """Equivocators: nothing of theirs is merged."""
    verdict: Verdict | None = None
    """What the owner has proposed."""
    recomputing: bool = False
    """Whether another owner's proposal is being merged again here."""
    wrong: bool = False
    """Whether another owner's proposal was found to be not what its contributions make."""
    votes: dict[PeerId, bytes] = field(default_factory=dict)
    voted: bytes | None = None
    """Digest of the one verdict this peer has signed for the slot."""

    @property
    def owned(self) -> bool:
        """Whether this peer is the owner."""
        return self.committee[0] == self.me

    def commit(self, commitment: Commitment) -> bool:
        """Note a contribution's hash; True if its payload should be fetched. Raises WireError if there are too many."""
        if commitment.peer in self.commitments:
            assert self.commitments[commitment.peer].body == commitment.body, "contradictions are found before"
            return False
        if len(self.commitments) >= limits.CONTRIBUTIONS_PER_SLOT_MAX:
            raise WireError(Refusal.OVERLOADED, "too many contributions to one slot")
        self.commitments[commitment.peer] = commitment
        return self.owned and self.phase is Phase.COLLECTING

    def exclude(self, peer: PeerId) -> None:
        """Drop a peer that signed two different things."""
        self.excluded.add(peer)
        self.commitments.pop(peer, None)
        if self.phase is Phase.PROPOSED and any(commitment.peer == peer for commitment in self.proposed()):
            self.phase = Phase.ABANDONED

    def arrived(self) -> list[Commitment]:
        """Commitments whose payload is here, in order of peer id."""
        present = [c for c in self.commitments.values() if c.payload_digest in self.payloads]
        return sorted(present, key=lambda c: c.peer)

    def may_close(self, expected: Collection[PeerId], *, overdue: bool) -> bool:
        """Whether the owner should merge now: everybody expected is in, or time is up and something is."""
        if not self.owned or self.phase is not Phase.COLLECTING:
            return False
        present = {commitment.peer for commitment in self.arrived()}
        return bool(present) and (overdue or present >= set(expected))

    def propose(self, identity: Identity, merged: Merged) -> Verdict:
        """The merge is done: write the verdict and sign it first."""
        assert self.owned
        assert self.phase is Phase.MERGING
        self.verdict = statements.make_verdict(
            self.run_id,
            self.slot,
            self.fragment,
            self.committee,
            [Share(self.commitments[peer], clip) for peer, clip in merged.admitted],
            merged.digest,
            len(merged.update),
            [self.commitments[peer] for peer, _ in merged.refused],
        )
        self.phase = Phase.PROPOSED
        self.votes[self.me] = self.sign(identity, self.verdict).signature
        return self.verdict

    def consider(self, sender: PeerId, verdict: Verdict) -> None:
        """Take up what the owner proposes, as far as can be seen without the payloads. Raises WireError."""
        if verdict.committee != self.committee or sender != verdict.owner:
            raise WireError(Refusal.NOT_COMMITTEE, "a proposal by, or to, another committee")
        if self.verdict is not None and self.verdict.digest != verdict.digest:
            raise WireError(Refusal.CONFLICT, f"something else was proposed for slot {self.slot}")
        if self.wrong:
            raise WireError(Refusal.WRONG_MERGE, f"not what the contributions to slot {self.slot} make")
        for commitment in verdict.commitments:
            if commitment.peer in self.excluded:
                raise WireError(Refusal.EQUIVOCATION, "a proposal with a contribution of a banned peer")
            # Remembered, so that another announcement of the same peer shows as a contradiction.
            self.commitments.setdefault(commitment.peer, commitment)
        self.verdict = verdict

    def proposed(self) -> list[Commitment]:
        """The contributions that the proposal was made of."""
        return self.verdict.commitments if self.verdict is not None else []

    def missing(self) -> list[Commitment]:
        """Those whose payload is not here yet."""
        return [c for c in self.proposed() if c.payload_digest not in self.payloads]

    def may_recompute(self) -> bool:
        """Whether there is a proposal to be merged again before it is signed, and everything for it is here."""
        pending = self.verdict is not None and not self.owned and self.voted is None
        return pending and not self.recomputing and not self.wrong and not self.missing()

    def is_made_of(self, merged: Merged | None) -> bool:
        """Whether merging again gives what was proposed, to the bit; `merged` is None if nothing was admissible."""
        assert self.verdict is not None
        if merged is None:
            return False
        same = (merged.digest, len(merged.update)) == (self.verdict.update_digest, self.verdict.update_bytes)
        refused = {peer for peer, _ in merged.refused} == {commitment.peer for commitment in self.verdict.refused}
        return same and refused and dict(merged.admitted) == {s.commitment.peer: s.clip for s in self.verdict.shares}

    def give_up_check(self) -> None:
        """The payloads could not be read: they are to be fetched once more."""
        self.recomputing = False
        self.payloads -= {c.payload_digest for c in self.proposed()}

    def sign(self, identity: Identity, verdict: Verdict) -> Vote:
        """Sign a verdict, at most one per slot."""
        assert self.voted in (None, verdict.digest), "a second proposal is refused before"
        self.voted = verdict.digest
        return Vote(self.slot, verdict.digest, statements.sign_verdict(identity, verdict.digest))

    def count(self, sender: PeerId, vote: Vote) -> Certificate | None:
        """A vote for this owner's proposal: the certificate, once a majority has signed. Raises WireError."""
        if not self.owned or self.verdict is None or vote.verdict_digest != self.verdict.digest:
            raise WireError(Refusal.CONFLICT, "a vote for something that was not proposed")
        if sender not in self.committee:
            raise WireError(Refusal.NOT_COMMITTEE, "a vote from outside the committee")
        if not statements.verdict_signed_by(sender, vote.verdict_digest, vote.signature):
            raise WireError(Refusal.BAD_SIGNATURE, "a vote that its sender did not sign")
        self.votes[sender] = vote.signature
        return self.certificate()

    def certificate(self) -> Certificate | None:
        """The certificate, the first time there is a majority for it."""
        if self.phase is not Phase.PROPOSED or len(self.votes) < seats.majority(len(self.committee)):
            return None
        assert self.verdict is not None
        self.phase = Phase.CERTIFIED
        return Certificate(self.verdict, tuple(sorted(self.votes.items())))

    def silent(self) -> list[PeerId]:
        """Seats that have not voted yet: the proposal is repeated to them."""
        return [peer for peer in self.committee if peer not in self.votes]
