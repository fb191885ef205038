"""The web page's server, asked over real sockets: what it answers, whom it refuses, and that nobody can hold it up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvloop

from braniac.node import control_pb2 as pb
from braniac.node.bounded_server import REQUEST_BYTES_MAX
from braniac.node.control import PAUSE_S_MAX
from braniac.node.errors import ResourceError
from braniac.node.web import BODY_BYTES_MAX, SLOTS_SHOWN, WATCHERS_MAX, WebServer

TOKEN = "token-1"


class Source:
    """A node that does what it is told and remembers it."""

    def __init__(self) -> None:
        self.reply = pb.StatusReply(state="training", slot=3, train_loss=2.5)
        self.reply.digests.add(fragment=1, digest=b"x" * 32)
        self.reply.slots.extend(record(slot) for slot in range(3))
        self.asked: list[int] = []
        self.told: list[object] = []

    def status(self, since_slot: int) -> pb.StatusReply:
        self.asked.append(since_slot)
        reply = pb.StatusReply()
        reply.CopyFrom(self.reply)
        del reply.slots[:]
        reply.slots.extend(record for record in self.reply.slots if record.slot >= since_slot)
        return reply

    def peers(self) -> pb.PeersReply:
        raise NotImplementedError

    def pause(self, seconds: float, finish: bool) -> None:
        self.told.append((seconds, finish))

    def resume(self) -> pb.ResumeReply:
        self.told.append("resume")
        return pb.ResumeReply(reasons=[pb.Reason(code="on_battery", sentence="on battery")])

    async def reachability(self) -> pb.ReachabilityReply:
        raise NotImplementedError

    def contributions(self) -> pb.ContributionsReply:
        raise NotImplementedError

    async def leave(self, now: bool) -> None:
        raise NotImplementedError


def record(slot: int, **fields: Any) -> pb.SlotRecord:
    return pb.SlotRecord(slot=slot, outcome="merged", certificate=bytes([slot % 256]) * 32, loss=2.0 + slot, **fields)


def new_server(source: Source, **options: Any) -> WebServer:
    counter = itertools.count(1)
    return WebServer(source, new_secret=lambda: f"token-{next(counter)}", **{"watch_s": 0.01} | options)


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
async def server(source: Source) -> AsyncIterator[WebServer]:
    async with new_server(source) as server:
        yield server


def request(server: WebServer, method: str, path: str, body: bytes = b"", **headers: str | None) -> bytes:
    """What a browser on our page sends; a keyword replaces a header, None leaves it out."""
    home = f"127.0.0.1:{server.port}"
    fields: dict[str, str | None] = {"host": home}
    if method == "POST":
        fields |= {"origin": f"http://{home}", "content-type": "application/json", "x-braniac-token": TOKEN}
        fields |= {"content-length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items() if value is not None)]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def ask(server: WebServer, data: bytes) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of one exchange."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(data)
    reply = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, body = reply.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}, body.decode()


async def get(server: WebServer, path: str, **headers: str | None) -> tuple[int, dict[str, str], str]:
    return await ask(server, request(server, "GET", path, **headers))


class Watcher:
    """A connection to /api/watch."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, server: WebServer) -> Watcher:
        watcher = cls(*await asyncio.open_connection("127.0.0.1", server.port))
        watcher.writer.write(request(server, "GET", "/api/watch"))
        return watcher

    async def head(self) -> str:
        return (await self.reader.readuntil(b"\r\n\r\n")).decode()

    async def event(self) -> dict[str, Any]:
        """The next event, a chunk of its own."""
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        data = (await self.reader.readexactly(size + 2)).decode()
        assert data.startswith("data: ")
        assert data.endswith("\n\n\r\n")
        return dict(json.loads(data[6:]))

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


# --- what it answers -------------------------------------------------------------------------------------------------


