"""The ledger (I1) and the agreement (I2), checked from their definitions and not through the code that is tested.

For every peer and fragment there is an account: the sum of what local steps added, and what each applied certificate
took. Weights less anchor must equal it to the bit, after every certificate and after every restart. An anchor must be
the initial weights plus the updates of a set of certificates, and the same set must give the same bytes everywhere.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from braniac.node import bridge
from braniac.protocol import codec
from braniac.protocol.bitpack import Int64Array
from braniac.protocol.events import UpdateDue
from braniac.protocol.messages import FragmentState
from tests.sim.training import FRAGMENT_TABLE, MODEL

if TYPE_CHECKING:
    from tests.sim.node import Life
    from tests.sim.world import World

Applied = frozenset[tuple[int, bytes]]
"""Certificates inside an anchor, as (slot, verdict digest)."""


@dataclass
class Account:
    """One fragment at one peer since it was last set to an anchor. A copy that was saved is still the same account."""

    number: int
    steps: Int64Array
    taken: dict[int, tuple[bytes, Int64Array]] = field(default_factory=dict)
    """slot -> (verdict digest, what its certificate took)."""

    def owed(self) -> Int64Array:
        """What weights less anchor must be."""
        return self.steps - sum((vector for _, vector in self.taken.values()), np.zeros_like(self.steps))

    def copy(self) -> Account:
        return Account(self.number, self.steps.copy(), dict(self.taken))


class Anchors:
    """Which bytes each set of certificates makes of a fragment, as seen anywhere so far (I2)."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._bytes_of: dict[tuple[int, Applied], bytes] = {}
        self._applied: dict[tuple[int, bytes], Applied] = {}
        for fragment in FRAGMENT_TABLE:
            initial = bridge.anchor_bytes(bridge.initial_anchor(MODEL, fragment, world.manifest.seed))
            self.note(fragment.index, frozenset(), hashlib.sha256(initial).digest(), "the initial weights")

    def note(self, fragment: int, applied: Applied, digest: bytes, who: str) -> None:
        """Somebody holds these bytes after these certificates."""
        known = self._bytes_of.setdefault((fragment, applied), digest)
        self._applied.setdefault((fragment, digest), applied)
        if known != digest:
            slots = sorted(slot for slot, _ in applied)
            self._world.violated("I2 agreement", who, f"fragment {fragment} differs after the same slots {slots}")

    def applied(self, fragment: int, digest: bytes) -> Applied | None:
        """The certificates in an anchor; None if nobody ever made it."""
        return self._applied.get((fragment, digest))


