"""Errors of the outer protocol, and the closed list of reasons for refusing a peer's message.

* ProtocolError
  x WireError          a byte string that is not a message, or a message that breaks a rule; carries a `Refusal`
  x ManifestError      a run manifest that is malformed, unsigned, or of another protocol version
  x IdentityError      a key or a peer id that is not what it claims to be

Assertions are for our bugs, `WireError` is for theirs; never the reverse.
"""

from __future__ import annotations

import enum


class Refusal(enum.StrEnum):
    """Why a message from a peer was refused: the metric's label, and the code in the reply (I7)."""

    MALFORMED = "malformed"  # not a message of this protocol, or a field out of its bounds
    OVERSIZE = "oversize"  # longer than the bound in limits.py, or than what was announced
    BAD_SIGNATURE = "bad_signature"  # the signature does not match sender and content
    WRONG_RUN = "wrong_run"  # a message of another run
    WRONG_VERSION = "wrong_version"  # another protocol version
    REPLAYED = "replayed"  # this sequence number was seen before
    STALE = "stale"  # about a slot too long ago to matter
    EARLY = "early"  # about a slot that has not begun
    UNKNOWN_PEER = "unknown_peer"  # from or about a peer that is not in the roster
    NOT_COMMITTEE = "not_committee"  # the sender has no say in this slot
    NO_MAJORITY = "no_majority"  # a certificate without enough valid signatures
    WRONG_SHAPE = "wrong_shape"  # a payload that does not fit its fragment
    WRONG_DIGEST = "wrong_digest"  # bytes that do not hash to what was announced
    OPPOSED = "opposed"  # a contribution that contradicts those of most others
    EQUIVOCATION = "equivocation"  # two different signed statements about one (fragment, slot)
    CONFLICT = "conflict"  # a proposal that contradicts an earlier one
    WRONG_MERGE = "wrong_merge"  # a proposal whose update is not what its contributions make
    CROWDED = "crowded"  # no place in this slot: too many of one network, or too many newcomers
    OVERLOADED = "overloaded"  # a queue is full, try later
    NOT_READY = "not_ready"  # this peer has not joined a run yet


class ProtocolError(Exception):
    """Root of everything `braniac.protocol` raises on purpose."""


class WireError(ProtocolError):
    """Bytes from a peer that cannot be accepted; `refusal` says why, in one word."""

    def __init__(self, refusal: Refusal, detail: str) -> None:
        super().__init__(f"{refusal.value}: {detail}")
        self.refusal = refusal
        self.detail = detail


class ManifestError(ProtocolError):
    """A run manifest that cannot be used."""


class VersionMismatch(ManifestError):
    """The run speaks another version of the protocol."""

    def __init__(self, message: str, version: int = 0) -> None:
        super().__init__(message)
        self.version = version
        """The run's, as far as it is a number."""


class IdentityError(ProtocolError):
    """A key or peer id that is malformed."""
