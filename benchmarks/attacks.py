"""What hostile contributors send: each attack makes payloads that are well-formed, so that only the merge can help.

Attackers train like honest peers and keep honest books. They see what the honest peers offer to the slot before they
answer, know each other, claim as many tokens as a contribution may, and send as many values as after missed turns.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from braniac.protocol import codec, limits
from braniac.protocol.bitpack import Int64Array
from braniac.protocol.codec import CodecRules
from braniac.protocol.tiles import EMPTY, Sparse, TileLayout
from outer.braniac import Offer

LOUD = 1000
_BEHIND = 3  # windows by which a stale contribution is late
_QUIET = 1.0  # standard deviations by which colluders shift the mean


class Situation:
    """One slot as the attackers see it."""

    def __init__(
        self, layout: TileLayout, rules: CodecRules, seed: tuple[int, ...], own: Sparse, honest: Sequence[Sparse]
    ) -> None:
        """`own` is what the attacker would offer if it were honest, `seed` names slot and attacker."""
        self.layout = layout
        self.rules = rules
        self.own = own
        self.honest = honest
        self.rng = np.random.default_rng(seed)

    def dense(self, contribution: Sparse) -> Int64Array:
        return contribution.dense(self.layout.size)


def sign_flip(now: Situation) -> Int64Array:
    """The opposite of its own work."""
    return -now.dense(now.own)


def scaled(now: Situation) -> Int64Array:
    """Its own work, a thousand times as large."""
    return LOUD * now.dense(now.own)


def loud_sign_flip(now: Situation) -> Int64Array:
    return -LOUD * now.dense(now.own)


def mean_flip(now: Situation) -> Int64Array:
    """The opposite of what the honest peers offer together."""
    return -sum((now.dense(h) for h in now.honest), np.zeros(now.layout.size, np.int64))


def constant_direction(now: Situation) -> Int64Array:
    """The same random direction in every slot and by every attacker, loudly."""
    everywhere = np.random.default_rng(now.layout.size).normal(0, 1 << limits.FRACTION_BITS, now.layout.size)
    return (everywhere + now.rng.normal(0, 1 << 14, now.layout.size)).astype(np.int64)


def noise(now: Situation) -> Int64Array:
    """Another random direction each time, loudly."""
    return now.rng.normal(0, 1 << limits.FRACTION_BITS, now.layout.size).astype(np.int64)


def little_is_enough(now: Situation) -> Int64Array:
    """The honest mean, shifted against itself by about what honest peers differ (Baruch et al. 2019)."""
    together = np.stack([now.dense(h) for h in now.honest])
    mean, spread = together.mean(axis=0), together.std(axis=0)
    shifted = mean - _QUIET * np.sign(mean) * spread
    return (shifted * (1 + now.rng.normal(0, 0.01, len(shifted)))).astype(np.int64)


def lazy(now: Situation) -> Int64Array:
    """Nothing at all, for the same credit."""
    return np.zeros(now.layout.size, np.int64)


def near_copy(now: Situation) -> Int64Array:
    """The first honest peer's work with a hundredth of its values changed, so that its hash is another."""
    copied = now.dense(now.honest[0])
    at = now.honest[0].positions
    copied[now.rng.choice(at, max(1, len(at) // 100), replace=False)] *= -1
    return copied


Craft = Callable[[Situation], Int64Array]
CRAFTED: Mapping[str, Craft] = {
    "sign_flip": sign_flip,
    "scaled": scaled,
    "loud_sign_flip": loud_sign_flip,
    "constant_direction": constant_direction,
    "noise": noise,
    "little_is_enough": little_is_enough,
    "mean_flip": mean_flip,
    "lazy": lazy,
    "near_copy": near_copy,
}
ACTIVE = ("sign_flip", "stale", "constant_direction", "noise", "loud_sign_flip", "copy", "little_is_enough", "scaled")
"""Those that are measured unless others are asked for."""


class Attackers:
    """The last peers of a swarm, who all do the same."""

    def __init__(self, attack: str, numbers: Sequence[int]) -> None:
        assert attack in CRAFTED or attack in ("absent", "copy", "stale")
        self.attack = attack
        self.numbers = frozenset(numbers)
        self._past: dict[tuple[int, int], deque[bytes]] = {}

    def payloads(
        self, layout: TileLayout, rules: CodecRules, slot: int, fragment: int, offers: Mapping[int, Offer]
    ) -> dict[int, bytes]:
        """What each attacker that has a say in the slot offers instead of its own work."""
        honest = [offer for number, offer in sorted(offers.items()) if number not in self.numbers]
        found = {}
        for number in sorted(self.numbers & offers.keys()):
            own = offers[number]
            match self.attack:
                case "absent":
                    continue
                case "copy":
                    found[number] = honest[0].contribution.payload
                case "stale":
                    past = self._past.setdefault((number, fragment), deque(maxlen=_BEHIND + 1))
                    past.append(own.contribution.payload)
                    found[number] = past[0]
                case crafted:
                    now = Situation(layout, rules, (slot, number), own.sent or EMPTY, [h.sent for h in honest])
                    found[number], _ = codec.encode_topk(layout, rules, CRAFTED[crafted](now), rules.turns)
        return found
