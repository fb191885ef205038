"""What taking part will cost, said before the first download, and asked about where a person can answer."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable

import structlog

from braniac.model.config import ModelConfig
from braniac.model.trainer import TrainSettings
from braniac.node import costs
from braniac.node.commands import bytes_text
from braniac.node.config import NodeConfig
from braniac.node.errors import NodeError
from braniac.node.run_data import run_data
from braniac.protocol.manifest import Manifest

log = structlog.get_logger(__name__)

Ask = Callable[[str], Awaitable[bool]]
"""Shows a text that ends in a question, and says whether the answer was yes."""


async def before_the_first_download(
    config: NodeConfig, manifest: Manifest, model: ModelConfig, settings: TrainSettings, tier: int, ask: Ask | None
) -> None:
    """Say what this tier will cost; without `ask` in the log only. Raises NodeError if the answer is no."""
    every = costs.costs_of(manifest, model, settings, generations=config.state.keep_generations)
    mine, text = every[tier], run_data(manifest).text
    if ask is None:
        log.info(
            "what taking part costs",
            tier=tier,
            memory=bytes_text(mine.memory_bytes),
            disk=bytes_text(mine.disk_bytes),
            download=bytes_text(mine.download_bytes),
            each_way_per_day=bytes_text(mine.each_way_bytes_per_day),
            peers=costs.PEERS,
            **({"text": text} if text else {}),
        )
        return
    if not await ask(f"{description(manifest, every, tier, text)}\n{question(mine)}"):
        raise NodeError("nothing was downloaded, because you did not agree: join with --yes to agree beforehand")


def description(
    manifest: Manifest,
    every: list[costs.TierCosts],
    tier: int | None,
    text: str | None,
    peers: int = costs.PEERS,
) -> str:
    """A run and its costs, for people; `tier` is the one that would be taken."""
    lines = [
        f"run   {printable(manifest.name)} ({manifest.run_id.hex()})",
        *([f"text  {text}"] if text else []),
        costs.table(every, tier),
        f"Traffic is that of a swarm of {peers} peers."
        + (" A star: the tier to take here." if tier is not None else ""),
    ]
    return "\n".join(lines)


def question(mine: costs.TierCosts) -> str:
    """What must be answered with yes."""
    return f"Download {bytes_text(mine.download_bytes)} and take part? [Y/n] "


def printable(text: str) -> str:
    """A stranger's words, safe on a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def terminal_ask() -> Ask | None:
    """How to ask the person at the terminal; None if there is nobody: a service, a pipe, a job in the background."""
    try:
        here = sys.stdin.isatty() and sys.stderr.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError, AttributeError):  # closed, or replaced by something without a file
        return None
    return _ask if here else None


async def _ask(text: str) -> bool:
    """Without a thread: one that waits for a line cannot be told that the node leaves meanwhile."""
    sys.stderr.write(text)
    sys.stderr.flush()
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()

    def read() -> None:
        loop.remove_reader(descriptor)
        answer.set_result(sys.stdin.readline())

    descriptor = sys.stdin.fileno()
    loop.add_reader(descriptor, read)
    try:
        line = await answer
    finally:
        loop.remove_reader(descriptor)
    return line.strip().lower() in {"y", "yes"} or line == "\n"
