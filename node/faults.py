"""What is done to a swarm on purpose, and when: a schedule that follows from a seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from braniac.node.errors import ConfigError

KINDS = ("kill", "pause", "partition", "cap", "loss")
CAP_KBIT_PER_S = 1000
LOSS = 0.2
_LASTS_SLOTS = {"kill": 3, "pause": 6, "partition": 6, "cap": 10, "loss": 10}
_FIRST, _LAST = 0.2, 0.75  # of the time: before the first the swarm settles, after the last it recovers


@dataclass(frozen=True)
class Wish:
    """One fault as it was asked for."""

    kind: str
    lasts_s: float | None = None
    """None: as many slots as its kind usually takes."""


@dataclass(frozen=True)
class Fault:
    """One fault as it will be."""

    kind: str
    at_s: float
    """After all nodes have begun to train."""
    lasts_s: float
    nodes: tuple[int, ...]
    """Who it hits; of a partition, one side."""
    owner: bool = False
    """Of kills every other one hits the owner of the slot then, whoever that is, in place of `nodes`."""


def parse(text: str) -> tuple[Wish, ...]:
    """From "kill,pause:90,loss": kinds in order, each with seconds if need be. Raises ConfigError."""
    return tuple(_wish(part.strip()) for part in text.split(",") if part.strip())


def _wish(text: str) -> Wish:
    kind, colon, seconds = text.partition(":")
    if kind in KINDS and not colon:
        return Wish(kind)
    if kind not in KINDS or not seconds.isdecimal() or not 0 < int(seconds) <= 86_400:
        raise ConfigError(f"{text!r} is no fault: write one of {', '.join(KINDS)}, with seconds as in pause:90")
    return Wish(kind, float(seconds))


def draw(wishes: Sequence[Wish], nodes: int, seconds: float, slot_s: float, rng: random.Random) -> list[Fault]:
    """When each fault happens, and to whom."""
    faults, kills = [], 0
    for number, wish in enumerate(wishes):
        at_s = seconds * (_FIRST + (_LAST - _FIRST) * number / max(1, len(wishes) - 1))
        lasts_s = wish.lasts_s or _LASTS_SLOTS[wish.kind] * slot_s
        hit = nodes // 2 if wish.kind == "partition" else max(1, nodes // 3) if wish.kind in ("cap", "loss") else 1
        victims = tuple(sorted(rng.sample(range(nodes), max(1, hit))))
        faults.append(Fault(wish.kind, at_s, lasts_s, victims, owner=wish.kind == "kill" and kills % 2 == 0))
        kills += wish.kind == "kill"
    return faults


def check_possible(wishes: Iterable[Wish], possible: Iterable[str], where: str) -> None:
    """Raises ConfigError for a fault that cannot be done there."""
    possible = tuple(possible)
    for wish in wishes:
        if wish.kind not in possible:
            raise ConfigError(f"{wish.kind} is not possible with {where}: choose from {', '.join(possible)}")