class Ledger:
    """The accounts of one machine, over all lives of its node."""

    def __init__(self, world: World, name: str, anchors: Anchors) -> None:
        self.accounts: dict[int, Account] = {}
        self.checked = 0
        """How often weights, anchor and account were compared."""
        self._world = world
        self._name = name
        self._anchors = anchors
        self._applied: dict[int, Applied] = {}
        self._moments: dict[tuple[int, bytes, bytes], Account] = {}
        """(fragment, hash of weights, hash of anchor) -> the account then: what a generation may hold."""
        self._announced: dict[int, tuple[bytes, int]] = {}
        """slot -> (payload digest, number of the account it came from)."""
        self._numbers = itertools.count()
        self._life: Life

    # --- what the node does ------------------------------------------------------------------------------------------

    def began(self, life: Life, saved: bool) -> None:
        """A process has recovered, or begun, its state."""
        self._life = life
        self.accounts, self._applied = {}, {}
        assert life.replica is not None
        assert life.trainer is not None
        for f, state in life.replica.anchors.items():
            applied = self._anchors.applied(f, state.digest)
            weights = life.trainer.peek(FRAGMENT_TABLE[f])
            account = self._moments.get((f, _hash(weights), state.digest))
            if applied is None or (saved and account is None):
                self._violated(f"fragment {f} was recovered in a state that it never was in")
                continue
            self._applied[f] = applied
            self.accounts[f] = account.copy() if saved and account is not None else self._new_account(f)
            self._compare(f, "after the start")
            if not saved:
                self.seen(f, weights)

    def stepped(self, fragment: int, change: Int64Array) -> None:
        """See Watcher."""
        if fragment in self.accounts:
            self.accounts[fragment].steps += change

    def seen(self, fragment: int, weights: Tensor) -> None:
        """See Watcher."""
        assert self._life.replica is not None
        state = self._life.replica.anchors.get(fragment)
        if state is not None and fragment in self.accounts:
            self._moments[fragment, _hash(weights), state.digest] = self.accounts[fragment].copy()

    def loaded(self, fragment: int) -> None:
        """See Watcher: own work on the fragment is given up."""
        self.accounts[fragment] = self._new_account(fragment)

    def offered(self, slot: int, digest: bytes) -> None:
        """A payload is announced: it must be the only one of this peer for the slot, in all its lives (I3)."""
        account = self.accounts.get(self._world.manifest.fragment_of(slot))
        if account is None:
            return self._violated(f"slot {slot}: an offer of a fragment that is not here")
        known, _ = self._announced.setdefault(slot, (digest, account.number))
        if known != digest:
            self._world.violated("I3 monotone", self._name, f"two offers for slot {slot}")

    def applied(self, update: UpdateDue, state: FragmentState) -> None:
        """A certificate was applied or undone: check what it did to anchor and weights."""
        verdict = update.certificate.verdict
        f, slot = verdict.fragment, verdict.slot
        account = self.accounts.get(f)
        if account is None:
            return self._violated(f"slot {slot}: applied to fragment {f}, which is not here")
        if update.undo:
            digest, _ = account.taken.pop(slot, (b"", None))
            if digest != verdict.digest:
                return self._violated(f"slot {slot}: undone, and it was not applied")
            self._applied[f] -= {(slot, verdict.digest)}
        else:
            if slot in account.taken:
                return self._violated(f"slot {slot}: two certificates applied at once")
            account.taken[slot] = (verdict.digest, self._take(update, account))
            self._applied[f] |= {(slot, verdict.digest)}
        self._anchors.note(f, self._applied[f], state.digest, self._name)
        self._compare(f, f"after {'undoing' if update.undo else 'applying'} slot {slot}")

    def restored(self, state: FragmentState) -> None:
        """A fragment was set to a downloaded anchor, or to the initial weights."""
        f = state.fragment
        applied = self._anchors.applied(f, state.digest)
        if applied is None:
            return self._world.violated("I4 no poison", self._name, f"fragment {f} set to bytes that nobody made")
        self._applied[f] = applied
        self._compare(f, "after its download")
        assert self._life.trainer is not None
        self.seen(f, self._life.trainer.peek(FRAGMENT_TABLE[f]))

    # --- from the definitions ----------------------------------------------------------------------------------------

    def _new_account(self, f: int) -> Account:
        return Account(next(self._numbers), np.zeros(FRAGMENT_TABLE[f].size, np.int64))

    def _take(self, update: UpdateDue, account: Account) -> Int64Array:
        """What the certificate takes from this peer: its listed payload, where the update holds values."""
        verdict, manifest = update.certificate.verdict, self._world.manifest
        layout = manifest.fragments[verdict.fragment].layout
        share = verdict.share_of(self._life.machine.identity.peer_id)
        digest, number = self._announced.get(verdict.slot, (b"", -1))
        mine = share is not None and number == account.number
        if share is not None and digest != share.commitment.payload_digest:
            self._violated(f"slot {verdict.slot}: holds a payload in this peer's name that it did not offer")
        assert self._life.equipment is not None
        store = self._life.equipment.store
        taken = np.zeros(layout.size, np.int64)
        if mine:
            held = codec.decode(layout, manifest.down, store.get(verdict.update_digest)).positions
            taken[held] = codec.decode(layout, manifest.up, store.get(digest)).dense(layout.size)[held]
        return taken

    def _compare(self, f: int, when: str) -> None:
        """Weights less anchor, to the bit; all of it finite and in range (I4)."""
        assert self._life.replica is not None
        assert self._life.trainer is not None
        self.checked += 1
        weights = self._life.trainer.peek(FRAGMENT_TABLE[f]).double().numpy() * (1 << 20)
        if not np.isfinite(weights).all() or (weights != np.rint(weights)).any() or np.abs(weights).max() >= 16 << 20:
            return self._world.violated("I4 no poison", self._name, f"fragment {f} holds impossible weights {when}")
        residual = weights.astype(np.int64) - self._life.replica.anchor(f)
        if not np.array_equal(residual, self.accounts[f].owed()):
            wrong = int(np.abs(residual - self.accounts[f].owed()).astype(bool).sum())
            self._violated(f"fragment {f} {when}: {wrong} values of weights - anchor are not what they should be")

    def _violated(self, sentence: str) -> None:
        self._world.violated("I1 ledger", self._name, sentence)


def _hash(weights: Tensor) -> bytes:
    return hashlib.sha256(weights.numpy().tobytes()).digest()
