"""Certificates on their way to this peer's anchors: asked for, checked, their updates fetched, handed over, reported.

What stands and what is undone is decided by history.py; who may sign by standing.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable

from braniac.protocol import events, limits
from braniac.protocol.agreement import Agreement
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.history import History
from braniac.protocol.identity import PeerId
from braniac.protocol.manifest import Manifest
from braniac.protocol.messages import Certificate, CertificateName
from braniac.protocol.outbox import Outbox
from braniac.protocol.roster import Roster
from braniac.protocol.sources import Sources
from braniac.protocol.standing import Standing


class Certificates:
    """What other peers' and this peer's own committees have decided."""

    def __init__(
        self,
        manifest: Manifest,
        me: PeerId,
        tier: int,
        start_slot: int,
        history: History,
        agreement: Agreement,
        roster: Roster,
        standing: Standing,
        outbox: Outbox,
        emit: Callable[[events.Event], None],
    ) -> None:
        """Slots up to `start_slot` are not reported: they belong to an earlier life of this peer, or to no run yet."""
        self._manifest = manifest
        self._me = me
        self._tier = tier
        self._start_slot = max(-1, start_slot)
        self._history = history
        self._agreement = agreement
        self._roster = roster
        self._standing = standing
        self._outbox = outbox
        self._emit = emit
        self._sources = Sources(manifest, me, roster, standing)
        self._asked: dict[bytes, int] = {}
        self._settled: set[int] = set()
        self._passed_on: set[CertificateName] = set()

    def lacking(self, names: Iterable[CertificateName], now_slot: int) -> list[CertificateName]:
        """What a peer lists and this one lacks, oldest first."""
        horizon = now_slot - self._history.horizon
        found = [
            name
            for name in names
            if name.slot > horizon
            and not self._history.covered(name)
            and not (self._history.entry(name.slot) and self._history.final(name.slot, now_slot))
        ]
        return sorted(found, key=lambda n: n.slot)

    def missing(self, names: Iterable[CertificateName], now_slot: int) -> tuple[CertificateName, ...]:
        """Anti-entropy: what to ask a peer for that lists these; each name at most once a slot."""
        news = [name for name in self.lacking(names, now_slot) if self._asked.get(name.digest) != now_slot]
        missing = news[: limits.REQUEST_NAMES_MAX]
        self._asked.update((name.digest, now_slot) for name in missing)
        return tuple(missing)

    def check(self, certificate: Certificate, now_slot: int) -> None:
        """May these peers decide that slot? Their signatures were checked when it was read. Raises WireError."""
        verdict = certificate.verdict
        if verdict.fragment != self._manifest.fragment_of(verdict.slot) or verdict.slot > now_slot + 1:
            raise WireError(Refusal.MALFORMED, "a certificate of a slot that cannot have one")
        if verdict.update_bytes > self._manifest.update_bytes_max(verdict.fragment):
            raise WireError(Refusal.OVERSIZE, f"an update of {verdict.update_bytes} bytes")
        if self._standing.could_decide(verdict, {peer for peer, _ in certificate.signatures}):
            return
        # Its signers may be gone since: then it counts if as many live peers as there are, up to two, have applied it.
        witnesses = [member for member in self._roster.speaking(now_slot) if member.ready_slot >= 0]
        if sum(certificate.name in member.recent for member in witnesses) < max(1, min(2, len(witnesses))):
            raise WireError(Refusal.NOT_COMMITTEE, "a certificate signed by peers that could not decide that slot")

    def publish(self, certificate: Certificate, now_slot: int) -> None:
        """A slot of this peer's own has its signatures: tell everybody, unless a better certificate came first."""
        with contextlib.suppress(WireError):
            self.take(certificate, now_slot)
            self._passed_on.add(certificate.name)
            self._outbox.broadcast(certificate, now_slot)

    def pass_on(self, certificate: Certificate) -> None:
        """In a large swarm, where nobody tells everybody, tell a few neighbours of a certificate that was taken."""
        if certificate.name not in self._passed_on:
            self._passed_on.add(certificate.name)
            others_each_time = int.from_bytes(certificate.verdict.digest[:4])
            chosen = self._roster.some_neighbours(limits.CERTIFICATE_PEERS, others_each_time)
            self._outbox.send_all(chosen, certificate)

    def take(self, certificate: Certificate, now_slot: int) -> None:
        """A certificate that may stand: undo what it replaces, fetch its update. Raises WireError if it may not."""
        verdict = certificate.verdict
        if not self._manifest.holds(self._tier, verdict.fragment):
            self._history.count(certificate, now_slot)
            self.settle(verdict.slot, certificate)
            return
        if self._agreement.outdated(verdict.fragment, now_slot):
            return  # it is asked for again, unless a download has brought it by then
        news, loser = self._history.accept(certificate, now_slot)
        if not news:
            return
        self._history.count(certificate, now_slot)
        if loser is not None:
            self._emit(events.UpdateDue(loser.certificate, loser.acknowledged, undo=True))
        for share in verdict.shares:
            if member := self._roster.get(share.commitment.peer):
                member.merged += 1
        self._emit(self._sources.ask(certificate, now_slot))

    def want_updates(self, now_slot: int) -> None:
        """Ask once more for the updates that have not come."""
        for certificate in self._history.missing_updates():
            self._emit(self._sources.ask(certificate, now_slot))

    def update_arrived(self, digest: bytes) -> None:
        """An update is here: apply what waits for it, and take back what it holds of this peer's own work."""
        for entry in self._history.waiting_for(digest):
            certificate = entry.certificate
            share = certificate.verdict.share_of(self._me)
            mine = self._history.offers.get(certificate.verdict.slot)
            entry.handed = True
            entry.acknowledged = mine if share and share.commitment.payload_digest == mine else None
            self._emit(events.UpdateDue(certificate, entry.acknowledged))
            self.settle(certificate.verdict.slot, certificate)

    def settle(self, slot: int, certificate: Certificate | None) -> None:
        """Report what became of a slot, once; None if its time is over."""
        if slot in self._settled or slot <= self._start_slot:
            return
        self._settled.add(slot)
        mine = self._history.offers.get(slot)
        share = certificate.verdict.share_of(self._me) if certificate else None
        merged = share is not None and share.commitment.payload_digest == mine
        fragment = self._manifest.fragment_of(slot)
        self._emit(events.SlotSettled(slot, fragment, certificate, mine is not None, merged))

    def forget(self, now_slot: int) -> None:
        """Let go of what is beyond the horizon."""
        self._settled = {s for s in self._settled if s > now_slot - self._history.horizon}
        self._passed_on = {name for name in self._passed_on if name.slot > now_slot - self._history.horizon}
        self._asked = {digest: s for digest, s in self._asked.items() if s >= now_slot - 1}
        self._sources.forget(self._history.missing_updates())
