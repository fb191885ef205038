"""Uplinks at the pace of nodes: which bytes of which slot leave in which second, at one inner step per second.

Contributions go first. When all of a slot's are with its seats, these have the update, and everybody else passes it
on when it is there. Asking takes no time here, and merging none either.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from outer.books import Books


@dataclass
class _Transfer:
    receiver: int
    missing: int
    """Bytes."""
    arrived: Callable[[], None]


class Uplinks:
    """Of all peers of a swarm, by number."""

    def __init__(self, books: Books, bytes_per_step: Sequence[float]) -> None:
        """`bytes_per_step`: the pace of each peer; 0 bounds nothing."""
        self._books = books
        self._pace = bytes_per_step
        self._credit = [0.0 for _ in bytes_per_step]
        self._first: list[deque[_Transfer]] = [deque() for _ in bytes_per_step]
        self._others: list[deque[_Transfer]] = [deque() for _ in bytes_per_step]
        self._step = 0

    def begin(
        self,
        step: int,
        contributions: Iterable[tuple[int, int, int]],
        update_bytes: int,
        seats: Iterable[int],
        ways: Iterable[tuple[int, int]],
    ) -> None:
        """A slot, once all seconds before `step` are over.

        `contributions`: (sender, seat, bytes); `ways`: (who has the update before, who is sent it by that one).
        """
        self._run_until(step)
        below = defaultdict(list)
        for parent, child in ways:
            below[parent].append(child)

        def pass_on(parent: int) -> None:
            for child in below[parent]:
                self._send(self._others[parent], child, update_bytes, lambda child=child: pass_on(child))

        missing = 1

        def arrived() -> None:
            nonlocal missing
            missing -= 1
            if missing == 0:
                for seat in seats:
                    pass_on(seat)

        for sender, seat, size in contributions:
            missing += 1
            self._send(self._first[sender], seat, size, arrived)
        arrived()

    def drain(self) -> None:
        """The seconds after the last slot, until nothing is left to send."""
        while any(map(len, (*self._first, *self._others))):
            self._run_until(self._step + 1)

    def _send(self, queue: deque[_Transfer], receiver: int, size: int, arrived: Callable[[], None]) -> None:
        self._books.note_message(size)
        queue.append(_Transfer(receiver, size, arrived))

    def _run_until(self, step: int) -> None:
        for second in range(self._step, step):
            done: list[_Transfer] = []
            for sender in range(len(self._pace)):
                done += self._leave(second, sender)
            for transfer in done:  # what comes of it begins in the next second
                transfer.arrived()
        self._step = max(self._step, step)

    def _leave(self, second: int, sender: int) -> list[_Transfer]:
        """What one peer sends in a second; the transfers that end with it."""
        pace = self._pace[sender]
        credit = self._credit[sender] + pace if pace else float("inf")
        done = []
        while queue := self._first[sender] or self._others[sender]:
            transfer = queue[0]
            size = min(transfer.missing, int(min(credit, transfer.missing)))
            self._books.carry(second, sender, transfer.receiver, size)
            transfer.missing -= size
            credit -= size
            if transfer.missing:
                break
            done.append(queue.popleft())
        self._credit[sender] = credit % 1 if pace else 0.0  # whole bytes go, what an idle second leaves is lost
        return done
