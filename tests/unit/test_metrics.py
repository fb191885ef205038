"""The metrics: Prometheus' own linter, series that exist from the start, a small HTTP server, and the loop's lag."""

from __future__ import annotations

import asyncio
import shutil
import subprocess

import pytest
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from braniac.node.bounded_server import CONNECTIONS_MAX, REQUEST_BYTES_MAX
from braniac.node.clock import FakeClock
from braniac.node.errors import ResourceError
from braniac.node.metrics import EventLoopLag, Metrics
from braniac.node.metrics_server import MetricsServer
from braniac.protocol.errors import Refusal


def new_metrics() -> Metrics:
    return Metrics("1.2.3", 1)


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[str]], float]:
    """Every sample by its name and label values."""
    families = text_string_to_metric_families(metrics.exposition().decode())
    return {(s.name, frozenset(s.labels.values())): s.value for family in families for s in family.samples}


async def ask(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one exchange."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    reply = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, body = reply.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


def get(path: str, method: str = "GET") -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


async def cut_off(reader: asyncio.StreamReader) -> bool:
    """Whether the server ends the connection without a word, by an end of file or a reset."""
    try:
        return await reader.read() == b""
    except ConnectionError:
        return True


async def answers(port: int) -> bool:
    try:
        return (await ask(port, get("/healthz")))[0] == 200
    except (ConnectionError, IndexError):  # cut off
        return False


# Series


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_say() -> None:
    metrics = new_metrics()
    metrics.loss.labels("train").set(2.5)
    metrics.slot_phase_duration.labels("apply").observe(0.2)
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics.exposition(), capture_output=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_every_series_exists_from_the_start() -> None:
    found = samples(new_metrics())
    assert found["braniac_build_info", frozenset({"1.2.3", "1"})] == 1
    for refusal in Refusal:
        assert found["braniac_messages_refused_total", frozenset({refusal.value})] == 0
    for outcome in ("merged", "missed", "no_certificate"):
        assert found["braniac_slot_outcomes_total", frozenset({outcome})] == 0
    assert found["braniac_net_bytes_total", frozenset({"sent", "blob"})] == 0
    assert found["process_open_fds", frozenset()] > 0
    assert not [name for name, _ in found if name.endswith("_created")]
    assert {name for name, _ in found if not name.startswith(("braniac_", "process_"))} == set()


def test_the_state_is_one_hot() -> None:
    metrics = new_metrics()
    for state in Metrics.STATES:
        metrics.set_state(state)
        found = samples(metrics)
        assert metrics.state == state
        assert [s for s in Metrics.STATES if found["braniac_node_state", frozenset({s})] == 1] == [state]
    with pytest.raises(AssertionError):
        metrics.set_state("elsewhere")


def test_received_is_accepted_plus_refused() -> None:
    metrics = new_metrics()
    for _ in range(3):
        metrics.accept_message()
    metrics.refuse_message(Refusal.REPLAYED)
    found = samples(metrics)
    refused = sum(value for (name, _), value in found.items() if name == "braniac_messages_refused_total")
    accepted = found["braniac_messages_accepted_total", frozenset()]
    assert (accepted, refused) == (3, 1)
    assert found["braniac_messages_received_total", frozenset()] == accepted + refused
    assert found["braniac_messages_refused_total", frozenset({"replayed"})] == 1


def test_two_nodes_in_one_process_do_not_share() -> None:
    one, other = new_metrics(), new_metrics()
    one.slot.set(7)
    assert samples(other)["braniac_slot", frozenset()] == 0


# Server


async def use_server() -> None:
    metrics = new_metrics()
    async with MetricsServer(metrics) as server:
        assert server.port != 0
        status, headers, body = await ask(server.port, get("/metrics?x=1"))
        assert status == 200
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert int(headers["Content-Length"]) == len(body)
        assert b"braniac_slot 0.0\n" in body
        status, headers, body = await ask(server.port, get("/metrics", "HEAD"))
        assert (status, body) == (200, b"")
        assert int(headers["Content-Length"]) > 1000
        assert (await ask(server.port, get("/healthz")))[0] == 200
        assert (await ask(server.port, get("/readyz")))[::2] == (503, b"starting\n")
        metrics.set_state("training")
        assert (await ask(server.port, get("/readyz")))[::2] == (200, b"training\n")


async def test_the_three_pages() -> None:
    await use_server()


def test_the_three_pages_under_uvloop() -> None:
    uvloop.run(use_server())


async def test_everything_else_is_refused() -> None:
    async with MetricsServer(new_metrics()) as server:
        for request, expected in [
            (get("/"), 404),
            (get("/metrics/../secret"), 404),
            (get("/metrics", "POST"), 405),
            (b"nonsense\r\n\r\n", 400),
            (b"GET /metrics HTTP/1.1 extra\r\n\r\n", 400),
            (b"\x16\x03\x01\x00\xff\r\n\r\n", 400),
            (b"GET /" + b"x" * REQUEST_BYTES_MAX, 431),
        ]:
            assert (await ask(server.port, request))[0] == expected, request[:40]
        assert (await ask(server.port, get("/healthz")))[0] == 200


async def test_a_silent_client_is_cut_off() -> None:
    async with MetricsServer(new_metrics(), exchange_s_max=0.01) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /metrics HT")
        assert await cut_off(reader)
        writer.close()


async def test_connections_are_bounded() -> None:
    async with MetricsServer(new_metrics()) as server:
        idle = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(CONNECTIONS_MAX)]
        reader, extra = await asyncio.open_connection("127.0.0.1", server.port)
        assert await cut_off(reader)
        for writer in (extra, *(writer for _, writer in idle)):
            writer.close()
            await writer.wait_closed()
        while not await answers(server.port):  # the server learns of the closing in its own time
            pass


