"""One of every contribution that must be refused, sent to a real engine that owns the slot, with the code it must get.

Messages are refused by the engine, payloads by the merge that the engine asks for. Every sender has an identity of its
own, so that the ban of one says nothing about the next.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from braniac.protocol import events, limits, messages, statements, wire
from braniac.protocol.codec import CodecRules, encode_topk
from braniac.protocol.engine import Engine
from braniac.protocol.errors import Refusal, WireError
from braniac.protocol.history import History
from braniac.protocol.identity import Identity
from braniac.protocol.manifest import Manifest
from braniac.protocol.merge import Contribution, Merged, merge
from braniac.protocol.tiles import TileLayout
from outer.braniac import TOKENS

_SLOT = 40
_STRANGERS = 64
_HEADER_BYTES = 8


@dataclass(frozen=True)
class Verdicts:
    """What came of it, by what was wrong."""

    expected: dict[str, Refusal]
    got: dict[str, Refusal | None]
    """None: it was accepted."""
    honest_banned: int
    merged: Merged | None
    """Of the honest contributions that came along."""

    @property
    def wrong(self) -> list[str]:
        return [name for name, code in self.expected.items() if self.got[name] is not code]


def bad_payloads(layout: TileLayout, rules: CodecRules) -> dict[str, bytes]:
    """Payloads that do not decode, by what is wrong with them. They are refused as WRONG_SHAPE."""
    data = _payload(layout, rules)
    values = int.from_bytes(data[4:8], "little")
    longer = TileLayout((*layout.groups, (limits.TILE_SIZE_MAX, 1)))

    def with_level(level: int) -> bytes:
        return data[:_HEADER_BYTES] + level.to_bytes(2, "little") + data[_HEADER_BYTES + 2 :]

    return {
        "garbage": hashlib.shake_256(b"garbage").digest(len(data)),
        "cut off": data[:-1],
        "extended": data + b"\0",
        "another format": bytes([data[0] + 1]) + data[1:],
        "more levels": _payload(layout, CodecRules(rules.per_tile, rules.magnitude_bits + 1)),
        "another fragment": _payload(longer, rules),
        "one value more": data[:4] + (values + 1).to_bytes(4, "little") + data[8:],
        "four billion values": data[:4] + b"\xff\xff\xff\xff" + data[8:],
        "infinite level": with_level(0xFFFF),
        "level out of range": with_level(0xF800),
        "level spelt otherwise": with_level(0x0800),
        "turns that it does not need": data[:3] + bytes([data[3] | 2]) + data[4:],
        "turns that nobody has": data[:3] + bytes([data[3] | 0xFE]) + data[4:],
        "positions beyond the tile": data[:2] + bytes([data[2] + 1]) + data[3:],
    }


def _payload(layout: TileLayout, rules: CodecRules) -> bytes:
    vector = np.random.default_rng(0).normal(0, 1 << 14, layout.size).astype(np.int64)
    return encode_topk(layout, rules, vector)[0]


class Court:
    """An engine alone with its slots, to which strangers speak."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.layout = manifest.fragments[manifest.fragment_of(_SLOT)].layout
        self._identities = (Identity.from_seed(hashlib.sha256(b"%d" % n).digest()) for n in itertools.count())
        history = History(manifest)
        history.begin(manifest.held(0))
        start = _SLOT - limits.ELIGIBLE_SLOTS
        self.engine = Engine(
            manifest, next(self._identities), 0, incarnation=0, now=manifest.slot_start(start), history=history
        )
        for fragment in manifest.held(0):
            self.engine.anchor_known(messages.FragmentState(fragment, -1, bytes(32)))
        self.engine.set_ready()
        self.now = manifest.slot_start(_SLOT) + 0.1
        self.engine.handle_timer(self.now)
        self._strangers = iter([self._introduce(0) for _ in range(_STRANGERS)])

    def stranger(self) -> Identity:
        """A peer that the engine has heard of, before anybody offered anything: the places of a slot are given soon."""
        return next(self._strangers)

    def observer(self) -> Identity:
        """One that holds nothing."""
        return self._introduce(self.manifest.observer_tier)

    def _introduce(self, tier: int) -> Identity:
        found = next(self._identities)
        assert self.hear(found, 0, messages.Heartbeat(_SLOT, tier, -1)) is None
        return found

    def hear(self, sender: Identity, sequence: int, message: messages.Message, run_id: bytes = b"") -> Refusal | None:
        return self.hear_bytes(wire.seal(sender, run_id or self.manifest.run_id, sequence, message))

    def hear_bytes(self, data: bytes) -> Refusal | None:
        """The code with which a message is refused."""
        try:
            self.engine.receive(data, self.now)
        except WireError as error:
            return error.refusal
        return None

    def offer(
        self, by: Identity, payload: bytes, *, slot: int = _SLOT, of: int = 0, size: int = 0, weight: int = TOKENS
    ) -> messages.Offer:
        """`of`: fragments beyond the one that is due; `size`: of the payload, if a lie."""
        fragment = (self.manifest.fragment_of(slot) + of) % self.manifest.window
        digest, size = hashlib.sha256(payload).digest(), size or len(payload)
        run_id = self.manifest.run_id
        return messages.Offer(statements.make_commitment(by, run_id, slot, fragment, digest, size, weight))

    def merge(self, blobs: dict[bytes, bytes]) -> Merged | None:
        """Let every announced payload arrive and the slot end; what the owner merges."""
        for digest in blobs:
            self.engine.blob_fetched(digest, True, self.now)
        self.engine.handle_timer(self.manifest.slot_start(_SLOT + 1) + 0.1)
        while (event := self.engine.next_event()) is not None:
            if isinstance(event, events.MergeDue) and event.slot == _SLOT:
                given = [Contribution(peer, tokens, blobs[digest]) for peer, tokens, digest in event.contributions]
                merged = merge(self.manifest, event.fragment, given)
                self.engine.merged(_SLOT, merged)
                return merged
        return None


