"""What peers say to each other, as values: read and written by wire.py, which has checked every bound.

Statements that others must be able to check later (commitments, verdicts) keep the bytes that were signed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

from braniac.protocol.identity import PeerId


@dataclass(frozen=True)
class CertificateName:
    """Which certificate: its slot and the sha256 of its verdict."""

    slot: int
    digest: bytes


@dataclass(frozen=True)
class FragmentState:
    """An anchor by its hash."""

    fragment: int
    slot: int
    """Last slot merged into it, -1 for the initial weights."""
    digest: bytes


@dataclass(frozen=True)
class Heartbeat:
    """Who I am, what I hold, which certificates I have applied."""

    slot: int
    tier: int
    ready_slot: int
    """Since when its anchors are current and it may sit in committees, -1 while joining."""
    addresses: tuple[str, ...] = ()
    recent: tuple[CertificateName, ...] = ()
    anchors: tuple[FragmentState, ...] = ()
    tokens_per_s: float = 0.0
    unreachable_slot: int = 0
    """Since when others cannot dial it, so that it takes no seats; 0: they can."""
    loss: float | None = None
    """Training loss in nats per byte, as it says."""
    version: str = ""
    """Of its program, as it says."""
    parts: int = 1
    """`recent` and `anchors` are one of so many parts of its lists; see listing.py."""
    every: int = 1
    """Those that get no heartbeats hear of it once in so many slots; 1: all get them."""
    known: int = 0
    """How many live peers it knows."""


@dataclass(frozen=True)
class Presence:
    """What all of a large swarm must know of a peer; `body` and `signature` are the portable statement."""

    peer: PeerId
    sequence: int
    """From the count of its messages, so that what was said later is known."""
    slot: int
    tier: int
    ready_slot: int
    unreachable_slot: int
    every: int
    """It says so again within as many slots."""
    gone: bool
    addresses: tuple[str, ...]
    body: bytes = field(repr=False)
    signature: bytes = field(repr=False)


@dataclass(frozen=True)
class Commitment:
    """A peer's contribution to a slot by hash; `body` and `signature` are the portable statement."""

    peer: PeerId
    slot: int
    fragment: int
    payload_digest: bytes
    payload_bytes: int
    weight: int
    body: bytes = field(repr=False)
    signature: bytes = field(repr=False)


@dataclass(frozen=True)
class Share:
    """One contribution inside a verdict."""

    commitment: Commitment
    clip: int


@dataclass(frozen=True)
class Verdict:
    """What a committee signs: these contributions make this update."""

    slot: int
    fragment: int
    committee: tuple[PeerId, ...]
    shares: tuple[Share, ...]
    update_digest: bytes
    update_bytes: int
    refused: tuple[Commitment, ...]
    """Contributions that the owner had and that were not admissible beside the others."""
    body: bytes = field(repr=False)

    @property
    def commitments(self) -> list[Commitment]:
        """All that was merged or refused: who has their payloads can merge them again."""
        return [*(share.commitment for share in self.shares), *self.refused]

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(self.body).digest()

    @property
    def owner(self) -> PeerId:
        return self.committee[0]

    def share_of(self, peer: PeerId) -> Share | None:
        """The share of `peer`, if it is in."""
        return next((share for share in self.shares if share.commitment.peer == peer), None)


@dataclass(frozen=True)
class SignedVerdict:
    """A verdict that one seat has signed, as a portable statement."""

    peer: PeerId
    slot: int
    body: bytes = field(repr=False)
    signature: bytes = field(repr=False)


@dataclass(frozen=True)
class Offer:
    commitment: Commitment


@dataclass(frozen=True)
class Proposal:
    verdict: Verdict


@dataclass(frozen=True)
class Vote:
    slot: int
    verdict_digest: bytes
    signature: bytes


@dataclass(frozen=True)
class Certificate:
    """A verdict with the signatures of a majority of its committee."""

    verdict: Verdict
    signatures: tuple[tuple[PeerId, bytes], ...]

    @property
    def name(self) -> CertificateName:
        return CertificateName(self.verdict.slot, self.verdict.digest)

    def signed(self) -> list[SignedVerdict]:
        """What each signer has signed."""
        return [SignedVerdict(peer, self.verdict.slot, self.verdict.body, by) for peer, by in self.signatures]

    @property
    def weight(self) -> int:
        """Tokens behind it; ranks two certificates of one slot."""
        return sum(share.commitment.weight for share in self.verdict.shares)

    def rank(self) -> tuple[int, int, int]:
        """Of two certificates for one slot the higher rank stands: signatures, then weight, then the lower hash."""
        return (len(self.signatures), self.weight, -int.from_bytes(self.verdict.digest))


@dataclass(frozen=True)
class CertificateRequest:
    names: tuple[CertificateName, ...]


@dataclass(frozen=True)
class Goodbye:
    slot: int


@dataclass(frozen=True)
class Introduction:
    """Peers a newcomer should greet, with the addresses they gave."""

    peers: tuple[tuple[PeerId, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Equivocation:
    """Two different commitments, or two different verdicts, that one peer signed for one slot."""

    first: Commitment | SignedVerdict
    second: Commitment | SignedVerdict

    @property
    def peer(self) -> PeerId:
        return self.first.peer

    @property
    def slot(self) -> int:
        return self.first.slot

    @property
    def body_bytes(self) -> int:
        """About how long it is: verdicts with many contributions make it large."""
        return len(self.first.body) + len(self.second.body)


@dataclass(frozen=True)
class Gossip:
    """Presences, of whomever."""

    presences: tuple[Presence, ...]


@dataclass(frozen=True)
class RosterRequest:
    """Asks for the presences of all live peers."""


Message = (
    Heartbeat
    | Offer
    | Proposal
    | Vote
    | Certificate
    | CertificateRequest
    | Goodbye
    | Equivocation
    | Introduction
    | Gossip
    | RosterRequest
)


@dataclass(frozen=True)
class Opened:
    """A message whose sender is proven."""

    sender: PeerId
    sequence: int
    message: Message
