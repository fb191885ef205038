"""The control API over a real unix socket: every call, who may open it, what is in its way, and the generated files."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from braniac.node import control_pb2
from braniac.node.cli import main
from braniac.node.control import PAUSE_S_MAX, SERVICE, ControlServer
from braniac.node.control_client import ControlClient
from braniac.node.control_socket import PATH_BYTES_MAX
from braniac.node.errors import AlreadyRunning, ConfigError, NodeError, NotRunning, ResourceError

ROOT = Path(__file__).parents[2]


class Source:
    """A daemon that has done three slots."""

    def __init__(self) -> None:
        self.left: list[bool] = []
        self.paused: list[tuple[float, bool]] = []

    def status(self, since_slot: int) -> control_pb2.StatusReply:
        slots = [control_pb2.SlotRecord(slot=slot, outcome="merged") for slot in range(since_slot, 3)]
        return control_pb2.StatusReply(state="training", slot=3, slots=slots, refused={"replayed": 2})

    def peers(self) -> control_pb2.PeersReply:
        return control_pb2.PeersReply(peers=[control_pb2.Peer(peer_id="12D3KooW", rtt_s=0.25)])

    def pause(self, seconds: float, finish: bool) -> None:
        self.paused.append((seconds, finish))

    def resume(self) -> control_pb2.ResumeReply:
        return control_pb2.ResumeReply(reasons=[control_pb2.Reason(code="battery_low")])

    async def reachability(self) -> control_pb2.ReachabilityReply:
        return control_pb2.ReachabilityReply(reachability="public", asked="12D3KooW")

    def contributions(self) -> control_pb2.ContributionsReply:
        return control_pb2.ContributionsReply(certificates=7)

    async def leave(self, now: bool) -> None:
        self.left.append(now)


class GrowingSource(Source):
    """A daemon that settles a slot between any two looks; every third one late, after two younger ones."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = 0

    def status(self, since_slot: int) -> control_pb2.StatusReply:
        self.looks += 1
        settled = [1, 2, 0, 4, 5, 3, 7, 8, 6][: 3 + self.looks]
        slots = [control_pb2.SlotRecord(slot=slot) for slot in settled if slot >= since_slot]
        return control_pb2.StatusReply(state="training", slot=self.looks, slots=slots)


class BrokenSource(Source):
    def status(self, since_slot: int) -> control_pb2.StatusReply:
        raise ZeroDivisionError("a bug of ours")


async def use(path: Path) -> None:
    """Every call once, as the command line makes them: from another thread, with the synchronous client."""
    source, client = Source(), ControlClient(path)
    async with ControlServer(path, source):
        status = await asyncio.to_thread(client.status, 1)
        assert [record.slot for record in status.slots] == [1, 2]
        assert status.state == "training"
        assert dict(status.refused) == {"replayed": 2}
        assert not status.HasField("train_loss")
        peers = await asyncio.to_thread(client.peers)
        assert [(peer.peer_id, peer.rtt_s) for peer in peers.peers] == [("12D3KooW", 0.25)]
        await asyncio.to_thread(client.pause, 60.0, True)
        assert source.paused == [(60.0, True)]
        assert [reason.code for reason in (await asyncio.to_thread(client.resume)).reasons] == ["battery_low"]
        assert (await asyncio.to_thread(client.reachability)).reachability == "public"
        assert (await asyncio.to_thread(client.contributions)).certificates == 7
        with pytest.raises(ConfigError, match="a pause lasts from 0 to "):
            await asyncio.to_thread(client.pause, -1.0)
        with pytest.raises(ConfigError):
            await asyncio.to_thread(client.pause, PAUSE_S_MAX + 1.0)
        with pytest.raises(ConfigError):
            await asyncio.to_thread(client.pause, float("nan"))
        assert source.paused == [(60.0, True)]
        await asyncio.to_thread(client.leave, True)
        await asyncio.to_thread(client.leave)
        assert source.left == [True, False]
    with pytest.raises(NotRunning):
        await asyncio.to_thread(client.status)


async def test_every_call_answers(tmp_path: Path) -> None:
    await use(tmp_path / "control.sock")


def test_every_call_answers_under_uvloop(tmp_path: Path) -> None:
    uvloop.run(use(tmp_path / "control.sock"))


async def watch(path: Path) -> None:
    """Each slot comes once, also one that is settled late; then the client ends it, then the server does."""
    source, client = GrowingSource(), ControlClient(path)
    async with ControlServer(path, source):
        idle = asyncio.all_tasks()

        def look(since_slot: int) -> list[list[int]]:
            seen: list[list[int]] = []
            cancels: list[Callable[[], object]] = []
            for reply in client.watch(since_slot, 0.1, cancels.append):
                seen.append([record.slot for record in reply.slots])
                if len(seen) == 3:
                    cancels[0]()
            return seen

        assert await asyncio.to_thread(look, 0) == [[1, 2, 0, 4], [5], [3]]
        source.looks = 0
        assert await asyncio.to_thread(look, 2) == [[2, 4], [5], [3]]
        # The server learns of the end in its own time; gRPC's wait for the next call is none of ours.
        if serving := {task for task in asyncio.all_tasks() - idle if "_request_registered_call" not in repr(task)}:
            _, endless = await asyncio.wait(serving, timeout=60)
            assert not endless
        assert source.looks == 3

        first = asyncio.Event()
        loop = asyncio.get_running_loop()

        def look_on() -> int:
            count = 0
            for _ in client.watch(period_s=3600.0):
                count += 1
                loop.call_soon_threadsafe(first.set)
            return count

        watching = asyncio.create_task(asyncio.to_thread(look_on))
        await first.wait()
    assert await watching == 1  # it did not wait for its hour


