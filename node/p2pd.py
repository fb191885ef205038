"""The go-libp2p daemon that hivemind's wheel carries: one child process, and our connection to its control socket.

We start it ourselves rather than through `hivemind.P2P`: its sockets then live in a private directory, a port in use is
told from other failures, and its death is seen (a call through a dead daemon would otherwise wait for ever).
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import structlog
from multiaddr import Multiaddr

from braniac.node.errors import ConfigError, ResourceError
from braniac.node.transport import split_host_port

with warnings.catch_warnings():
    # Importing hivemind imports all of it, and its mixture-of-experts server uses what torch has deprecated.
    warnings.simplefilter("ignore", DeprecationWarning)
    from hivemind.p2p.p2p_daemon_bindings.control import ControlClient, DaemonConnector
    from hivemind.p2p.p2p_daemon_bindings.datastructures import PeerID as PeerID
    from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError as P2PDaemonError
    from hivemind.p2p.p2p_daemon_bindings.utils import P2PHandlerError as P2PHandlerError
    from hivemind.p2p.p2p_daemon_bindings.utils import raise_if_failed, read_pbmsg_safe, write_pbmsg
    from hivemind.proto import p2pd_pb2
    from hivemind.utils.logging import use_hivemind_log_handler
    from hivemind.utils.multiaddr import Multiaddr as HivemindMultiaddr

# hivemind writes to stderr with a handler of its own, and renames a level for everybody; both are undone here.
use_hivemind_log_handler("nowhere")
logging.getLogger("hivemind").setLevel(logging.ERROR)
logging.addLevelName(logging.WARNING, "WARNING")

log = structlog.get_logger(__name__)

START_S = 15.0  # a cold phone takes seconds to unpack the binary
STOP_S = 5.0
_SOCKET_NAME = "p2pd"
_SOCKET_PATH_BYTES_MAX = 107  # sun_path, less its final zero
_READY = b"Peer ID:"


@dataclass(frozen=True)
class P2pdOptions:
    """How the daemon meets the network."""

    listen: Sequence[str] = ("/ip4/127.0.0.1/tcp/0",)  # multiaddrs without a peer id; port 0 takes any free one
    announce: Sequence[str] = ()  # what to tell others instead, for a router that forwards a port
    behind_nat: bool = False  # nobody can dial us: ask the router for a port (UPnP), punch holes, use relays
    relays: Sequence[str] = ()  # multiaddrs of peers that may relay for us, each ending in /p2p/<its id>
    relay_service: bool = False  # relay for others
    socket_dir: Path | None = None  # where the control socket's private directory is made; None: the system's place


class P2pd:
    """A running daemon. Once `wait_dead` returns it is of no use any more."""

    def __init__(self, directory: Path, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self._directory = directory
        self._socket = directory / _SOCKET_NAME
        self._calls: Any = None  # hivemind's ControlClient: the connection that all unary calls share
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._last_words = b"it said nothing"
        self._drain = asyncio.create_task(self._read_output())

    @classmethod
    async def start(cls, identity_path: Path, options: P2pdOptions) -> P2pd:
        """Start the daemon under the key at `identity_path`. Raises ConfigError, ResourceError."""
        for address in options.listen:
            check_listen(address)
        for address in options.announce:
            _check_announce(address)
        directory = _private_directory(options.socket_dir)
        try:
            process = await asyncio.create_subprocess_exec(
                *_command(identity_path, directory / _SOCKET_NAME, options),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us: the daemon must live until peers have heard our goodbye
                env={"GOLOG_LOG_LEVEL": "error", **os.environ},
            )
        except BaseException as error:
            shutil.rmtree(directory)
            if isinstance(error, OSError):
                raise ResourceError(f"cannot run hivemind's libp2p daemon ({error}): install it anew") from None
            raise
        self = cls(directory, process)
        try:
            await self._open()
        except BaseException:
            await self.stop()
            raise
        return self

    async def call(self, peer: bytes, protocol: str, request: bytes) -> bytes:
        """One unary call; waits for ever if nobody answers. Raises P2PDaemonError, P2PHandlerError."""
        reply: bytes = await self._calls.call_unary_handler(PeerID(peer), protocol, request)
        return reply

    async def serve(self, protocol: str, handler: Callable[[bytes, bytes], Awaitable[bytes]]) -> None:
        """Let `handler(peer id, request)` answer the calls under `protocol`."""

        async def answer(request: bytes, remote: Any) -> bytes:
            # hivemind forgets to forget the tasks of calls that their caller cancelled.
            tasks = self._calls._handler_tasks
            for call_id in [call_id for call_id, task in tasks.items() if task.done()]:
                del tasks[call_id]
            return await handler(remote.to_bytes(), request)

        await self._calls.add_unary_handler(protocol, answer)

    async def connect(self, peer: bytes, addresses: Sequence[Multiaddr]) -> None:
        """Dial. Raises P2PDaemonError."""
        targets = [address.to_bytes() for address in addresses]
        connect = p2pd_pb2.ConnectRequest(peer=peer, addrs=targets)
        await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect))

    async def identify(self) -> tuple[bytes, list[str]]:
        """The daemon's peer id, and the multiaddrs (without it) at which it believes to be reachable."""
        response = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY))
        return response.identify.id, [str(Multiaddr(address)) for address in response.identify.addrs]

    async def connected_from(self, peer: bytes) -> list[str]:
        """The multiaddrs of the other ends of the connections with `peer`."""
        response = await self._ask(p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS))
        found = [bytes(address) for known in response.peers if known.id == peer for address in known.addrs]
        return [str(Multiaddr(address)) for address in found]

    async def wait_dead(self) -> None:
        """Return when the process ended, or when our connection to it can carry nothing more."""
        connection = {self._calls._read_task, self._calls._write_task}
        await asyncio.wait({self._drain, *connection}, return_when=asyncio.FIRST_COMPLETED)

    async def stop(self) -> None:
        """End the process and everything that hivemind runs for it."""
        if self.process.returncode is None:
            self.process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        tasks = [self._drain]  # ends with the process
        if self._calls is not None:
            hivemind_tasks = [self._calls._read_task, self._calls._write_task, *self._calls._handler_tasks.values()]
            for task in hivemind_tasks:
                task.cancel()
            tasks += hivemind_tasks
        await asyncio.gather(*tasks, return_exceptions=True)
        shutil.rmtree(self._directory, ignore_errors=True)

    async def _open(self) -> None:
        """Wait until the daemon is ready, then open the connection for calls."""
        try:
            async with asyncio.timeout(START_S):
                await asyncio.wait({self._ready, self._drain}, return_when=asyncio.FIRST_COMPLETED)
                if not self._ready.done():
                    raise ResourceError(self._why_not_started())
                self._calls = await ControlClient.create(DaemonConnector(HivemindMultiaddr(f"/unix{self._socket}")))
        except TimeoutError:
            raise ResourceError(f"the libp2p daemon did not start in {START_S:g} s: close other programs") from None

    async def _ask(self, request: Any) -> Any:
        """One request on a connection of its own. Unlike hivemind's, it is closed when we are cancelled."""
        reader, writer = await asyncio.open_unix_connection(self._socket)
        try:
            await write_pbmsg(writer, request)
            response = p2pd_pb2.Response()
            await read_pbmsg_safe(reader, response)
        finally:
            writer.close()
        raise_if_failed(response)
        return response

    def _why_not_started(self) -> str:
        words = self._last_words.decode(errors="replace")
        if "address already in use" in words:
            return f"a port to listen on is in use ({words}): stop the other program, or choose another port"
        return f"the libp2p daemon did not start ({words}): check the listen addresses and the key file"

    async def _read_output(self) -> None:
        """Read until the process ends: a full pipe would stop it."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self._last_words = line.strip()[:500] or self._last_words
            if line.startswith(_READY) and not self._ready.done():
                self._ready.set_result(None)
            log.debug("p2pd", line=line.decode(errors="replace").rstrip())


def _private_directory(parent: Path | None) -> Path:
    """A new directory that only we may enter, with a name short enough for a socket in it."""
    try:
        directory = Path(tempfile.mkdtemp(prefix="braniac-", dir=parent))  # mode 0700
    except OSError as error:
        raise ResourceError(f"cannot make a directory for sockets ({error}): choose another place") from None
    if len(os.fsencode(directory / _SOCKET_NAME)) > _SOCKET_PATH_BYTES_MAX:
        directory.rmdir()
        raise ResourceError(f"the path {directory} is too long for a socket: choose a directory with a shorter name")
    return directory


def _command(identity_path: Path, control: Path, options: P2pdOptions) -> list[str]:
    nat, service = int(options.behind_nat), int(options.relay_service)
    flags: dict[str, object] = {
        "id": identity_path,
        "listen": f"/unix{control}",
        "hostAddrs": ",".join(options.listen),
        "idleTimeout": "30s",  # it ends by itself if we die before we connect
        "dhtServer": 1,
        "b": 0,  # no bootstrap peers: it would refuse to start without them; we connect later
        "connManager": 1,
        "tls": 1,
        "autonat": nat | service,  # tell others whether they can be dialled, and punch holes
        "natPortMap": nat,
        "relay": nat | service,  # not for all: with it p2pd relays a little for anybody, whatever relayService says
        "relayService": service,
        "autoRelay": nat,
        "forceReachabilityPrivate": nat,  # a relay at once, not when others have found out
        "forceReachabilityPublic": service,  # else it relays only when others have found out
    }
    if options.behind_nat and options.relays:
        # Asked at once; relays found in the DHT would be asked minutes later, and these two do not go together.
        flags |= {"trustedRelays": ",".join(options.relays), "relayDiscovery": 0}
    if options.announce:
        flags["announceAddrs"] = ",".join(options.announce)
    binary = Path(str(files("hivemind") / "hivemind_cli" / "p2pd"))
    return [str(binary), *(f"-{name}={value}" for name, value in flags.items())]


def check_listen(address: str) -> None:
    """Refuse what is no address, and a port that is taken. Raises ConfigError, ResourceError.

    The daemon listens with SO_REUSEPORT, so two daemons on one port would silently share each other's connections.
    """
    try:
        host, port = split_host_port(address)
        if not address.startswith(("/ip4/", "/ip6/")):
            raise ValueError("it must be a numeric address")
    except ValueError as error:
        raise ConfigError(f"cannot listen on {address!r}: {error}; write it like /ip4/0.0.0.0/tcp/31337") from None
    family = socket.AF_INET6 if address.startswith("/ip6/") else socket.AF_INET
    kind = socket.SOCK_STREAM if "/tcp/" in address else socket.SOCK_DGRAM
    with socket.socket(family, kind) as probe:
        if kind == socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the port may be ours from a moment ago
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ResourceError(f"port {port} is in use: stop the other program, or choose another port") from None
            raise ResourceError(
                f"cannot listen on {address} ({error.strerror}): choose an address of this machine"
            ) from None


def _check_announce(address: str) -> None:
    try:
        _, port = split_host_port(address)
        if not port:
            raise ValueError("the port must be the one that others dial, not 0")
    except ValueError as error:
        raise ConfigError(f"cannot announce {address!r}: {error}; write it like /ip4/203.0.113.7/tcp/31337") from None
