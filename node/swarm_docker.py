"""The daemons of a test swarm as containers of deploy/compose.yaml, with limits as phones have them.

Each is watched by `braniac-node status --watch --json` inside its container, and its state is copied out at the end.
What is done to a node's network is done by a second container in that network, which is allowed to do nothing else.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from braniac.node.commands import fill_message
from braniac.node.compose import Container, Project, check_tools, docker
from braniac.node.control_pb2 import StatusReply
from braniac.node.errors import ConfigError
from braniac.node.faults import CAP_KBIT_PER_S, KINDS, LOSS, Fault
from braniac.node.swarm_host import Host, Peer
from braniac.node.swarm_options import SwarmOptions

log = structlog.get_logger(__name__)

FAULTS_IMAGE = "braniac-faults:0.1.0"
_STATE_DIR = "/var/lib/braniac"
_FRESH_S = 5.0  # an older answer is none
_LINE_BYTES_MAX = 1 << 24
_LEAVE_S = 60

_CAP = f"tc qdisc replace dev eth0 root tbf rate {CAP_KBIT_PER_S}kbit burst 16kb latency 300ms"
_UNCAP = "tc qdisc del dev eth0 root"
_LOSE = f"iptables -A INPUT ! -i lo -m statistic --mode random --probability {LOSS} -j DROP"
_MEND = "iptables -F INPUT; iptables -F OUTPUT"


@dataclass
class DockerPeer(Peer):
    """A daemon in a container."""

    container: Container | None = None
    latest: StatusReply | None = None
    heard_at: float = float("-inf")


class DockerHost(Host):
    """The containers of one compose project, which is its own and gone afterwards."""

    FAULTS = KINDS

    def __init__(
        self,
        options: SwarmOptions,
        root: Path,
        deploy_dir: Path,
        *,
        name: str = "braniac-swarm",
        beside: Sequence[str] = (),
    ) -> None:
        """`beside` names services that run too, such as prometheus. Raises ConfigError."""
        if options.tier_of(0) != 0:
            raise ConfigError("the founder of a swarm in containers holds all of the model: begin --tiers with 0")
        self._options = options
        self._root = root
        self._beside = tuple(beside)
        self.peers: Sequence[DockerPeer] = [DockerPeer(i, options.tier_of(i)) for i in range(options.nodes)]
        self._tiers = Counter(peer.tier for peer in self.peers[1:])
        settings = {"run.seed": str(options.seed), **dict(_setting(text) for text in options.sets)}
        override = root / "override.json"
        environment = {f"BRANIAC_NODE__{key.replace('.', '__')}": value for key, value in settings.items()}
        services = ["founder", *(f"tier{tier}" for tier in range(4))]
        override.write_text(json.dumps({"services": {service: {"environment": environment} for service in services}}))
        files = [deploy_dir / "compose.yaml", deploy_dir / "compose.chaos.yaml", override]
        self.project = Project(
            files,
            name=name,
            profiles=["observe"],
            environment={"PRESET": options.preset, "SLOT_S": str(options.slot_s)},
        )
        self._watchers: list[asyncio.Task[None]] = []

    async def start_all(self) -> None:
        """See Host."""
        await check_tools()
        scale = {f"tier{tier}": self._tiers[tier] for tier in range(4)}
        services = ["founder", *(service for service, count in scale.items() if count), *self._beside]
        if any(wish.kind in ("partition", "cap", "loss") for wish in self._options.faults):
            await self._need_faults_image()
        await self.project.up(services, {name: count for name, count in scale.items() if count})
        await self._find()
        self._watchers = [asyncio.create_task(self._watch(peer)) for peer in self.peers]

    async def _need_faults_image(self) -> None:
        if not (await docker("images", "--quiet", FAULTS_IMAGE)).strip():
            await self.project.compose("--profile", "chaos", "build", "faults")

    async def _find(self) -> None:
        """Which container is which peer: those of a tier in order of their numbers."""
        waiting = list(self.peers)
        for container in await self.project.containers():
            tier = 0 if container.service == "founder" else _tier(container.service)
            if tier is not None:
                same = [p for p in waiting if (p.index == 0) == (container.service == "founder") and p.tier == tier]
                same[0].container = container
                waiting.remove(same[0])
        assert not waiting, "compose has started fewer nodes than it was told"

    async def _watch(self, peer: DockerPeer) -> None:
        """Take in what a node says, for ever; it says nothing while it is down."""
        assert peer.container is not None
        loop = asyncio.get_running_loop()
        while True:
            process = await asyncio.create_subprocess_exec(
                *("docker", "exec", peer.container.id, "braniac-node", "status", "--watch", "--json"),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                limit=_LINE_BYTES_MAX,
            )
            assert process.stdout is not None
            try:
                async for line in process.stdout:
                    reply = StatusReply()
                    fill_message(reply, json.loads(line))
                    peer.latest, peer.heard_at = reply, loop.time()
                    peer.observations.note(peer.heard_at, reply)
                await process.wait()
            finally:
                if process.returncode is None:  # cancelled
                    process.kill()
                    await process.wait()
            await asyncio.sleep(1.0)

    async def ask(self, peer: Peer) -> StatusReply | None:
        """See Host."""
        assert isinstance(peer, DockerPeer)
        fresh = asyncio.get_running_loop().time() - peer.heard_at < _FRESH_S
        return peer.latest if fresh else None

    # --- faults ------------------------------------------------------------------------------------------------------

    async def begin(self, fault: Fault, victims: Sequence[Peer]) -> None:
        """See Host."""
        await asyncio.gather(*(self._do(fault, peer, victims, end=False) for peer in victims))

    async def end(self, fault: Fault, victims: Sequence[Peer]) -> None:
        """See Host."""
        await asyncio.gather(*(self._do(fault, peer, victims, end=True) for peer in victims))

    async def _do(self, fault: Fault, peer: Peer, victims: Sequence[Peer], *, end: bool) -> None:
        assert isinstance(peer, DockerPeer)
        assert peer.container is not None
        match fault.kind:
            case "kill":
                await docker("start" if end else "kill", peer.container.id)
            case "pause":
                await docker("unpause" if end else "pause", peer.container.id)
            case "cap":
                await self._in_network_of(peer.container, _UNCAP if end else _CAP)
            case "loss":
                await self._in_network_of(peer.container, _MEND if end else _LOSE)
            case "partition":
                await self._in_network_of(peer.container, _MEND if end else await self._cut_from_others(victims))
        if not end and fault.kind in ("kill", "pause"):
            peer.heard_at = float("-inf")

    async def _cut_from_others(self, side: Sequence[Peer]) -> str:
        """Shell words that drop all packets from and to the nodes that are not on this side."""
        inside = {peer.container.id for peer in side if isinstance(peer, DockerPeer) and peer.container is not None}
        nodes = {peer.container.id for peer in self.peers if peer.container is not None}
        others = [c for c in await self.project.containers() if c.id in nodes - inside]  # addresses of this moment
        rules = [
            f"iptables -A INPUT -s {address} -j DROP; iptables -A OUTPUT -d {address} -j DROP"
            for container in others
            for address in container.addresses
        ]
        return "; ".join(rules)

    async def _in_network_of(self, container: Container, words: str) -> None:
        await docker(
            *("run", "--rm", "--network", f"container:{container.id}", "--user", "0", "--cap-drop", "ALL"),
            *("--cap-add", "NET_ADMIN", "--security-opt", "no-new-privileges", FAULTS_IMAGE, f"set -e; {words}"),
        )

    # --- the end -----------------------------------------------------------------------------------------------------

    async def leave(self, peer: Peer) -> int:
        """See Host; as the engine stops it, by SIGTERM."""
        assert isinstance(peer, DockerPeer)
        assert peer.container is not None
        await docker("stop", "--time", str(_LEAVE_S), peer.container.id)
        return int(await docker("inspect", "--format", "{{.State.ExitCode}}", peer.container.id))

    async def state_dir(self, peer: Peer) -> Path:
        """See Host: a copy."""
        assert isinstance(peer, DockerPeer)
        assert peer.container is not None
        folder = self._root / f"n{peer.index}"
        await docker("cp", f"{peer.container.id}:{_STATE_DIR}/.", str(folder))
        return folder

    async def stop_all(self) -> None:
        """See Host. Logs are kept first."""
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for container in await self.project.containers():
            log_file = self._root / f"{container.name.replace(' ', '-')}.log"
            log_file.write_text(await self.project.logs(container), encoding="utf-8")
        await self.project.down()


def _tier(service: str) -> int | None:
    found = re.fullmatch(r"tier([0-3])", service)
    return int(found[1]) if found else None


def _setting(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text!r} is not KEY=VALUE: write it as in --set train.batch=4")
    return key, value