async def test_watch(tmp_path: Path) -> None:
    await watch(tmp_path / "control.sock")


def test_watch_under_uvloop(tmp_path: Path) -> None:
    uvloop.run(watch(tmp_path / "control.sock"))


@pytest.mark.parametrize("json_wanted", [False, True])
async def test_watching_without_a_terminal(
    tmp_path: Path, json_wanted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line per reply, and a sentence when the daemon stops."""
    asked = asyncio.Event()

    class Asked(Source):
        def status(self, since_slot: int) -> control_pb2.StatusReply:
            asked.set()
            return super().status(since_slot)

    arguments = ["status", "--watch", "--state-dir", str(tmp_path), *(["--json"] if json_wanted else [])]
    async with ControlServer(tmp_path / "control.sock", Asked()):
        watching = asyncio.create_task(asyncio.to_thread(main, arguments))
        await asked.wait()
    assert await watching == 9
    shown = capsys.readouterr()
    [line] = shown.out.splitlines()
    if json_wanted:
        assert [record["slot"] for record in json.loads(line)["slots"]] == [0, 1, 2]
    else:
        assert line.startswith("training, slot 3, no loss yet, ")
        assert "3 won" in line
    assert shown.err == (
        f"braniac-node: the daemon on {tmp_path}/control.sock has stopped: start it again with 'braniac-node join'\n"
    )


def test_nobody_to_watch_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match="no daemon answers on "):
        next(ControlClient(tmp_path / "control.sock").watch())


async def test_a_path_with_odd_characters_is_taken_literally(tmp_path: Path) -> None:
    odd = tmp_path / "50%25 of #a ?b"
    odd.mkdir()
    await use(odd / "control.sock")


async def test_only_the_owner_can_open_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    before = os.umask(0)
    try:
        async with ControlServer(path, Source()):
            assert path.stat().st_mode & 0o777 == 0o600
            assert os.umask(0) == 0  # and nothing else is made with the narrow mask
    finally:
        os.umask(before)


async def test_a_stale_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with ControlServer(path, Source()):
        with pytest.raises(AlreadyRunning, match="stop it"):
            await ControlServer(path, Source()).start()
        assert (await asyncio.to_thread(ControlClient(path).status)).slot == 3


async def test_a_path_that_cannot_be_a_socket_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ResourceError, match="in the way"):
        await ControlServer(tmp_path / "file", Source()).start()
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(ResourceError, match="cannot open"):
        await ControlServer(tmp_path / "absent" / "control.sock", Source()).start()
    long = tmp_path / ("x" * PATH_BYTES_MAX)
    with pytest.raises(ResourceError, match="shorter --state-dir"):
        await ControlServer(long, Source()).start()
    with pytest.raises(ResourceError, match="shorter --state-dir"):
        ControlClient(long).status()


async def test_the_longest_path_that_fits_works(tmp_path: Path) -> None:
    room = PATH_BYTES_MAX - len(os.fsencode(tmp_path)) - 1
    if room < 1:
        pytest.skip("the temporary directory's own path is too long")
    await use(tmp_path / ("x" * room))


def test_no_daemon_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with pytest.raises(NotRunning, match="no daemon answers on "):
        ControlClient(path).status()
    with socket.socket(socket.AF_UNIX) as mute:  # takes the connection and never says a word
        mute.bind(str(path))
        mute.listen()
        with pytest.raises(NotRunning):
            ControlClient(path, answer_s_max=0.05).peers()


async def test_a_bug_in_the_daemon_reaches_the_client_as_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with ControlServer(path, BrokenSource()):
        with pytest.raises(NodeError, match="see its log") as caught:
            await asyncio.to_thread(ControlClient(path).status)
        assert not isinstance(caught.value, NotRunning)
        assert (await asyncio.to_thread(ControlClient(path).peers)).peers


async def test_health_and_reflection(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    async with ControlServer(path, Source()), grpc.aio.insecure_channel(f"unix:{path}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        asked = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        listed = [
            service.name
            async for reply in reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(asked)
            for service in reply.list_services_response.service
        ]
        assert SERVICE == "braniac.control.v1.Control"
        assert set(listed) == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}


async def health_is_watched(path: Path) -> None:
    server = ControlServer(path, Source())
    await server.start()
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        call = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        seen = [(await call.read()).status]
        stopping = asyncio.create_task(server.stop())
        seen.append((await call.read()).status)
        call.cancel()
        await stopping
    assert seen == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]


async def test_health_can_be_watched(tmp_path: Path) -> None:
    await health_is_watched(tmp_path / "control.sock")


def test_health_can_be_watched_under_uvloop(tmp_path: Path) -> None:
    uvloop.run(health_is_watched(tmp_path / "control.sock"))


async def test_stopping_twice_is_harmless(tmp_path: Path) -> None:
    server = ControlServer(tmp_path / "control.sock", Source())
    await server.stop()
    await server.start()
    await server.stop()
    await server.stop()


def test_generated_files_are_current(tmp_path: Path) -> None:
    """What `scripts/proto.sh` makes of the .proto files is what is committed, byte for byte."""
    subprocess.run(
        ["scripts/proto.sh", str(tmp_path)], cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, check=True
    )
    made = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert {path.name for path in made} >= {"control_pb2.py", "control_pb2.pyi", "control_pb2_grpc.py"}
    for path in made:
        assert (ROOT / path.relative_to(tmp_path / "braniac")).read_bytes() == path.read_bytes(), path.name