async def look_at_the_page() -> None:
    async with new_server(Source()) as server:
        status, headers, page = await get(server, "/")
        assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
        assert f'<meta name="token" content="{TOKEN}">' in page
        assert "{{" not in page
        policy = headers["content-security-policy"]
        [nonce] = set(re.findall(r'nonce="([^"]+)"', page))
        assert nonce != TOKEN
        assert f"script-src 'nonce-{nonce}';" in policy
        assert policy.startswith("default-src 'none';")
        assert "frame-ancestors 'none'" in policy
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers
        _, headers, _ = await get(server, "/")
        assert nonce not in headers["content-security-policy"]  # another one for each page


async def test_the_page() -> None:
    await look_at_the_page()


def test_the_page_under_uvloop() -> None:
    uvloop.run(look_at_the_page())


async def test_the_page_needs_nothing_from_elsewhere(server: WebServer) -> None:
    _, _, page = await get(server, "/")
    links = re.findall(r"""(?:src|href|url|import|action)\s*[=(]\s*["']?([^"')\s>]+)""", page)
    assert [link for link in links if not link.startswith("data:")] == []
    assert re.findall(r"https?://[^\s\"'<]+", page.replace("http://www.w3.org/2000/svg", "")) == []
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=\"", page)
    ids = set(re.findall(r'\bid="([^"]+)"', page))
    assert set(re.findall(r'\$\("([^"]+)"\)', page)) <= ids
    for control in re.findall(r"<(?:button|input)[^>]*>", page):
        assert "button" in control or re.search(rf"<label>{re.escape(control)} \w+", page), control


async def test_status_is_what_the_control_api_says(server: WebServer, source: Source) -> None:
    status, headers, body = await get(server, "/api/status")
    assert (status, headers["content-type"]) == (200, "application/json")
    found = json.loads(body)
    assert (found["state"], found["train_loss"], found["run_id"]) == ("training", 2.5, "")
    assert [r["slot"] for r in found["slots"]] == [0, 1, 2]
    assert found["digests"][0]["digest"] == (b"x" * 32).hex()
    assert [r["slot"] for r in json.loads((await get(server, "/api/status?since_slot=2"))[2])["slots"]] == [2]
    for wrong in ("-1", "x", "1" * 30, "%C2%B2"):
        assert (await get(server, f"/api/status?since_slot={wrong}"))[0] == 400
    assert source.asked == [0, 2]


async def test_pause_and_resume(server: WebServer, source: Source) -> None:
    for body, told in [
        (b'{"seconds": 3600, "finish": true}', (3600.0, True)),
        (b"{}", (0.0, False)),
        (b'{"seconds": 0.5}', (0.5, False)),
    ]:
        assert (await ask(server, request(server, "POST", "/api/pause", body)))[::2] == (200, "{}")
        assert source.told.pop() == told
    status, _, answer = await ask(server, request(server, "POST", "/api/resume", b"{}"))
    assert (status, json.loads(answer)["reasons"][0]["code"]) == (200, "on_battery")
    assert source.told == ["resume"]


async def test_a_pause_that_makes_no_sense(server: WebServer, source: Source) -> None:
    for body in (
        b"", b"[]", b"null", b"\xff", b'{"seconds": -1}', b'{"seconds": "60"}', b'{"seconds": NaN}',
        b'{"seconds": true}', b'{"finish": 1}', b'{"second": 60}', b'{"seconds": %d}' % (PAUSE_S_MAX + 1),
        b'{"seconds": Infinity}', b"[" * 2000,
    ):  # fmt: skip
        status, _, answer = await ask(server, request(server, "POST", "/api/pause", body))
        assert (status, answer[:8]) == (400, 'send {"s'), body[:40]
    assert source.told == []


