"""The client of the control API, as the command line uses it: no event loop, and quick to load."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read once by grpc's C core, which would write to our stderr

import grpc

from braniac.node import control_pb2, control_pb2_grpc, control_socket
from braniac.node.errors import ConfigError, Incompatible, NodeError, NotRunning

REPLY_BYTES_MAX = 1 << 26


class ControlClient:
    """Asks the daemon behind the unix socket `path`.

    Every call raises NotRunning if nobody answers within `answer_s_max`, Incompatible if another version does, and
    NodeError if the daemon failed.
    """

    def __init__(self, path: Path, answer_s_max: float = control_socket.ANSWER_S_MAX) -> None:
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
        control_socket.check_length(self.path)
        options = [("grpc.max_receive_message_length", REPLY_BYTES_MAX), ("grpc.enable_http_proxy", 0)]
        try:
            with grpc.insecure_channel(control_socket.target(self.path), options) as channel:
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
