"""Where the daemons of a test swarm run: what swarm.py needs of processes, and of containers just the same."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from braniac.node import swarm_report as report
from braniac.node.control_pb2 import StatusReply
from braniac.node.faults import Fault

START_S_MAX = 120.0
LEAVE_S_MAX = 60.0
LOOK_S = 0.1

_Result = TypeVar("_Result")


@dataclass
class Peer:
    """One daemon of the swarm, as it was seen."""

    index: int
    tier: int
    observations: report.Observations = field(default_factory=report.Observations)


class Host(ABC):
    """Starts daemons, asks them, does to them what a fault says, and stops them."""

    FAULTS: tuple[str, ...]
    """The kinds it can do."""

    peers: Sequence[Peer]

    @abstractmethod
    async def start_all(self) -> None:
        """Start every daemon; they need not train yet when this returns. Raises NodeError."""

    @abstractmethod
    async def ask(self, peer: Peer) -> StatusReply | None:
        """Its status, or None while it does not answer. Raises NodeError if it ended by itself."""

    @abstractmethod
    async def begin(self, fault: Fault, victims: Sequence[Peer]) -> None:
        """Do what a fault says."""

    @abstractmethod
    async def end(self, fault: Fault, victims: Sequence[Peer]) -> None:
        """Undo it; a killed daemon is started again."""

    @abstractmethod
    async def leave(self, peer: Peer) -> int:
        """Let it leave: its exit code."""

    @abstractmethod
    async def state_dir(self, peer: Peer) -> Path:
        """Where its state can be read, after it has left."""

    @abstractmethod
    async def stop_all(self) -> None:
        """End whatever still runs, and leave nothing behind."""


async def until(condition: Callable[[], Awaitable[_Result | None]], patience_s: float = START_S_MAX) -> _Result:
    """Ask again and again until there is an answer. Raises TimeoutError."""
    async with asyncio.timeout(patience_s):
        while True:
            if (result := await condition()) is not None:
                return result
            await asyncio.sleep(LOOK_S)