async def test_watching_tells_each_slot_once(server: WebServer, source: Source) -> None:
    watcher = await Watcher.open(server)
    head = await watcher.head()
    assert head.startswith("HTTP/1.1 200 OK\r\n")
    assert "text/event-stream" in head
    first = await watcher.event()
    assert [r["slot"] for r in first["slots"]] == [0, 1, 2]
    assert first["digests"] == []
    assert (await watcher.event())["slots"] == []
    source.reply.slots.append(record(4))  # a later slot may be settled first
    assert await slots_of(watcher) == [4]
    source.reply.slots.append(record(3))
    assert await slots_of(watcher) == [3]
    source.reply.slots[3].bytes_sent = 7  # its traffic is known when it is over
    assert await slots_of(watcher) == [4]
    await watcher.close()


async def slots_of(watcher: Watcher) -> list[int]:
    """Slots of the next event that has any."""
    while not (slots := [r["slot"] for r in (await watcher.event())["slots"]]):
        pass
    return slots


async def test_watching_begins_with_as_many_slots_as_are_drawn(server: WebServer, source: Source) -> None:
    source.reply.slot = 3000
    del source.reply.slots[:]
    source.reply.slots.extend(record(slot) for slot in range(3000))
    watcher = await Watcher.open(server)
    await watcher.head()
    assert len((await watcher.event())["slots"]) == SLOTS_SHOWN
    assert (await watcher.event())["slots"] == []
    await watcher.close()


# --- whom it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.:{port}"]
)
async def test_another_name_is_refused(server: WebServer, source: Source, host: str) -> None:
    name = host.format(port=server.port)
    for path in ("/", "/api/status", "/api/watch"):
        assert (await get(server, path, host=name))[0] == 403
    rebound = request(server, "POST", "/api/pause", b"{}", host=name, origin=f"http://{name}")
    assert (await ask(server, rebound))[0] == 403
    assert source.told == []


@pytest.mark.parametrize("host", ["localhost:{port}", "[::1]:{port}"])
async def test_our_own_names_are_served(server: WebServer, source: Source, host: str) -> None:
    name = host.format(port=server.port)
    assert (await get(server, "/", host=name))[0] == 200
    told = await ask(server, request(server, "POST", "/api/pause", b"{}", host=name, origin=f"http://{name}"))
    assert told[0] == 200
    assert source.told == [(0.0, False)]


