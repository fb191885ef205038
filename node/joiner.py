"""Joining a run: find it, check that it is the right one, download this tier's anchors with a progress bar."""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
from collections.abc import Iterable

import structlog
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from braniac.node.config import NetworkSection
from braniac.node.errors import Incompatible
from braniac.node.exchange import Exchange
from braniac.node.network import Network
from braniac.node.transport import Unreachable
from braniac.protocol.errors import ManifestError, VersionMismatch
from braniac.protocol.manifest import Manifest

log = structlog.get_logger(__name__)

_RETRY_S = 2.0
_ASKED_MAX = 16  # peers asked for the time: more would not make their median better
_TIME_S = 3.0  # how long a restart waits for others to say what time it is


async def find_run(network: Network, exchange: Exchange) -> tuple[Manifest, tuple[bytes, bytes]]:
    """Ask the bootstrap peers which run this is, for ever.

    Raises VersionMismatch when told another protocol, ConfigError for a malformed address in an @FILE.
    """
    for attempt in range(sys.maxsize):
        network.read_address_files()
        for address in network.bootstrap:
            try:
                peer = await network.connect(address)
                manifest, body, signature = await exchange.ask_manifest(network.transport, peer)
            except VersionMismatch:
                raise
            except (Unreachable, ManifestError) as error:
                network.failures[address] = str(error)
                continue
            log.info("found the run", name=manifest.name, run_id=manifest.run_id.hex(), via=address)
            return manifest, (body, signature)
        log.warning("degraded: 0 peers", **{f"address_{i}": f"{a}: {why}" for i, (a, why) in _failures(network)})
        await network.sleep(min(30.0, _RETRY_S * 1.5 ** min(attempt, 8)) * random.uniform(0.5, 1.0))
    raise AssertionError("unreachable")


def _failures(network: Network) -> enumerate[tuple[str, str]]:
    return enumerate(network.failures.items())


def check_run_id(settings: NetworkSection, manifest: Manifest) -> None:
    """Take part in no other run than the one that was asked for. Raises Incompatible."""
    pinned, found = settings.run_id, manifest.run_id.hex()
    if pinned is not None and found != pinned:
        raise Incompatible(
            f"this is run {found[:12]}..., not {pinned[:12]}...: check --run-id, --peers and --state-dir"
        )


async def check_run(network: Network, exchange: Exchange, manifest: Manifest) -> None:
    """Make sure that the peers we were told to join are in our run. Raises Incompatible, VersionMismatch."""
    try:
        async with asyncio.TaskGroup() as group:
            for address in network.bootstrap:
                group.create_task(_check_one(network, exchange, manifest, address))
    except* (Incompatible, VersionMismatch) as errors:
        raise errors.exceptions[0] from None


async def _check_one(network: Network, exchange: Exchange, manifest: Manifest, address: str) -> None:
    while True:
        try:
            peer = await network.connect(address)
            theirs, _, _ = await exchange.ask_manifest(network.transport, peer)
        except VersionMismatch:
            raise
        except (Unreachable, ManifestError):
            await network.sleep(_RETRY_S * random.uniform(1.0, 4.0))
            continue
        if theirs.run_id != manifest.run_id:
            raise Incompatible(
                f"{address} is in run {theirs.run_id.hex()[:12]}..., this state directory in "
                f"{manifest.run_id.hex()[:12]}...: use another --state-dir, or other --peers"
            )
        return


async def ask_the_time(network: Network, exchange: Exchange, addresses: Iterable[str], manifest: Manifest) -> None:
    """Hear the swarm time of peers of this run that answer at once; what they say goes to the swarm clock."""

    async def ask(address: str) -> None:
        with contextlib.suppress(Unreachable, ManifestError, TimeoutError):
            async with asyncio.timeout(_TIME_S):
                peer = await network.connect(address)
                theirs, _, _ = await exchange.ask_manifest(network.transport, peer)
            if theirs.run_id != manifest.run_id:
                exchange.swarm_clock.forget(peer)

    async with asyncio.TaskGroup() as group:
        for address in list(dict.fromkeys(addresses))[:_ASKED_MAX]:
            group.create_task(ask(address))


class DownloadBar:
    """Progress of the first download: a bar on a terminal, a log line per quarter elsewhere."""

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.done_bytes = 0
        self._quarter = 0
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("downloading the model"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )

    def start(self) -> None:
        """Show it."""
        self._progress.start()
        self._task = self._progress.add_task("model", total=self.total_bytes)

    def stop(self) -> None:
        """Take it away."""
        self._progress.stop()

    def advance(self, count: int) -> None:
        """More bytes have arrived."""
        self.done_bytes += count
        if self._task is not None:
            self._progress.advance(self._task, count)
        quarter = 4 * self.done_bytes // max(1, self.total_bytes)
        if quarter > self._quarter and self._progress.disable:
            log.info("downloading the model", done_bytes=self.done_bytes, total_bytes=self.total_bytes)
        self._quarter = max(self._quarter, quarter)
