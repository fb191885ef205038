"""A whole swarm on this machine: real daemons, some of them hit by faults, and figures at the end.

Everything is watched from outside, as a sceptic would: by what the daemons answer while they run, and by what is in
their state directories after they have left. Where they run is the host's affair (swarm_processes.py, swarm_docker.py).
"""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from braniac.node import faults, offline
from braniac.node import swarm_report as report
from braniac.node.config import DataSection
from braniac.node.control_pb2 import StatusReply
from braniac.node.errors import NodeError
from braniac.node.faults import Fault
from braniac.node.splits import Splits
from braniac.node.swarm_host import START_S_MAX, Host, Peer, until
from braniac.node.swarm_options import SwarmOptions
from braniac.protocol.committee import committee
from braniac.protocol.identity import peer_id_from_text

log = structlog.get_logger(__name__)

_POLL_S = 0.5


@dataclass(frozen=True)
class Lived:
    """What is left of a swarm when all have left."""

    began: float
    """Loop time at which all trained."""
    agreed: dict[int, dict[str, Any]]
    exit_codes: list[int]
    folders: dict[int, Path]
    """State directories, by node."""


class Swarm:
    """Starts, watches, harms, judges."""

    def __init__(self, options: SwarmOptions, host: Host) -> None:
        self.options = options
        self.host = host
        self.peers = host.peers
        self.done: list[dict[str, Any]] = []
        """What was done to it."""
        self.splits = Splits()
        self._random = random.Random(options.seed)

    async def run(self) -> dict[str, Any]:
        """The whole life of the swarm: its report. Raises NodeError."""
        lived = await self.live()
        observations = {peer.index: peer.observations for peer in self.peers}
        losses = await asyncio.to_thread(self._losses, lived.folders)
        return report.build(
            self.options, observations, self.done, lived.agreed, self.splits, losses, lived.exit_codes, lived.began
        )

    async def live(self) -> Lived:
        """From the first start to the last leave. Raises NodeError."""
        host = self.host
        try:
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(self._watch())
                await host.start_all()
                for peer in self.peers:
                    await until(partial(self._is, peer, "training"))
                log.info("the swarm is complete", nodes=len(self.peers))
                began = asyncio.get_running_loop().time()
                await self._let_train(began)
                agreed = await self._wait_for_agreement()
                watching.cancel()
            log.info("leaving")
            codes = await asyncio.gather(*(host.leave(peer) for peer in self.peers))
            folders = {peer.index: await host.state_dir(peer) for peer in self.peers}
        finally:
            await host.stop_all()
        return Lived(began, agreed, codes, folders)

    # --- watching and harming ----------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            replies = await asyncio.gather(*map(self.host.ask, self.peers))
            answers = [reply for reply in replies if reply is not None]
            now = asyncio.get_running_loop().time()
            report.look_for_splits(self.splits, now, answers, self.options.slot_s)
            await asyncio.sleep(_POLL_S)

    async def _let_train(self, began: float) -> None:
        """Let time pass, with the faults spread over it, one after the other."""
        loop, options = asyncio.get_running_loop(), self.options
        for fault in faults.draw(options.faults, options.nodes, options.seconds, options.slot_s, self._random):
            await asyncio.sleep(max(0.0, began + fault.at_s - loop.time()))
            await self._harm(fault)
        await asyncio.sleep(max(0.0, began + options.seconds - loop.time()))
        for peer in self.peers:
            await until(partial(self._is, peer, "training"))

    async def _harm(self, fault: Fault) -> None:
        status = await until(self._first_answer)
        if fault.owner:
            numbers = {peer_id_from_text(peer.observations.peer_id): peer.index for peer in self.peers}
            owner = committee(bytes.fromhex(status.run_id), status.slot, numbers)[0]
            fault = replace(fault, nodes=(numbers[owner],))
        victims = [self.peers[number] for number in fault.nodes]
        await self.host.begin(fault, victims)
        entry = {"kind": fault.kind, "nodes": list(fault.nodes), "slot": status.slot, "lasts_s": fault.lasts_s}
        if fault.kind == "kill":
            entry |= {"tier": victims[0].tier, "owner_of_slot": fault.owner}
        self.done.append(entry)
        log.info("began a fault", **entry)
        if fault.kind in ("kill", "pause"):
            for peer in victims:
                peer.observations.interrupted(restarted=fault.kind == "kill")
        await asyncio.sleep(fault.lasts_s)
        await self.host.end(fault, victims)
        log.info("ended a fault", kind=fault.kind)

    async def _first_answer(self) -> StatusReply | None:
        for peer in self.peers:
            if (status := await self.host.ask(peer)) is not None:
                return status
        return None

    async def _is(self, peer: Peer, state: str) -> StatusReply | None:
        status = await self.host.ask(peer)
        return status if status is not None and status.state == state else None

    async def _wait_for_agreement(self) -> dict[int, dict[str, Any]]:
        """Look at all nodes until each fragment was seen with the same last slot and bytes at all that hold it."""
        seen: dict[int, dict[str, Any]] = {}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 60 * self.options.slot_s
        while loop.time() < deadline:
            replies = await asyncio.gather(*map(self.host.ask, self.peers))
            answers = [reply for reply in replies if reply is not None]
            if len(answers) == len(self.peers):  # silence is no agreement
                report.keep_agreement(seen, report.compare(answers))
            if seen and all(look["agree"] for look in seen.values()):
                break
            await asyncio.sleep(0.1 * self.options.slot_s)
        return seen

    # --- judging -----------------------------------------------------------------------------------------------------

    def _losses(self, folders: dict[int, Path]) -> dict[str, dict[str, float]]:
        """Held-out loss per tier: untrained, of the agreed weights, and of a node's own weights."""
        data = DataSection()
        losses: dict[str, dict[str, float]] = {"start": {}, "end": {}, "own": {}}
        for peer in sorted(self.peers, key=lambda p: -p.tier):
            tier, folder = str(peer.tier), folders[peer.index]
            found = offline.evaluate(folder, data=data, tiers=(peer.tier,))
            losses["start"][tier] = offline.initial_loss(folder, data=data, tier=peer.tier)
            losses["end"][tier] = found["agreed"][tier]
            losses["own"][tier] = found["own"][tier]
        return losses


def run_swarm(options: SwarmOptions, deploy_dir: Path | None = None) -> dict[str, Any]:
    """Run a swarm of processes, or of the containers that a folder's compose files describe: its report.

    Raises NodeError.
    """
    root = options.keep_dir or Path(tempfile.mkdtemp(prefix="braniac-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        return asyncio.run(Swarm(options, _host(options, root, deploy_dir)).run())
    except TimeoutError:
        raise NodeError(
            f"the swarm did not get going in {START_S_MAX:.0f} s: run again with --keep-dir for logs"
        ) from None
    except ExceptionGroup as errors:
        if found := errors.subgroup(NodeError):
            raise _first(found) from None
        raise
    finally:
        if options.keep_dir is None:
            shutil.rmtree(root, ignore_errors=True)


def _host(options: SwarmOptions, root: Path, deploy_dir: Path | None) -> Host:
    host: Host
    if deploy_dir is None:
        from braniac.node.swarm_processes import ProcessHost

        host, where = ProcessHost(options, root), "processes: use --engine docker"
    else:
        from braniac.node.swarm_docker import DockerHost

        host, where = DockerHost(options, root, deploy_dir), "containers"
    faults.check_possible(options.faults, host.FAULTS, where)
    return host


def _first(errors: BaseExceptionGroup[NodeError]) -> NodeError:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, NodeError)
    return error
