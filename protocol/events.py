"""What the protocol object tells the daemon. Events are to be handled in order; those marked (answer) expect a call
back."""

from __future__ import annotations

from dataclasses import dataclass

from braniac.protocol.identity import PeerId
from braniac.protocol.messages import Certificate, FragmentState


@dataclass(frozen=True)
class SlotBegan:
    """A new slot of the swarm clock."""

    slot: int
    fragment: int


@dataclass(frozen=True)
class FragmentDue:
    """Offer the uncommitted work on `fragment` now: encode, store durably, then `Engine.offer` (answer)."""

    slot: int
    fragment: int


@dataclass(frozen=True)
class BlobWanted:
    """Fetch a blob, check its hash, then `Engine.blob_fetched` (answer), also when it cannot be had."""

    digest: bytes
    size: int
    holders: tuple[PeerId, ...]
    """Who should have it, best first; a holder may be this peer itself."""
    patient: bool = False
    """Who has it not will have it soon, and is asked once more later: until then nobody that is named after it."""


@dataclass(frozen=True)
class MergeDue:
    """Merge the fetched payloads of a slot this peer owns, store the update, then `Engine.merged` (answer)."""

    slot: int
    fragment: int
    contributions: tuple[tuple[PeerId, int, bytes], ...]
    """(peer, declared tokens, payload digest)"""


@dataclass(frozen=True)
class CheckDue:
    """Merge the fetched payloads of another owner's proposal, store the update, then `Engine.checked` (answer).

    If they cannot be read here, `Engine.check_failed` is the answer.
    """

    slot: int
    fragment: int
    contributions: tuple[tuple[PeerId, int, bytes], ...]
    """(peer, declared tokens, payload digest)"""


@dataclass(frozen=True)
class UpdateDue:
    """Apply (or undo) a certificate's update to anchor and weights, then `Engine.anchor_moved` (answer)."""

    certificate: Certificate
    acknowledged: bytes | None
    """Digest of this peer's own payload if the certificate took it: it is subtracted from the weights."""
    undo: bool = False

    @property
    def fragment(self) -> int:
        return self.certificate.verdict.fragment


@dataclass(frozen=True)
class FragmentLost:
    """This anchor is missing, too old or disagrees: download it, then `Engine.fragment_restored` (answer)."""

    state: FragmentState
    holders: tuple[PeerId, ...]


@dataclass(frozen=True)
class SlotSettled:
    """What became of a slot: it has a certificate that was applied here, or its time is over."""

    slot: int
    fragment: int
    certificate: Certificate | None
    offered: bool
    """This peer made an offer for it."""
    merged: bool
    """The certificate lists that offer."""


@dataclass(frozen=True)
class PeerJoined:
    """A peer was heard for the first time, or again after it was gone or restarted."""

    peer: PeerId
    tier: int
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class PeerMentioned:
    """A peer says that another one is about: remember where it can be reached, then `Engine.introduce` it."""

    peer: PeerId
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class FragmentUnheld:
    """Nobody holds this fragment: begin it from the initial weights, then `Engine.fragment_restored` (answer)."""

    fragment: int


@dataclass(frozen=True)
class PeerLeft:
    """A peer said goodbye, or was silent for too long."""

    peer: PeerId
    said_goodbye: bool


@dataclass(frozen=True)
class Equivocated:
    """A peer signed two different statements about one slot; it is banned for the run."""

    peer: PeerId
    slot: int


@dataclass(frozen=True)
class WrongMerge:
    """A slot's owner proposed an update that is not what its contributions make; this peer has not signed it."""

    owner: PeerId
    slot: int


@dataclass(frozen=True)
class IdentityShared:
    """Somebody else contributes to the run in this peer's name: one of the two must stop."""

    slot: int


Event = (
    SlotBegan
    | FragmentDue
    | BlobWanted
    | MergeDue
    | CheckDue
    | UpdateDue
    | FragmentLost
    | SlotSettled
    | PeerJoined
    | PeerMentioned
    | FragmentUnheld
    | PeerLeft
    | Equivocated
    | WrongMerge
    | IdentityShared
)