def hold_court(manifest: Manifest) -> Verdicts:
    """Send one of everything, with an honest contribution before and after."""
    court = Court(manifest)
    expected: dict[str, Refusal] = {}
    got: dict[str, Refusal | None] = {}
    blobs: dict[bytes, bytes] = {}
    honest = [court.stranger(), court.stranger()]

    def submit(by: Identity, payload: bytes) -> None:
        assert court.hear(by, 1, court.offer(by, payload)) is None, "an offer in order was refused"
        blobs[hashlib.sha256(payload).digest()] = payload

    submit(honest[0], _payload(court.layout, manifest.up))
    for name, code, refusal in _bad_messages(court):
        expected[name], got[name] = code, refusal
    senders = {}
    for name, payload in bad_payloads(court.layout, manifest.up).items():
        senders[(sender := court.stranger()).peer_id] = name
        submit(sender, payload)
    submit(honest[1], _payload(court.layout, manifest.up))
    merged = court.merge(blobs)
    assert merged is not None
    codes = dict(merged.refused)
    for peer, name in senders.items():
        expected[name], got[name] = Refusal.WRONG_SHAPE, codes.get(peer)
    banned = court.engine.roster.banned
    return Verdicts(expected, got, sum(peer.peer_id in banned for peer in honest), merged)


def _bad_messages(court: Court) -> Iterator[tuple[str, Refusal, Refusal | None]]:
    """(what is wrong, the code it must get, the code it gets)."""
    payload = _payload(court.layout, court.manifest.up)
    for name, code, changes in (
        ("no weight", Refusal.MALFORMED, {"weight": 0}),
        ("a weight of millions", Refusal.MALFORMED, {"weight": limits.WEIGHT_MAX + 1}),
        ("a fragment that is not due", Refusal.MALFORMED, {"of": 1}),
        ("a payload too long for its fragment", Refusal.OVERSIZE, {"size": 1 << 28}),
        ("a payload without end", Refusal.MALFORMED, {"size": limits.BLOB_BYTES_MAX + 1}),
        ("a slot that is over", Refusal.STALE, {"slot": _SLOT - limits.PROPOSAL_OPEN_SLOTS - 1}),
        ("a slot to come", Refusal.EARLY, {"slot": _SLOT + 2}),
    ):
        sender = court.stranger()
        yield name, code, court.hear(sender, 1, court.offer(sender, payload, **changes))
    nobody = court.stranger()
    yield "no payload", Refusal.MALFORMED, court.hear(nobody, 1, court.offer(nobody, b""))
    one, other, thief = court.stranger(), court.stranger(), court.stranger()
    yield "in another's name", Refusal.BAD_SIGNATURE, court.hear(thief, 1, court.offer(one, payload))
    yield "of another run", Refusal.WRONG_RUN, court.hear(one, 1, court.offer(one, payload), run_id=bytes(32))
    sealed = wire.seal(one, court.manifest.run_id, 2, court.offer(one, payload))
    yield "a bit flipped", Refusal.BAD_SIGNATURE, court.hear_bytes(sealed[:-1] + bytes([sealed[-1] ^ 1]))
    yield "too long a message", Refusal.OVERSIZE, court.hear_bytes(bytes(limits.MESSAGE_BYTES_MAX + 1))
    yield "no message", Refusal.MALFORMED, court.hear_bytes(b"no message")
    assert court.hear_bytes(sealed) is None
    yield "the same message again", Refusal.REPLAYED, court.hear_bytes(sealed)
    stranger = next(court._identities)
    yield "of a stranger", Refusal.UNKNOWN_PEER, court.hear(stranger, 1, court.offer(stranger, payload))
    small = court.observer()
    yield "of who holds nothing", Refusal.UNKNOWN_PEER, court.hear(small, 1, court.offer(small, payload))
    assert court.hear(other, 1, court.offer(other, payload)) is None
    second = court.offer(other, payload, weight=1)
    yield "a second one for the slot", Refusal.EQUIVOCATION, court.hear(other, 2, second)
    for name, heartbeat in (
        ("a speed that is no number", messages.Heartbeat(_SLOT, 0, -1, tokens_per_s=math.nan)),
        ("an infinite loss", messages.Heartbeat(_SLOT, 0, -1, loss=math.inf)),
        ("a tier that does not exist", messages.Heartbeat(_SLOT, court.manifest.tiers + 1, -1)),
    ):
        yield name, Refusal.MALFORMED, court.hear(court.stranger(), 1, heartbeat)