async def test_what_another_site_sends_is_refused(server: WebServer, source: Source) -> None:
    home = f"127.0.0.1:{server.port}"
    for changed in (
        {"x_braniac_token": None}, {"x_braniac_token": ""}, {"x_braniac_token": "token-2"}, {"x_braniac_token": "ü"},
        {"origin": None}, {"origin": "null"}, {"origin": "http://evil.example"}, {"origin": f"https://{home}"},
        {"origin": f"http://localhost:{server.port}"}, {"origin": "http://127.0.0.1:1"},
        {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"},
    ):  # fmt: skip
        for path in ("/api/pause", "/api/resume"):
            assert (await ask(server, request(server, "POST", path, b"{}", **changed)))[0] == 403, changed
    form = request(server, "POST", "/api/pause", b"{}", content_type="application/x-www-form-urlencoded")
    assert (await ask(server, form))[0] == 415
    for path in ("/api/status", "/api/watch"):
        assert (await get(server, path, origin="http://evil.example"))[0] == 403
        assert (await get(server, path, sec_fetch_site="cross-site"))[0] == 403
    assert (await get(server, "/", sec_fetch_site="cross-site"))[0] == 200  # a link to the page may be anywhere
    assert source.told == []
    assert source.asked == []


async def test_another_start_has_another_token(source: Source) -> None:
    async with WebServer(source) as server:
        [first] = re.findall(r'name="token" content="([^"]+)"', (await get(server, "/"))[2])
    async with WebServer(source) as server:
        [second] = re.findall(r'name="token" content="([^"]+)"', (await get(server, "/"))[2])
        assert len(first) >= 43
        assert first != second
        assert (await ask(server, request(server, "POST", "/api/pause", b"{}", x_braniac_token=first)))[0] == 403
        assert (await ask(server, request(server, "POST", "/api/pause", b"{}", x_braniac_token=second)))[0] == 200


async def test_everything_else_is_refused(server: WebServer) -> None:
    for data, expected in [
        (request(server, "GET", "/secret"), 404),
        (request(server, "GET", "//["), 404),
        (request(server, "GET", "/api/pause"), 405),
        (request(server, "POST", "/api/status"), 405),
        (request(server, "HEAD", "/"), 405),
        (request(server, "OPTIONS", "/api/pause", origin="http://evil.example"), 403),
        (request(server, "GET", "/", host=None), 400),
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x00\xff\r\n\r\n", 400),
        (b"GET /" + b"x" * 2 * REQUEST_BYTES_MAX, 431),
    ]:
        status, headers, _ = await ask(server, data)
        assert status == expected, data[:40]
        assert ("allow" in headers) == (status == 405)
    assert (await get(server, "/"))[0] == 200


async def test_a_body_has_a_bound(server: WebServer, source: Source) -> None:
    inside = b'{"seconds": 1}'.ljust(BODY_BYTES_MAX)
    assert (await ask(server, request(server, "POST", "/api/pause", inside)))[0] == 200
    assert (await ask(server, request(server, "POST", "/api/pause", inside + b" ")))[0] == 413
    chunk = b"%x\r\n%s\r\n" % (BODY_BYTES_MAX + 1, inside + b" ")
    head = request(server, "POST", "/api/pause", content_length=None, transfer_encoding="chunked")
    assert (await ask(server, head + chunk))[0] == 413  # it did not wait for the end
    assert source.told == [(1.0, False)]


# --- who is slow, and who goes ---------------------------------------------------------------------------------------


async def cut_off(reader: asyncio.StreamReader) -> bool:
    """Whether the server ends the connection, by an end of file or a reset."""
    try:
        while await reader.read(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


async def test_a_silent_client_is_cut_off(source: Source) -> None:
    async with new_server(source, exchange_s_max=0.05) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET / HT")
        assert await cut_off(reader)
        writer.close()


async def test_a_watcher_that_does_not_read_holds_up_nobody(source: Source) -> None:
    async with new_server(source, exchange_s_max=0.2, watch_s=0.001) as server:
        source.reply.state_reason = "x" * 1_000_000  # more than the sockets between us hold
        slow = await Watcher.open(server)
        await slow.head()  # it reads no further
        source.reply.state_reason = ""
        other = await Watcher.open(server)
        await other.head()
        for _ in range(3):
            assert (await other.event())["state"] == "training"
        assert (await get(server, "/api/status"))[0] == 200
        source.reply.state_reason = "x" * 1_000_000
        while server._watchers > 1:  # the other one reads
            await other.event()
        assert await cut_off(slow.reader)
        await slow.close()
        await other.close()


async def test_watchers_are_bounded_and_forgotten(server: WebServer) -> None:
    watchers = [await Watcher.open(server) for _ in range(WATCHERS_MAX)]
    for watcher in watchers:
        await watcher.head()
    status, _, words = await get(server, "/api/watch")
    assert (status, words) == (503, f"{WATCHERS_MAX} pages watch already: close one\n")
    for watcher in watchers:
        await watcher.close()
    while (again := await Watcher.open(server)) and "503" in await again.head():
        await again.close()  # the server learns of the others' closing in its own time
    await again.close()


async def test_stopping_cuts_watchers(source: Source) -> None:
    server = new_server(source, watch_s=3600.0)
    await server.start()
    watcher = await Watcher.open(server)
    await watcher.head()
    await watcher.event()
    await server.stop()
    assert await cut_off(watcher.reader)
    await watcher.close()
    with pytest.raises(ConnectionError):
        await asyncio.open_connection("127.0.0.1", server.port)


async def test_a_port_in_use_is_a_sentence(server: WebServer, source: Source) -> None:
    with pytest.raises(ResourceError, match=f"the web page on 127.0.0.1 port {server.port} .*choose another --set web"):
        await new_server(source, port=server.port).start()
