"""Who may do what in a slot, as far as this peer can tell: sign, have a seat, contribute.

Everything is computed from the roster and hashes, so peers that have heard the same come to the same answers.
"""

from __future__ import annotations

from collections.abc import Iterable

from braniac.protocol import committee as seats
from braniac.protocol import limits
from braniac.protocol.admission import claimants, known_since
from braniac.protocol.identity import PeerId
from braniac.protocol.manifest import Manifest
from braniac.protocol.messages import Presence, Verdict
from braniac.protocol.roster import Member, Roster, dialable
from braniac.protocol.spans import Spans


class Standing:
    """What this peer has said of itself, and what that and the roster mean for a slot."""

    def __init__(
        self, manifest: Manifest, me: PeerId, tier: int, roster: Roster, start_slot: int, signed: Spans | None
    ) -> None:
        """Nothing is signed for slots up to `start_slot`, nor for those in `signed`: an earlier life may have done so.

        None: there was no earlier life, and there will be no later one.
        """
        self._manifest = manifest
        self._me = me
        self._tier = tier
        self._roster = roster
        self._start_slot = start_slot
        self._signed = signed or Spans()
        self.noted = None if signed is None else Spans()
        """Nothing is signed for other slots, a restart would not know of it; None: there will be no restart."""
        self.ready_slot = -1
        self.unreachable_slot = 0
        """Since when others cannot dial this peer; 0: they can."""
        self.said: Presence | None = None
        """The last that this peer has said to all of a large swarm; None: all get its heartbeats."""
        self._holders: dict[int, int] = {}
        """slot -> how many peers are expected to hold its fragment and to be ready."""

    def forget(self, over: int) -> None:
        """Slots up to `over` are of no interest any more."""
        self._holders = {slot: count for slot, count in self._holders.items() if slot > over}

    # --- this peer ---------------------------------------------------------------------------------------------------

    def silent_in(self, slot: int) -> bool:
        """Whether this peer may have signed for that slot before it was restarted: it does not do so again."""
        return slot <= self._start_slot or slot in self._signed

    def may_sign(self, slot: int) -> bool:
        """Whether it has not done so in an earlier life, and a later one would know of it."""
        return not self.silent_in(slot) and (self.noted is None or slot in self.noted)

    def contributes(self, slot: int) -> bool:
        """Whether an own contribution to the slot is to be expected."""
        mine = self.ready_slot >= 0 and self._manifest.holds(self._tier, self._manifest.fragment_of(slot))
        return mine and not self.silent_in(slot) and self.draws(slot, self._me)

    # --- contributors ------------------------------------------------------------------------------------------------

    def draws(self, slot: int, peer: PeerId, *, spare: int = 1) -> bool:
        """Whether a holder of the slot's fragment contributes: of very many a few, or `spare` times as many, by lot."""
        if slot not in self._holders:
            fragment = self._manifest.fragment_of(slot)
            holders = (m for m in self._roster.eligible(slot) if self._manifest.holds(m.tier, fragment))
            others = claimants(holders, known_since(slot, self._manifest.window))
            self._holders[slot] = others + self._manifest.holds(self._tier, fragment)
        places = spare * limits.CONTRIBUTORS_PER_SLOT
        return seats.drawn(seats.share_lot(self._manifest.run_id, slot, peer), places, self._holders[slot])

    def tier_of(self, peer: PeerId) -> int | None:
        """None if it is not known."""
        if peer == self._me:
            return self._tier
        member = self._roster.get(peer)
        return member.tier if member else None

    # --- seats -------------------------------------------------------------------------------------------------------

    def committee(self, slot: int) -> tuple[PeerId, ...]:
        """Whose signatures decide the slot, the owner first."""
        return seats.committee(self._manifest.run_id, slot, self._candidates(slot))

    def _candidates(self, slot: int) -> list[PeerId]:
        """Who may have a seat."""
        heard = self.said is None or self.said.slot >= slot - limits.ROSTER_LIVE_SLOTS
        return self._dialable(self._roster.standing(slot), slot, with_me=heard)

    def taking_part(self, slot: int) -> list[PeerId]:
        """Who is ready and passes things on."""
        return self._dialable(self._roster.eligible(slot), slot, with_me=True)

    def _dialable(self, members: Iterable[Member], slot: int, *, with_me: bool) -> list[PeerId]:
        """Those that can be dialled. Only if there is nobody like that, all the others."""
        eligible = {member.peer: member.dialable(slot) for member in members}
        if with_me and 0 <= self.ready_slot <= slot - limits.ELIGIBLE_SLOTS and not self.silent_in(slot):
            eligible[self._me] = dialable(self.unreachable_slot, slot)
        return [peer for peer, can_be_dialled in eligible.items() if can_be_dialled] or list(eligible)

    def could_decide(self, verdict: Verdict, signers: set[PeerId]) -> bool:
        """Whether, as far as this peer can tell, these signers were high enough and no seat was left out."""
        slot = verdict.slot
        edge = slot - 2 * limits.ROSTER_LIVE_SLOTS
        # A signer may have lapsed or begun to leave since: it is only outranked by those who could have had its seat.
        rivals = {p for p in signers if (m := self._roster.get(p)) is not None and m.heard_slot >= edge}
        # Nor does a ban undo what was decided about then: some have taken a certificate that others have yet to get.
        banned = self._roster.banned
        rivals |= {p for p in signers if p in banned and abs(slot - banned[p].slot) <= self._manifest.window}
        if self._me in signers or dialable(self.unreachable_slot, slot):
            rivals.add(self._me)
        candidates = self._candidates(slot)
        ranked = seats.ranking(self._manifest.run_id, slot, rivals.union(candidates))
        enough_seats = len(verdict.committee) >= min(len(candidates), limits.COMMITTEE_SIZE)
        return enough_seats and signers <= set(ranked[: limits.CERTIFICATE_RANK_MAX])