async def test_stopping_cuts_open_connections() -> None:
    server = MetricsServer(new_metrics())
    await server.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    await ask(server.port, get("/healthz"))  # so the idle connection has surely been accepted too
    await server.stop()
    await server.stop()
    assert await cut_off(reader)
    writer.close()
    with pytest.raises(ConnectionError):
        await asyncio.open_connection("127.0.0.1", server.port)


async def test_a_port_in_use_is_a_sentence() -> None:
    async with MetricsServer(new_metrics()) as server:
        with pytest.raises(ResourceError, match=f"port {server.port} .*choose another --metrics-port"):
            await MetricsServer(new_metrics(), port=server.port).start()


# Lag


async def test_the_lag_is_what_passes_beyond_the_sleep() -> None:
    """A fake clock oversleeps by 0 to 99 ms, in turn."""
    clock, metrics = FakeClock(), new_metrics()
    lags_s = iter([*(n / 1000 for n in range(100)), None])

    async def oversleep(delay_s: float) -> None:
        late_s = next(lags_s)
        if late_s is None:
            raise asyncio.CancelledError
        clock.advance(delay_s + late_s)

    lag = EventLoopLag(metrics.event_loop_lag, clock, oversleep)
    assert lag.quantile(0.99) == 0
    with pytest.raises(asyncio.CancelledError):
        await lag.run()
    assert lag.quantile(0) == pytest.approx(0, abs=1e-9)
    assert lag.quantile(0.5) == pytest.approx(0.050)
    assert lag.quantile(0.99) == pytest.approx(0.099)
    found = samples(metrics)
    assert found["braniac_event_loop_lag_seconds_count", frozenset()] == 100
    assert found["braniac_event_loop_lag_seconds_bucket", frozenset({"0.05"})] == pytest.approx(51, abs=1)


async def test_the_lag_keeps_a_bounded_number_of_samples() -> None:
    clock, turns = FakeClock(), iter(range(10_000))

    async def sleep(delay_s: float) -> None:
        if next(turns) == 9_000:
            raise asyncio.CancelledError
        clock.advance(delay_s + (0.5 if clock.monotonic() < 1050 else 0))

    lag = EventLoopLag(new_metrics().event_loop_lag, clock, sleep)
    with pytest.raises(asyncio.CancelledError):
        await lag.run()
    assert lag.quantile(1) == pytest.approx(0, abs=1e-9)  # the slow start is forgotten


async def test_a_node_at_rest_is_seldom_woken() -> None:
    clock, rests, delays_s = FakeClock(), [False], []

    async def sleep(delay_s: float) -> None:
        delays_s.append(delay_s)
        clock.advance(delay_s)
        rests[0] = len(delays_s) >= 2
        if len(delays_s) == 4:
            raise asyncio.CancelledError

    lag = EventLoopLag(new_metrics().event_loop_lag, clock, sleep, resting=lambda: rests[0])
    with pytest.raises(asyncio.CancelledError):
        await lag.run()
    assert delays_s[0] == delays_s[1] < 0.1
    assert delays_s[2] == delays_s[3] >= 1
    assert lag.quantile(1) == pytest.approx(0, abs=1e-9)
