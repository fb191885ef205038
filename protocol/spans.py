"""A small set of slots, kept as spans: for which slots a peer may ever have signed, whatever its clock said then.

One number, the last such slot, is not enough. A phone that once woke up an hour ahead would owe silence for that hour.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from braniac.protocol import limits


@dataclass(frozen=True)
class Spans:
    """Slots, as spans in order, first and last included, that neither touch nor overlap."""

    spans: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        assert all(first <= last for first, last in self.spans)
        assert all(before[1] + 1 < after[0] for before, after in pairwise(self.spans))
        assert len(self.spans) <= limits.SIGNED_SPANS_MAX

    def __contains__(self, slot: int) -> bool:
        return any(first <= slot <= last for first, last in self.spans)

    @property
    def last(self) -> int:
        """The last slot of all, -1 if there are none."""
        return self.spans[-1][1] if self.spans else -1

    def adding(self, first: int, last: int) -> Self:
        """With these slots too. Of too many spans the closest two become one: no slot is ever forgotten."""
        assert first <= last
        joined: list[tuple[int, int]] = []
        for start, end in sorted((*self.spans, (first, last))):
            if joined and start <= joined[-1][1] + 1:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        if len(joined) > limits.SIGNED_SPANS_MAX:
            at = min(range(1, len(joined)), key=lambda i: joined[i][0] - joined[i - 1][1])
            joined[at - 1 : at + 1] = [(joined[at - 1][0], joined[at][1])]
        return type(self)(tuple(joined))

    def to_text(self) -> str:
        """As `3-9 40-52`."""
        return " ".join(f"{first}-{last}" for first, last in self.spans)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Raises ValueError if `to_text` does not write it so. One number is a span from slot 0, as once stored."""
        if text.isascii() and text.isdecimal():
            return cls().adding(0, int(text))
        spans = cls()
        for part in text.split(" ") if text else ():
            first, _, last = part.partition("-")
            if int(first) > int(last):
                raise ValueError(f"slots {first} to {last} are none")
            spans = spans.adding(int(first), int(last))
        if spans.to_text() != text:
            raise ValueError("not a set of spans as it is written")
        return spans
