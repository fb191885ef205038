"""The server of the control API: gRPC on a unix socket, with health and reflection, in the daemon's event loop.

Who may open the socket is in control_socket.py; who asks, in control_client.py.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read once by grpc's C core, which would write to our stderr

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from grpc_reflection.v1alpha import reflection  # type: ignore[import-untyped]

from braniac.node import control_pb2, control_pb2_grpc, control_socket
from braniac.node.errors import ResourceError

SERVICE = control_pb2.DESCRIPTOR.services_by_name["Control"].full_name
REQUEST_BYTES_MAX = 1 << 16
CALLS_MAX = 32
WATCH_S_MIN = 0.1
WATCH_SLOTS_LATE = 64
PAUSE_S_MAX = 366 * 86_400
NO_SLOTS = (1 << 64) - 1  # as `since_slot`: the status without any

_Context = grpc.aio.ServicerContext[Message, Message]


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
        control_socket.check_length(self.path)
        control_socket.remove_stale(self.path)
        self._stopping.clear()
        server = grpc.aio.server(
            options=[("grpc.max_receive_message_length", REQUEST_BYTES_MAX)], maximum_concurrent_rpcs=CALLS_MAX
        )
        control_pb2_grpc.add_ControlServicer_to_server(_Servicer(self._source, self._stopping), server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection([SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        with control_socket.only_for_the_owner():
            try:
                server.add_insecure_port(control_socket.target(self.path))
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

    async def Status(self, request: control_pb2.StatusRequest, context: _Context) -> control_pb2.StatusReply:
        return self._source.status(request.since_slot)

    async def Peers(self, request: control_pb2.PeersRequest, context: _Context) -> control_pb2.PeersReply:
        return self._source.peers()

    async def Watch(
        self, request: control_pb2.WatchRequest, context: _Context
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

    async def Pause(self, request: control_pb2.PauseRequest, context: _Context) -> control_pb2.PauseReply:
        if not 0 <= request.seconds <= PAUSE_S_MAX:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"a pause lasts from 0 to {PAUSE_S_MAX} seconds")
        self._source.pause(request.seconds, request.finish)
        return control_pb2.PauseReply()

    async def Resume(self, request: control_pb2.ResumeRequest, context: _Context) -> control_pb2.ResumeReply:
        return self._source.resume()

    async def Reachability(
        self, request: control_pb2.ReachabilityRequest, context: _Context
    ) -> control_pb2.ReachabilityReply:
        return await self._source.reachability()

    async def Contributions(
        self, request: control_pb2.ContributionsRequest, context: _Context
    ) -> control_pb2.ContributionsReply:
        return self._source.contributions()

    async def Leave(self, request: control_pb2.LeaveRequest, context: _Context) -> control_pb2.LeaveReply:
        await self._source.leave(request.now)
        return control_pb2.LeaveReply()
