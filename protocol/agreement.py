"""Do we hold the same anchors as the others (I2), and if not, who is right?

Peers compare the hash of an anchor whenever they say they merged the same last slot into it. Updates add up in any
order, so a mismatch means nothing while one of two peers lists a certificate of the fragment that the other does not,
or has one still to apply: certificates go round, and lists are compared over the last three windows. Mismatches without
such a reason, two in a row at different slots, do not heal by certificates: then the majority is right (of equal camps
the one with the lower hash), and the minority downloads. Whoever has not reported that slot yet may still be on our
side: else the first to report would be the majority. A joiner is in the same position with every fragment.

Whoever was away for longer than certificates are kept first listens. A certificate on top of an anchor with a gap below
it would make a recent anchor of wrong bytes, and among two peers the lower hash might then beat all that was missed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

from braniac.protocol import limits, listing
from braniac.protocol.events import FragmentLost, FragmentUnheld
from braniac.protocol.history import History
from braniac.protocol.identity import PeerId
from braniac.protocol.manifest import Manifest
from braniac.protocol.messages import CertificateName, FragmentState
from braniac.protocol.roster import Member

_STRIKES = 2
_UNHELD_SLOTS = 4


class Agreement:
    """What this peer holds, against what others say they hold."""

    def __init__(self, manifest: Manifest, me: PeerId, held: tuple[int, ...], slot: int) -> None:
        """This peer has listened since `slot`."""
        self._since = slot
        self._manifest = manifest
        self._me = me
        self._held = held
        self._patience_slots = max(_UNHELD_SLOTS, listing.parts_of(manifest))
        """After so long whoever is heard has listed all its anchors, whatever was lost."""
        self._strikes: dict[int, set[int]] = defaultdict(set)
        self._asked: dict[int, int] = {}
        self._first_heard: int | None = None
        self._reviewed_slot: int | None = None
        self.mine: dict[int, FragmentState] = {}
        self.disagreements = 0
        """Mismatches seen so far, also those that healed by themselves."""

    def set_mine(self, state: FragmentState) -> None:
        """This anchor is here now."""
        self.mine[state.fragment] = state
        self._asked.pop(state.fragment, None)

    def forget(self, fragment: int) -> None:
        """The anchor is not here any more."""
        self.mine.pop(fragment, None)
        self._asked.pop(fragment, None)

    def ask_again(self, fragment: int) -> None:
        """A download failed: the next review may choose anew."""
        self._asked.pop(fragment, None)

    def listen_anew(self, slot: int) -> None:
        """After a rest or a sleep: what one peer says first is not what all say."""
        self._since = slot
        self._first_heard = None

    def outdated(self, fragment: int, now_slot: int) -> bool:
        """Whether our anchor may lack certificates that are not kept any more, and others had no time to say so yet."""
        mine, kept_slots = self.mine.get(fragment), limits.HISTORY_WINDOWS * self._manifest.window
        gap = mine is not None and mine.slot <= self._since - kept_slots
        return gap and now_slot < self._since + self._patience_slots

    def overtaken(self, voices: list[Member], edge: int) -> bool:
        """Whether an anchor of ours is too old to be repaired by certificates, and others have a newer one."""
        return any(
            mine.slot <= edge and any(m.anchors[f].slot > mine.slot for m in voices if f in m.anchors)
            for f, mine in self.mine.items()
        )

    def review(
        self, members: list[Member], now_slot: int, history: History, spoken_of: Collection[int] | None = None
    ) -> Iterator[FragmentLost | FragmentUnheld]:
        """After a heartbeat: fragments to be downloaded or begun anew, each asked for at most once a window.

        Anchors that the heartbeat has not `spoken_of` are compared once a slot only. None: all are compared.
        """
        voices = [member for member in members if member.ready_slot >= 0]
        if voices and self._first_heard is None:
            self._first_heard = now_slot
        if spoken_of is not None and now_slot == self._reviewed_slot:
            compared = [f for f in self._held if f in spoken_of or f not in self.mine]
        else:
            compared, self._reviewed_slot = list(self._held), now_slot
        for fragment in compared:
            if now_slot - self._asked.get(fragment, -1 << 60) < self._manifest.window:
                continue
            if (choice := self._choose(fragment, voices, now_slot, history)) is not None:
                self._asked[fragment] = now_slot
                self._strikes.pop(fragment, None)
                self.mine.pop(fragment, None)
                holders = tuple(m.peer for m in voices if m.anchors.get(fragment) == choice)
                yield FragmentLost(choice, holders)
            elif self._unheld(fragment, voices, now_slot):
                self._asked[fragment] = now_slot
                yield FragmentUnheld(fragment)

    def _unheld(self, fragment: int, voices: list[Member], now_slot: int) -> bool:
        """Whether a fragment is missing here and nobody has spoken of it for long enough to be sure."""
        if fragment in self.mine or not self._heard_out(voices, now_slot, _UNHELD_SLOTS):
            return False
        return not self._claims(fragment, voices, now_slot)

    def _heard_out(self, voices: list[Member], now_slot: int, slots: int) -> bool:
        """Whether others had so many slots to speak up, and those that did have listed all that they hold."""
        if self._first_heard is None or now_slot < self._first_heard + slots:
            return False
        patient = now_slot >= self._first_heard + self._patience_slots
        return patient or all(member.lists_from <= now_slot for member in voices)

    def _choose(self, fragment: int, voices: list[Member], now_slot: int, history: History) -> FragmentState | None:
        """The state to download, or None if ours is fine or it is too early to tell."""
        mine = self.mine.get(fragment)
        if mine is not None and now_slot - history.horizon < mine.slot <= now_slot + 1:
            same = [s for m in voices if (s := m.anchors.get(fragment)) is not None and s.slot == mine.slot]
            if all(state.digest == mine.digest for state in same):  # nearly always, so this is quick
                if same:
                    self._strikes.pop(fragment, None)
                return None
        claims = self._claims(fragment, voices, now_slot)
        if mine is None:
            return self._agreed(claims, voices, now_slot)
        if mine.slot <= now_slot - history.horizon:
            # Too long ago to be repaired by certificates.
            return self._agreed({s: n for s, n in claims.items() if s.slot > mine.slot}, voices, now_slot)
        if _rivals(mine, claims):  # seldom: only then is it worth going through the lists
            if history.applying(fragment):
                return None
            silent = sum(state.slot != mine.slot for m in voices if (state := m.anchors.get(fragment)) is not None)
            claims = self._claims(fragment, self._alike(mine, voices, now_slot, history), now_slot)
            return self._judge(mine, claims, silent)
        return self._judge(mine, claims, 0)

    def _agreed(self, claims: dict[FragmentState, int], voices: list[Member], now_slot: int) -> FragmentState | None:
        """The state to believe: two peers must agree, unless more had time to speak and there is still only one."""
        alone = sum(claims.values()) == 1 and self._heard_out(voices, now_slot, 1)
        agreed = [state for state, count in claims.items() if count >= (1 if alone else 2)]
        return max(agreed, key=lambda s: (claims[s], s.slot, s.digest), default=None)

    def _alike(self, mine: FragmentState, voices: list[Member], now_slot: int, history: History) -> Iterator[Member]:
        """Who lists the same certificates of the fragment as this peer, as far as all lists go."""
        since = max(history.floor.get(mine.fragment, -1), now_slot - history.horizon + self._manifest.window)

        def listed(names: Iterable[CertificateName]) -> set[CertificateName]:
            fragment_of = self._manifest.fragment_of
            return {n for n in names if since < n.slot <= mine.slot and fragment_of(n.slot) == mine.fragment}

        ours = listed(history.recent(now_slot))
        return (member for member in voices if listed(member.recent) == ours)

    def _judge(self, mine: FragmentState, claims: dict[FragmentState, int], silent: int) -> FragmentState | None:
        """Compare with those who merged the same last slot; `silent` others hold the fragment as of another one."""
        rivals = _rivals(mine, claims)
        if not rivals:
            if mine in claims:
                self._strikes.pop(mine.fragment, None)
            return None
        strikes = self._strikes[mine.fragment]
        if mine.slot not in strikes:
            self.disagreements += 1
            strikes.add(mine.slot)
        best = min(rivals, key=lambda s: (-rivals[s], s.digest))
        theirs, ours = rivals[best], claims.get(mine, 0) + 1 + silent
        outvoted = theirs > ours or (theirs == ours and best.digest < mine.digest)
        return best if outvoted and len(strikes) >= _STRIKES else None

    @staticmethod
    def _claims(fragment: int, voices: Iterable[Member], now_slot: int) -> dict[FragmentState, int]:
        """How many peers hold which state of the fragment."""
        claims: dict[FragmentState, int] = defaultdict(int)
        for member in voices:
            state = member.anchors.get(fragment)
            if state is not None and state.slot <= now_slot + 1:
                claims[state] += 1
        return claims


def _rivals(mine: FragmentState, claims: dict[FragmentState, int]) -> dict[FragmentState, int]:
    """Claims of other bytes after the same last slot."""
    return {state: n for state, n in claims.items() if state.slot == mine.slot and state.digest != mine.digest}
