"""The control API: gRPC on a unix socket that only its owner can open, with health and reflection.

`ControlServer` runs in the daemon's event loop; `ControlClient` is what the command line uses, and needs no event loop.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import quote

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read once by grpc's C core, which would write to our stderr

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from braniac.node import control_pb2, control_pb2_grpc
from braniac.node.errors import AlreadyRunning, ConfigError, Incompatible, NodeError, NotRunning, ResourceError

SERVICE = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
PATH_BYTES_MAX = 107  # sockaddr_un has room for 108, one of them the terminating zero
REQUEST_BYTES_MAX = 1 << 16
REPLY_BYTES_MAX = 1 << 26
CALLS_MAX = 32
ANSWER_S_MAX = 5.0
WATCH_S_MIN = 0.1
WATCH_SLOTS_LATE = 64
PAUSE_S_MAX = 366 * 86_400
NO_SLOTS = (1 << 64) - 1  # as `since_slot`: the status without any


class ControlSource(Protocol):
    """What the daemon lets the control API see and do. All but the coroutines must be quick: they run in its loop."""

    def status(self, since_slot: int) -> control_pb2.StatusReply:
        """The state now, with the slots remembered from `since_slot` on."""

    def peers(self) -> control_pb2.PeersReply:
        """The peers known now."""

    def pause(self, seconds: float, finish: bool) -> None:
        """Rest for so long, 0 being until `resume`; with `finish`, after the slot in hand."""

    def resume(self) -> control_pb2.ResumeReply:
        """End what `pause` began; the reply names what holds nevertheless."""

    async def reachability(self) -> control_pb2.ReachabilityReply:
        """Have a peer try to dial this node."""

    def contributions(self) -> control_pb2.ContributionsReply:
        """Who contributed how much."""

    async def leave(self, now: bool) -> None:
        """Begin to stop the daemon, and return; with `now`, without waiting for work in flight."""


class ControlServer:
    """Serves `source` on the unix socket `path`, between `start` and `stop` or as `async with`."""

    def __init__(self, path: Path, source: ControlSource) -> None:
        self.path = path.absolute()
        self._source = source
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._stopping = asyncio.Event()

    async def start(self) -> None:
        """Bind and serve. Raises ResourceError if the path cannot be a socket, AlreadyRunning if one answers there."""
        _check_length(self.path)
        _remove_stale(self.path)
        self._stopping.clear()
        server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", REQUEST_BYTES_MAX)], maximum_concurrent_rpcs=CALLS_MAX
        )
        control_pb2_grpc.add_ControlServicer_to_server(_Servicer(self._source, self._stopping), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        with _only_for_the_owner():
            try:
                server.add_insecure_port(_target(self.path))
            except RuntimeError as error:
                raise ResourceError(
                    f"cannot open the control socket {self.path}: choose another --state-dir"
                ) from error
        await server.start()
        self._server = server
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Refuse new calls, let running ones finish within `grace_s`, and remove the socket. Harmless when repeated."""
        server, self._server = self._server, None
        if server is not None:
            self._stopping.set()  # who watches would keep us for all of the grace
            await self._health.enter_graceful_shutdown()
            await server.stop(grace_s)
            self.path.unlink(missing_ok=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


class _Servicer(control_pb2_grpc.ControlServicer):
    def __init__(self, source: ControlSource, stopping: asyncio.Event) -> None:
        self._source = source
        self._stopping = stopping

    async def Status(
        self, request: control_pb2.StatusRequest, context: grpc.aio.ServicerContext[Message, Message]
    ) -> control_pb2.StatusReply:
        return self._source.status(request.since_slot)

    async def Peers(
        self, request: control_pb2.PeersRequest, context: grpc.aio.ServicerContext[Message, Message]
    ) -> control_pb2.PeersReply:
        return self._source.peers()

    async def Watch(
        self, request: control_pb2.WatchRequest, context: grpc.aio.ServicerContext[Message, Message]
    ) -> AsyncIterator[control_pb2.StatusReply]:
        since_slot, period_s = request.since_slot, max(WATCH_S_MIN, request.period_s)
        sent: set[tuple[int, bytes]] = set()
        while not self._stopping.is_set():
            reply = self._source.status(since_slot)
            seen = {(record.slot, record.certificate): record for record in reply.slots}
            del reply.slots[:]
            reply.slots.extend(record for key, record in seen.items() if key not in sent)
            # A slot without a certificate is settled after younger ones with one.
            newest = max((slot for slot, _ in seen), default=0)
            since_slot = max(since_slot, newest - WATCH_SLOTS_LATE)
            sent = {key for key in sent | set(seen) if key[0] >= since_slot}
            yield reply
            with suppress(TimeoutError):
                async with asyncio.timeout(period_s):
                    await self._stopping.wait()

    async def Pause(
        self, request: control_pb2.PauseRequest, context: grpc.aio.ServicerContext[Message, Message]
    ) -> control_pb2.PauseReply:
        if not 0 <= request.seconds <= PAUSE_S_MAX:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a pause lasts from 0 to {PAUSE_S_MAX} seconds")
        self._source.pause(request.seconds, request.finish)
        return control_pb2.PauseReply()

    async def Resume(
        self, request: control_pb2.ResumeRequest, context: grpc.aio.ServicerContext[Message, Message]
    ) -> control_pb2.ResumeReply:
        return self._source.resume()

    async def Reachability(
        self, request: control_pb2.ReachabilityRequest, context: grpc.aio.ServicerContext[Message, Message]
    ) -> control_pb2.ReachabilityReply:
        return await self._source.reachability()

    async def Contributions(
        self, request: control_pb2.ContributionsRequest, context: grpc.aio.ServicerContext[Message, Message]
    ) -> control_pb2.ContributionsReply:
        return self._source.contributions()

    async def Leave(
        self, request: control_pb2.LeaveRequest, context: grpc.aio.ServicerContext[Message, Message]
    ) -> control_pb2.LeaveReply:
        await self._source.leave(request.now)
        return control_pb2.LeaveReply()


class ControlClient:
    """Asks the daemon behind the unix socket `path`.

    Every call raises NotRunning if nobody answers within `answer_s_max`, Incompatible if another version does, and
    NodeError if the daemon failed.
    """

    def __init__(self, path: Path, answer_s_max: float = ANSWER_S_MAX) -> None:
        self.path = path.absolute()
        self._answer_s_max = answer_s_max

    def status(self, since_slot: int = 0) -> control_pb2.StatusReply:
        """How the node is doing, with the slots it remembers from `since_slot` on."""
        with self._stub() as stub:
            return stub.Status(control_pb2.StatusRequest(since_slot=since_slot), timeout=self._answer_s_max)

    def peers(self) -> control_pb2.PeersReply:
        """Whom the node knows."""
        with self._stub() as stub:
            return stub.Peers(control_pb2.PeersRequest(), timeout=self._answer_s_max)

    def watch(
        self,
        since_slot: int = 0,
        period_s: float = 1.0,
        began: Callable[[Callable[[], object]], object] = lambda cancel: None,
    ) -> Iterator[control_pb2.StatusReply]:
        """Status now and every `period_s` seconds, each slot once; ends when the daemon does.

        `began` is given a function that ends it from any thread.
        """
        with self._stub() as stub:
            call = stub.Watch(control_pb2.WatchRequest(since_slot=since_slot, period_s=period_s))
            began(call.cancel)
            try:
                yield from call
            except grpc.RpcError as error:
                if not isinstance(error, grpc.Call) or error.code() is not grpc.StatusCode.CANCELLED:
                    raise  # cancelled by us, or by a daemon in a hurry

    def pause(self, seconds: float = 0.0, finish: bool = False) -> None:
        """Ask the daemon to rest for so long, 0 being until `resume`; with `finish`, after the slot in hand."""
        with self._stub() as stub:
            stub.Pause(control_pb2.PauseRequest(seconds=seconds, finish=finish), timeout=self._answer_s_max)

    def resume(self) -> control_pb2.ResumeReply:
        """End what `pause` began; the reply names what holds nevertheless."""
        with self._stub() as stub:
            return stub.Resume(control_pb2.ResumeRequest(), timeout=self._answer_s_max)

    def reachability(self, answer_s_max: float = 30.0) -> control_pb2.ReachabilityReply:
        """Have a peer try to dial the node."""
        with self._stub() as stub:
            return stub.Reachability(control_pb2.ReachabilityRequest(), timeout=answer_s_max)

    def contributions(self) -> control_pb2.ContributionsReply:
        """Who contributed how much."""
        with self._stub() as stub:
            return stub.Contributions(control_pb2.ContributionsRequest(), timeout=self._answer_s_max)

    def leave(self, now: bool = False) -> None:
        """Ask the daemon to stop; it does so after this returns."""
        with self._stub() as stub:
            stub.Leave(control_pb2.LeaveRequest(now=now), timeout=self._answer_s_max)

    @contextmanager
    def _stub(self) -> Iterator[control_pb2_grpc.ControlStub]:
        """A connection for one call, and its errors in our words."""
        _check_length(self.path)
        options = [("grpc.max_receive_message_length", REPLY_BYTES_MAX), ("grpc.enable_http_proxy", 0)]
        try:
            with grpc.insecure_channel(_target(self.path), options) as channel:
                yield control_pb2_grpc.ControlStub(channel)
        except grpc.RpcError as error:
            if not isinstance(error, grpc.Call):
                raise
            raise self._explain(error.code(), error.details() or "no details") from None

    def _explain(self, code: grpc.StatusCode, details: str) -> NodeError:
        daemon = f"the daemon on {self.path}"
        if code is grpc.StatusCode.UNAVAILABLE:
            return NotRunning(
                f"no daemon answers on {self.path}: start one with 'braniac-node join', or name its --state-dir"
            )
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return NotRunning(f"{daemon} did not answer within {self._answer_s_max:g} s: try again later")
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            return ConfigError(details)
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return Incompatible(f"{daemon} is of another version: restart it with this one")
        return NodeError(f"{daemon} failed to answer ({details}): see its log")


def _target(path: Path) -> str:
    return "unix:" + quote(os.fsencode(path))


def _check_length(path: Path) -> None:
    length = len(os.fsencode(path))
    if length > PATH_BYTES_MAX:
        raise ResourceError(
            f"the control socket's path {path} has {length} bytes and the system allows {PATH_BYTES_MAX}: "
            "choose a shorter --state-dir"
        )


def _remove_stale(path: Path) -> None:
    """Remove what a killed daemon left. grpc would do so even to a socket on which a living one listens."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ResourceError(f"{path} is in the way of the control socket: remove it, or choose another --state-dir")
    except OSError:
        return  # nothing there, or nothing we may look at: binding will tell
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(ANSWER_S_MAX)
        try:
            probe.connect(os.fsencode(path))
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise AlreadyRunning(f"a daemon answers on {path}: stop it, or choose another --state-dir")


@contextmanager
def _only_for_the_owner() -> Iterator[None]:
    """Whatever is made inside has no permission bits for others, from its first instant."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)
