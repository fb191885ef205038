"""The daemons of a test swarm as processes on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from braniac.node.config import control_socket_path
from braniac.node.control_client import ControlClient
from braniac.node.control_pb2 import StatusReply
from braniac.node.errors import NodeError, NotRunning
from braniac.node.faults import Fault
from braniac.node.swarm_host import LEAVE_S_MAX, Host, Peer, until
from braniac.node.swarm_options import SwarmOptions


@dataclass
class ProcessPeer(Peer):
    """A daemon that is a child of this process."""

    port: int = 0
    folder: Path = Path()
    process: asyncio.subprocess.Process | None = None

    @property
    def address(self) -> str:
        """Where the others find it, once it has said who it is."""
        return f"/ip4/127.0.0.1/tcp/{self.port}/p2p/{self.observations.peer_id}"

    @property
    def alive(self) -> bool:
        """Whether its process runs, ready or not."""
        return self.process is not None and self.process.returncode is None

    def rss_mib(self) -> float:
        """Resident memory of the daemon's own process. Raises OSError if it does not run."""
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


class ProcessHost(Host):
    """Real daemons as processes; whoever sends signals can kill and pause them, and nothing else."""

    FAULTS = ("kill", "pause")

    def __init__(self, options: SwarmOptions, root: Path) -> None:
        self._options = options
        ports = _free_ports(options.nodes)
        self.peers: Sequence[ProcessPeer] = [
            ProcessPeer(i, options.tier_of(i), port=ports[i], folder=root / f"n{i}") for i in range(options.nodes)
        ]

    async def start_all(self) -> None:
        """The founder first, then everybody else at once."""
        founder, *others = self.peers
        await self.start(founder)
        await until(partial(self._trains, founder))
        for peer in others:
            await self.start(peer)

    async def _trains(self, peer: Peer) -> StatusReply | None:
        status = await self.ask(peer)
        return status if status is not None and status.state == "training" else None

    async def start(self, peer: ProcessPeer) -> None:
        """Start one daemon, on the disk it had: the founder, or one that joins whoever was heard of."""
        options = self._options
        command = [sys.executable, "-m", "braniac.node", "join"]
        command += ["--state-dir", str(peer.folder), "--tier", str(peer.tier), "--log-format", "json"]
        command += ["--listen", f"/ip4/127.0.0.1/tcp/{peer.port}", "--preset", options.preset]
        command += ["--set", f"run.slot_s={options.slot_s}", "--set", f"run.seed={options.seed}"]
        for setting in options.sets:
            command += ["--set", setting]
        if peer is not self.peers[0]:
            others = [other.address for other in self.peers if other is not peer and other.observations.peer_id]
            command += ["--peers", ",".join(others)]
        peer.folder.mkdir(parents=True, exist_ok=True)
        with (peer.folder.parent / f"n{peer.index}.log").open("ab") as output:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            peer.process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, env=environment
            )

    async def ask(self, peer: Peer) -> StatusReply | None:
        """See Host."""
        assert isinstance(peer, ProcessPeer)
        if peer.process is None:
            return None
        if peer.process.returncode not in (None, -signal.SIGKILL):
            raise NodeError(f"node {peer.index} ended with exit code {peer.process.returncode}: see n{peer.index}.log")
        client = ControlClient(control_socket_path(peer.folder))
        try:
            reply = await asyncio.to_thread(client.status, peer.observations.next_slot)
        except NodeError:
            return None
        peer.observations.note(asyncio.get_running_loop().time(), reply)
        return reply

    async def begin(self, fault: Fault, victims: Sequence[Peer]) -> None:
        """See Host."""
        for peer in victims:
            assert isinstance(peer, ProcessPeer)
            assert peer.process is not None
            peer.process.send_signal(signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
            if fault.kind == "kill":
                await peer.process.wait()

    async def end(self, fault: Fault, victims: Sequence[Peer]) -> None:
        """See Host."""
        for peer in victims:
            assert isinstance(peer, ProcessPeer)
            assert peer.process is not None
            if fault.kind == "kill":
                await self.start(peer)
            else:
                peer.process.send_signal(signal.SIGCONT)

    async def leave(self, peer: Peer) -> int:
        """See Host."""
        assert isinstance(peer, ProcessPeer)
        assert peer.process is not None
        with contextlib.suppress(NotRunning):
            await asyncio.to_thread(ControlClient(control_socket_path(peer.folder)).leave)
        async with asyncio.timeout(LEAVE_S_MAX):
            return await peer.process.wait()

    async def state_dir(self, peer: Peer) -> Path:
        """See Host."""
        assert isinstance(peer, ProcessPeer)
        return peer.folder

    async def stop_all(self) -> None:
        """See Host."""
        for peer in self.peers:
            if peer.process is not None and peer.process.returncode is None:
                peer.process.kill()
                await peer.process.wait()


def _free_ports(count: int) -> list[int]:
    """Ports that nobody uses now; fixed, so that a node is found again after it was killed."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
