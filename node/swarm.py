"""A whole swarm on this machine: real daemons as processes on loopback, some of them killed, and figures at the end.

Everything is watched from outside, as a sceptic would: over the control sockets while the daemons run, and from the
state directories after they have left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog

from braniac.node import offline
from braniac.node import swarm_report as report
from braniac.node.config import DataSection, control_socket_path
from braniac.node.control_client import ControlClient
from braniac.node.control_pb2 import StatusReply
from braniac.node.errors import NodeError, NotRunning
from braniac.node.swarm_options import SwarmOptions
from braniac.protocol.committee import committee
from braniac.protocol.identity import peer_id_from_text

log = structlog.get_logger(__name__)

_POLL_S = 0.5
_START_S_MAX = 120.0
_LEAVE_S_MAX = 60.0
_FIRST_KILL, _LAST_KILL = 0.2, 0.75  # of the time: before the first the swarm settles, after the last it recovers
_DOWN_SLOTS = 3  # a killed node stays away this long

_Result = TypeVar("_Result")


@dataclass
class Peer:
    """One daemon of the swarm."""

    index: int
    tier: int
    port: int
    state_dir: Path
    process: asyncio.subprocess.Process | None = None
    observations: report.Observations = field(default_factory=report.Observations)

    @property
    def address(self) -> str:
        """Where the others find it, once it has said who it is."""
        return f"/ip4/127.0.0.1/tcp/{self.port}/p2p/{self.observations.peer_id}"

    async def ask(self) -> StatusReply | None:
        """Its status, or None while it does not answer; what it says is kept."""
        client = ControlClient(control_socket_path(self.state_dir))
        try:
            reply = await asyncio.to_thread(client.status, self.observations.next_slot)
        except NodeError:
            return None
        self.observations.note(asyncio.get_running_loop().time(), reply)
        return reply

    async def leave(self) -> int:
        """Let it leave: its exit code."""
        assert self.process is not None
        with contextlib.suppress(NotRunning):
            await asyncio.to_thread(ControlClient(control_socket_path(self.state_dir)).leave)
        async with asyncio.timeout(_LEAVE_S_MAX):
            return await self.process.wait()


class Swarm:
    """Starts, watches, kills, judges."""

    def __init__(self, options: SwarmOptions, root: Path) -> None:
        self.options = options
        tiers = [options.tiers[i % len(options.tiers)] for i in range(options.nodes)]
        ports = _free_ports(options.nodes)
        self.peers = [Peer(i, tier, ports[i], root / f"n{i}") for i, tier in enumerate(tiers)]
        self.kills: list[dict[str, Any]] = []
        self.splits = report.Splits(options.slot_s)
        self._random = random.Random(options.seed)

    async def run(self) -> dict[str, Any]:
        """The whole life of the swarm: its report."""
        try:
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(self._watch())
                await self._start_all()
                log.info("the swarm is complete", nodes=len(self.peers))
                began = asyncio.get_running_loop().time()
                await self._let_train(began)
                agreed = await self._wait_for_agreement()
                watching.cancel()
            log.info("leaving")
            codes = await asyncio.gather(*(peer.leave() for peer in self.peers))
        finally:
            await self._kill_all()
        observations = {peer.index: peer.observations for peer in self.peers}
        losses = await asyncio.to_thread(self._losses)
        return report.build(self.options, observations, self.kills, agreed, self.splits, losses, codes, began)

    # --- starting and stopping ---------------------------------------------------------------------------------------

    async def _start_all(self) -> None:
        """The founder first, then everybody else at once."""
        await self._start(self.peers[0], joins=False)
        await self._until(lambda: self._is(self.peers[0], "training"))
        for peer in self.peers[1:]:
            await self._start(peer, joins=True)
        for peer in self.peers[1:]:
            await self._until(partial(self._is, peer, "training"))

    async def _start(self, peer: Peer, *, joins: bool) -> None:
        options = self.options
        command = [sys.executable, "-m", "braniac.node", "join"]
        command += ["--state-dir", str(peer.state_dir), "--tier", str(peer.tier), "--log-format", "json"]
        command += ["--listen", f"/ip4/127.0.0.1/tcp/{peer.port}", "--preset", options.preset]
        command += ["--set", f"run.slot_s={options.slot_s}", "--set", f"run.seed={options.seed}"]
        for setting in options.sets:
            command += ["--set", setting]
        if joins:
            command += ["--peers", self.peers[0].address]
        peer.state_dir.mkdir(parents=True, exist_ok=True)
        with (peer.state_dir.parent / f"n{peer.index}.log").open("ab") as output:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            peer.process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )

    async def _kill_all(self) -> None:
        for peer in self.peers:
            if peer.process is not None and peer.process.returncode is None:
                peer.process.kill()
                await peer.process.wait()

    # --- watching and killing ----------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        while True:
            replies = await asyncio.gather(*(peer.ask() for peer in self.peers if peer.process is not None))
            answers = [reply for reply in replies if reply is not None]
            self.splits.look(asyncio.get_running_loop().time(), answers)
            await asyncio.sleep(_POLL_S)

    async def _let_train(self, began: float) -> None:
        """Let time pass, with the kills spread over it: in turn the owner of the slot, and anybody."""
        loop, options = asyncio.get_running_loop(), self.options
        for number in range(options.kill):
            share = _FIRST_KILL + (_LAST_KILL - _FIRST_KILL) * number / max(1, options.kill - 1)
            await asyncio.sleep(max(0.0, began + share * options.seconds - loop.time()))
            await self._kill_one(owner=number % 2 == 0)
        await asyncio.sleep(max(0.0, began + options.seconds - loop.time()))
        for peer in self.peers:
            await self._until(partial(self._is, peer, "training"))

    async def _kill_one(self, *, owner: bool) -> None:
        status = await self._until(lambda: self._first_answer())
        victim, slot = self._random.choice(self.peers), status.slot
        if owner:
            peers = {peer_id_from_text(p.observations.peer_id): p for p in self.peers}
            victim = peers[committee(bytes.fromhex(status.run_id), slot, peers)[0]]
        assert victim.process is not None
        victim.process.send_signal(signal.SIGKILL)
        await victim.process.wait()
        self.kills.append({"node": victim.index, "tier": victim.tier, "slot": slot, "owner_of_slot": owner})
        log.info("killed a node", **self.kills[-1])
        victim.observations.restarted()
        await asyncio.sleep(_DOWN_SLOTS * self.options.slot_s)
        await self._start(victim, joins=victim.index != 0)

    async def _first_answer(self) -> StatusReply | None:
        for peer in self.peers:
            if (status := await peer.ask()) is not None:
                return status
        return None

    async def _is(self, peer: Peer, state: str) -> StatusReply | None:
        assert peer.process is not None
        if peer.process.returncode is not None:
            raise NodeError(f"node {peer.index} ended with exit code {peer.process.returncode}: see n{peer.index}.log")
        status = await peer.ask()
        return status if status is not None and status.state == state else None

    async def _wait_for_agreement(self) -> dict[int, dict[str, Any]]:
        """Look at all nodes until each fragment was seen with the same last slot and bytes at all that hold it."""
        seen: dict[int, dict[str, Any]] = {}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 60 * self.options.slot_s
        while loop.time() < deadline:
            replies = await asyncio.gather(*(peer.ask() for peer in self.peers))
            answers = [reply for reply in replies if reply is not None]
            if len(answers) == len(self.peers):  # silence is no agreement
                report.keep_agreement(seen, report.compare(answers))
            if seen and all(look["agree"] for look in seen.values()):
                break
            await asyncio.sleep(0.1 * self.options.slot_s)
        return seen

    async def _until(self, condition: Callable[[], Awaitable[_Result | None]]) -> _Result:
        async with asyncio.timeout(_START_S_MAX):
            while True:
                if (result := await condition()) is not None:
                    return result
                await asyncio.sleep(0.1)

    # --- judging -----------------------------------------------------------------------------------------------------

    def _losses(self) -> dict[str, dict[str, float]]:
        """Held-out loss per tier: untrained, of the agreed weights, and of a node's own weights."""
        data = DataSection()
        losses: dict[str, dict[str, float]] = {"start": {}, "end": {}, "own": {}}
        for peer in sorted(self.peers, key=lambda p: -p.tier):
            tier = (peer.tier,)
            found = offline.evaluate(peer.state_dir, data=data, tiers=tier)
            losses["start"][str(peer.tier)] = offline.initial_loss(peer.state_dir, data=data, tier=peer.tier)
            losses["end"][str(peer.tier)] = found["agreed"][str(peer.tier)]
            losses["own"][str(peer.tier)] = found["own"][str(peer.tier)]
        return losses


def _free_ports(count: int) -> list[int]:
    """Ports that nobody uses now; fixed, so that a node is found again after it was killed."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def run_swarm(options: SwarmOptions) -> dict[str, Any]:
    """Run a swarm and return its report. Raises NodeError."""
    root = options.keep_dir or Path(tempfile.mkdtemp(prefix="braniac-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        return asyncio.run(Swarm(options, root).run())
    except TimeoutError:
        raise NodeError(
            f"the swarm did not get going in {_START_S_MAX:.0f} s: run again with --keep-dir for logs"
        ) from None
    finally:
        if options.keep_dir is None:
            shutil.rmtree(root, ignore_errors=True)
