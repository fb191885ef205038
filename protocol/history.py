"""Which certificates this peer has, per slot: what to apply, what to undo, what to ask for, what to serve.

Updates are integers and add up, so the state of a fragment is a *set* of certificates, in any order. A second
certificate for a slot can only appear when views of the roster differed; then the higher rank stands (more
signatures, more weight, lower hash), the loser is undone exactly, and after a full window the slot is final.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from braniac.protocol import limits
from braniac.protocol.contributions import Contributions
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.manifest import Manifest
from braniac.protocol.messages import Certificate, CertificateName
from braniac.protocol.statements import certificate_bytes, open_certificate


@dataclass
class Entry:
    """One slot's standing certificate."""

    certificate: Certificate
    acknowledged: bytes | None = None
    """Digest of this peer's own payload in it, once it was handed over."""
    handed: bool = False
    """Handed to the daemon to apply; before that its update is still being fetched."""


class History:
    """Certificates of the last windows, and the offers this peer made."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._entries: dict[int, Entry] = {}
        self._confirmed: dict[int, Entry] = {}
        """What the daemon has said it applied: the state that belongs to its weights and anchors right now."""
        self.offers: dict[int, bytes] = {}
        self.floor: dict[int, int] = {}
        """Per fragment: slots up to here are inside its anchor for good, because it was downloaded in that state."""
        self.last: dict[int, int] = {}
        """Per fragment: the last slot merged into its anchor, -1 for the initial weights."""
        self.contributions = Contributions()
        """Of everybody, in all certificates seen here."""

    @property
    def horizon(self) -> int:
        """Slots that certificates are kept and accepted for."""
        return limits.HISTORY_WINDOWS * self._manifest.window

    def entry(self, slot: int) -> Entry | None:
        return self._entries.get(slot)

    def covered(self, name: CertificateName) -> bool:
        """Whether nothing is to be asked about this certificate: it is here, or inside a downloaded anchor."""
        fragment = self._manifest.fragment_of(name.slot)
        entry = self._entries.get(name.slot)
        return (
            fragment not in self.last
            or name.slot <= self.floor.get(fragment, -1)
            or (entry is not None and entry.certificate.verdict.digest == name.digest)
        )

    def final(self, slot: int, now_slot: int) -> bool:
        """Whether a slot's standing certificate can no longer be replaced."""
        return slot <= now_slot - self._manifest.window

    def accept(self, certificate: Certificate, now_slot: int) -> tuple[bool, Entry | None]:
        """Take in a checked certificate: whether it is news, and the applied entry that must be undone for it, if any.

        Raises WireError if it is too old or lost its slot for good.
        """
        slot, digest = certificate.verdict.slot, certificate.verdict.digest
        if slot <= now_slot - self.horizon:
            raise WireError(Refusal.STALE, f"a certificate of slot {slot}, too long ago")
        if self.covered(certificate.name):
            return False, None
        standing = self._entries.get(slot)
        if standing is None:
            self._entries[slot] = Entry(certificate)
            return True, None
        if self.final(slot, now_slot) or certificate.rank() <= standing.certificate.rank():
            raise WireError(Refusal.CONFLICT, f"slot {slot} has a better certificate than {digest.hex()[:8]}")
        self._entries[slot] = Entry(certificate)
        return True, standing if standing.handed else None

    def count(self, certificate: Certificate, now_slot: int) -> None:
        """Add a checked certificate, of any fragment, to the record of contributions; not one of long ago once more."""
        if certificate.verdict.slot > now_slot - self.horizon:
            self.contributions.note(certificate)

    def missing_updates(self) -> list[Certificate]:
        """Certificates that stand but whose update has not arrived."""
        return [e.certificate for e in self._entries.values() if not e.handed and self.wanted(e.certificate)]

    def waiting_for(self, update_digest: bytes) -> list[Entry]:
        """Entries that can be applied once this update is here, oldest slot first."""
        found = [
            e
            for e in self._entries.values()
            if not e.handed and e.certificate.verdict.update_digest == update_digest and self.wanted(e.certificate)
        ]
        return sorted(found, key=lambda e: e.certificate.verdict.slot)

    def applying(self, fragment: int) -> bool:
        """Whether a certificate of the fragment is known here and not inside its anchor yet."""
        return any(
            slot not in self._confirmed and self.wanted(entry.certificate)
            for slot, entry in self._entries.items()
            if entry.certificate.verdict.fragment == fragment
        )

    def wanted(self, certificate: Certificate) -> bool:
        """Whether its update moves an anchor that is here and does not hold it for good."""
        verdict = certificate.verdict
        return verdict.fragment in self.last and verdict.slot > self.floor.get(verdict.fragment, -1)

    def confirm(self, certificate: Certificate, acknowledged: bytes | None, *, undo: bool) -> None:
        """The daemon has applied (or undone) it."""
        slot, fragment = certificate.verdict.slot, certificate.verdict.fragment
        if undo:
            self._confirmed.pop(slot, None)
        else:
            self._confirmed[slot] = Entry(certificate, acknowledged, handed=True)
            self.last[fragment] = max(self.last.get(fragment, -1), slot)

    def restore(self, fragment: int, slot: int) -> None:
        """The anchor was downloaded as of `slot`: later certificates are applied anew, earlier ones are in it."""
        self.floor[fragment] = self.last[fragment] = slot
        for at, entry in self._entries.items():
            if entry.certificate.verdict.fragment == fragment:
                entry.handed = at <= slot
        kept = {s: e for s, e in self._confirmed.items() if e.certificate.verdict.fragment != fragment}
        self._confirmed = kept
        self.disown(fragment)

    def disown(self, fragment: int) -> set[bytes]:
        """The weights were reset to the anchor: nothing of what was offered is left in them to subtract.

        Digests of what was offered, of which updates that are on their way may still say that it is to be subtracted.
        """
        offered = {d for s, d in self.offers.items() if self._manifest.fragment_of(s) == fragment}
        self.offers = {s: d for s, d in self.offers.items() if self._manifest.fragment_of(s) != fragment}
        for entry in (*self._entries.values(), *self._confirmed.values()):
            if entry.certificate.verdict.fragment == fragment:
                entry.acknowledged = None
        return offered

    def lose(self, fragment: int) -> None:
        """The fragment's anchor is not to be trusted until it is restored."""
        self.last.pop(fragment, None)

    def recent(self, now_slot: int) -> tuple[CertificateName, ...]:
        """What this peer can serve: names for the heartbeat, newest first."""
        slots = sorted((s for s, e in self._entries.items() if e.handed and s > now_slot - self.horizon), reverse=True)
        return tuple(self._entries[s].certificate.name for s in slots[: limits.RECENT_CERTIFICATES_MAX])

    def prune(self, now_slot: int) -> None:
        """Forget what is beyond the horizon."""
        edge = now_slot - self.horizon
        self._entries = {s: e for s, e in self._entries.items() if s > edge}
        self._confirmed = {s: e for s, e in self._confirmed.items() if s > edge}
        self.offers = {s: d for s, d in self.offers.items() if s > edge}
        self.contributions.prune(now_slot - self._manifest.window, edge)

    def blobs(self) -> set[bytes]:
        """Digests that must not be deleted: updates that can be undone or served, offers that may be acknowledged."""
        return {e.certificate.verdict.update_digest for e in self._entries.values()} | self.confirmed_blobs()

    def acknowledged(self) -> int:
        """How many of the offers remembered here a certificate has taken."""
        return sum(entry.acknowledged is not None for entry in self._confirmed.values())

    def confirmed_blobs(self) -> set[bytes]:
        """Digests that the state of this moment refers to."""
        updates = {e.certificate.verdict.update_digest for e in self._confirmed.values()}
        return updates | set(self.offers.values())

    def to_json(self) -> dict[str, Any]:
        """What belongs to the anchors and weights of this moment: confirmed certificates only."""
        return {
            "entries": [
                {
                    "certificate": certificate_bytes(e.certificate).hex(),
                    "acknowledged": e.acknowledged.hex() if e.acknowledged else None,
                }
                for e in self._confirmed.values()
            ],
            "offers": {str(slot): digest.hex() for slot, digest in self.offers.items()},
            "floor": {str(f): slot for f, slot in self.floor.items()},
            "last": {str(f): slot for f, slot in self.last.items()},
            "contributions": self.contributions.to_json(),
        }

    @classmethod
    def from_json(cls, manifest: Manifest, stored: dict[str, Any]) -> History:
        """Inverse of `to_json`. Raises ProtocolError, KeyError, TypeError or ValueError if the state is damaged."""
        history = cls(manifest)
        for item in stored["entries"]:
            certificate = open_certificate(bytes.fromhex(item["certificate"]), manifest.run_id)
            acknowledged = bytes.fromhex(item["acknowledged"]) if item["acknowledged"] else None
            history._entries[certificate.verdict.slot] = Entry(certificate, acknowledged, handed=True)
            history._confirmed[certificate.verdict.slot] = Entry(certificate, acknowledged, handed=True)
        history.offers = {int(slot): bytes.fromhex(digest) for slot, digest in stored["offers"].items()}
        history.floor = {int(f): int(slot) for f, slot in stored["floor"].items()}
        history.last = {int(f): int(slot) for f, slot in stored["last"].items()}
        if (contributions := stored.get("contributions")) is not None:
            history.contributions = Contributions.from_json(contributions)
        else:  # of a version that did not count
            for entry in history._entries.values():
                history.contributions.note(entry.certificate)
        return history

    def begin(self, fragments: Iterable[int]) -> None:
        """Start from the initial weights of a new run."""
        self.last = dict.fromkeys(fragments, -1)
