from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Request(_message.Message):
    __slots__ = ("envelope", "chunk", "manifest")
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    envelope: Envelope
    chunk: ChunkRequest
    manifest: ManifestRequest
    def __init__(self, envelope: _Optional[_Union[Envelope, _Mapping]] = ..., chunk: _Optional[_Union[ChunkRequest, _Mapping]] = ..., manifest: _Optional[_Union[ManifestRequest, _Mapping]] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("refusal", "swarm_time_s", "chunk", "blob_bytes", "manifest")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    SWARM_TIME_S_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    BLOB_BYTES_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    refusal: str
    swarm_time_s: float
    chunk: bytes
    blob_bytes: int
    manifest: bytes
    def __init__(self, refusal: _Optional[str] = ..., swarm_time_s: _Optional[float] = ..., chunk: _Optional[bytes] = ..., blob_bytes: _Optional[int] = ..., manifest: _Optional[bytes] = ...) -> None: ...

class ChunkRequest(_message.Message):
    __slots__ = ("digest", "offset", "length")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    length: int
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class ManifestRequest(_message.Message):
    __slots__ = ("protocol_version",)
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    def __init__(self, protocol_version: _Optional[int] = ...) -> None: ...

class SignedManifest(_message.Message):
    __slots__ = ("body", "signature")
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    signature: bytes
    def __init__(self, body: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Envelope(_message.Message):
    __slots__ = ("content", "signature")
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    content: bytes
    signature: bytes
    def __init__(self, content: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Content(_message.Message):
    __slots__ = ("run_id", "sender", "sequence", "heartbeat", "offer", "proposal", "vote", "certificate", "certificate_request", "goodbye")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SENDER_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    PROPOSAL_FIELD_NUMBER: _ClassVar[int]
    VOTE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    sender: bytes
    sequence: int
    heartbeat: Heartbeat
    offer: Offer
    proposal: Proposal
    vote: Vote
    certificate: Certificate
    certificate_request: CertificateRequest
    goodbye: Goodbye
    def __init__(self, run_id: _Optional[bytes] = ..., sender: _Optional[bytes] = ..., sequence: _Optional[int] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., offer: _Optional[_Union[Offer, _Mapping]] = ..., proposal: _Optional[_Union[Proposal, _Mapping]] = ..., vote: _Optional[_Union[Vote, _Mapping]] = ..., certificate: _Optional[_Union[Certificate, _Mapping]] = ..., certificate_request: _Optional[_Union[CertificateRequest, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("slot", "tier", "ready", "addresses", "recent", "finals", "tokens_per_s")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    RECENT_FIELD_NUMBER: _ClassVar[int]
    FINALS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    slot: int
    tier: int
    ready: bool
    addresses: _containers.RepeatedScalarFieldContainer[str]
    recent: _containers.RepeatedCompositeFieldContainer[CertificateName]
    finals: _containers.RepeatedCompositeFieldContainer[FragmentState]
    tokens_per_s: float
    def __init__(self, slot: _Optional[int] = ..., tier: _Optional[int] = ..., ready: _Optional[bool] = ..., addresses: _Optional[_Iterable[str]] = ..., recent: _Optional[_Iterable[_Union[CertificateName, _Mapping]]] = ..., finals: _Optional[_Iterable[_Union[FragmentState, _Mapping]]] = ..., tokens_per_s: _Optional[float] = ...) -> None: ...

class CertificateName(_message.Message):
    __slots__ = ("slot", "digest")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    slot: int
    digest: bytes
    def __init__(self, slot: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class FragmentState(_message.Message):
    __slots__ = ("fragment", "slot", "digest")
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    fragment: int
    slot: int
    digest: bytes
    def __init__(self, fragment: _Optional[int] = ..., slot: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class Commitment(_message.Message):
    __slots__ = ("run_id", "peer", "slot", "fragment", "payload_digest", "payload_bytes", "weight")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PEER_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    peer: bytes
    slot: int
    fragment: int
    payload_digest: bytes
    payload_bytes: int
    weight: int
    def __init__(self, run_id: _Optional[bytes] = ..., peer: _Optional[bytes] = ..., slot: _Optional[int] = ..., fragment: _Optional[int] = ..., payload_digest: _Optional[bytes] = ..., payload_bytes: _Optional[int] = ..., weight: _Optional[int] = ...) -> None: ...

class SignedCommitment(_message.Message):
    __slots__ = ("body", "signature")
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    body: bytes
    signature: bytes
    def __init__(self, body: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Offer(_message.Message):
    __slots__ = ("commitment",)
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    commitment: SignedCommitment
    def __init__(self, commitment: _Optional[_Union[SignedCommitment, _Mapping]] = ...) -> None: ...

class Share(_message.Message):
    __slots__ = ("commitment", "clip")
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    commitment: SignedCommitment
    clip: int
    def __init__(self, commitment: _Optional[_Union[SignedCommitment, _Mapping]] = ..., clip: _Optional[int] = ...) -> None: ...

class Verdict(_message.Message):
    __slots__ = ("run_id", "slot", "fragment", "committee", "shares", "update_digest", "update_bytes")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    FRAGMENT_FIELD_NUMBER: _ClassVar[int]
    COMMITTEE_FIELD_NUMBER: _ClassVar[int]
    SHARES_FIELD_NUMBER: _ClassVar[int]
    UPDATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    UPDATE_BYTES_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    slot: int
    fragment: int
    committee: _containers.RepeatedScalarFieldContainer[bytes]
    shares: _containers.RepeatedCompositeFieldContainer[Share]
    update_digest: bytes
    update_bytes: int
    def __init__(self, run_id: _Optional[bytes] = ..., slot: _Optional[int] = ..., fragment: _Optional[int] = ..., committee: _Optional[_Iterable[bytes]] = ..., shares: _Optional[_Iterable[_Union[Share, _Mapping]]] = ..., update_digest: _Optional[bytes] = ..., update_bytes: _Optional[int] = ...) -> None: ...

class Proposal(_message.Message):
    __slots__ = ("verdict",)
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    verdict: bytes
    def __init__(self, verdict: _Optional[bytes] = ...) -> None: ...

class Vote(_message.Message):
    __slots__ = ("slot", "verdict_digest", "signature")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    VERDICT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    slot: int
    verdict_digest: bytes
    signature: bytes
    def __init__(self, slot: _Optional[int] = ..., verdict_digest: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Signature(_message.Message):
    __slots__ = ("peer", "signature")
    PEER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    peer: bytes
    signature: bytes
    def __init__(self, peer: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Certificate(_message.Message):
    __slots__ = ("verdict", "signatures")
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    verdict: bytes
    signatures: _containers.RepeatedCompositeFieldContainer[Signature]
    def __init__(self, verdict: _Optional[bytes] = ..., signatures: _Optional[_Iterable[_Union[Signature, _Mapping]]] = ...) -> None: ...

class CertificateRequest(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedCompositeFieldContainer[CertificateName]
    def __init__(self, names: _Optional[_Iterable[_Union[CertificateName, _Mapping]]] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("slot",)
    SLOT_FIELD_NUMBER: _ClassVar[int]
    slot: int
    def __init__(self, slot: _Optional[int] = ...) -> None: ...
