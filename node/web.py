"""A page for people on this machine: what `status --watch` shows, and the buttons for `pause` and `resume`.

Whatever site its owner opens can make the browser send requests to this port, and any name can be made to mean
127.0.0.1. So the Host must be ours, a script of another site gets no answer, and what changes something needs a token
that only our own page holds. Other users of this machine can read the page, as they can read the metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from importlib import resources
from urllib.parse import parse_qs

import h11
import pydantic

from braniac.node.bounded_server import EXCHANGE_S_MAX, REQUEST_BYTES_MAX, BoundedServer
from braniac.node.commands import json_text, message_dict
from braniac.node.control import NO_SLOTS, PAUSE_S_MAX, ControlSource
from braniac.node.control_pb2 import StatusReply

HOST = "127.0.0.1"
BODY_BYTES_MAX = 1 << 12
WATCHERS_MAX = 8
WATCH_S = 1.0
SLOTS_SHOWN = 512  # with which a page begins; what it draws is not wider
TOKEN_HEADER = "x-braniac-token"

_SLOTS_AGAIN = 16  # a slot may be settled after a later one, and its traffic is known only when it is over
_READ_BYTES = 1 << 12
_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
_HEADERS = {
    "Cache-Control": "no-store",
    "Connection": "close",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]  # names in lower case
    body: bytes


@dataclass(frozen=True)
class _Answer:
    body: str
    content_type: str = _JSON
    headers: Mapping[str, str] | None = None


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, why: str, **headers: str) -> None:
        super().__init__(f"{why}\n")
        self.status = status
        self.headers = headers


class _PauseBody(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    seconds: float = pydantic.Field(default=0.0, ge=0, le=PAUSE_S_MAX, allow_inf_nan=False)
    finish: bool = False


class WebServer(BoundedServer):
    """Serves the page and what it asks for, between `start` and `stop` or as `async with`."""

    SUBJECT = "the web page"
    PORT_OPTION = "--set web.port"

    def __init__(
        self,
        source: ControlSource,
        port: int = 0,
        *,
        exchange_s_max: float = EXCHANGE_S_MAX,
        watch_s: float = WATCH_S,
        new_secret: Callable[[], str] = secrets.token_urlsafe,
    ) -> None:
        """`watch_s` is the time between two looks at the status while somebody watches."""
        super().__init__(HOST, port, exchange_s_max)
        self._source = source
        self._watch_s = watch_s
        self._new_secret = new_secret
        self._token = new_secret()
        self._page = resources.files("braniac.node").joinpath("web_page.html").read_text(encoding="utf-8")
        self._watchers = 0

    @property
    def url(self) -> str:
        """Where a browser finds the page, after `start`."""
        return f"http://{self.host}:{self.port}/"

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_BYTES_MAX)
        try:
            async with asyncio.timeout(self._exchange_s_max):
                request = await _read(connection, reader)
            self._check_sender(request)
            if (request.method, request.path) == ("GET", "/api/watch"):
                await self._watch(connection, reader, writer)
                return
            answer, status = await self._answer(request), HTTPStatus.OK
        except _Refused as refusal:
            answer, status = _Answer(str(refusal), _TEXT, refusal.headers), refusal.status
        async with asyncio.timeout(self._exchange_s_max):
            body = answer.body.encode()
            writer.write(_head(connection, status, answer, len(body)))
            with contextlib.suppress(h11.LocalProtocolError):  # the answer to HEAD has no body
                writer.write(connection.send(h11.Data(data=body)) or b"")
            await writer.drain()
            writer.close()
            await writer.wait_closed()

    # --- who may ask -------------------------------------------------------------------------------------------------

    def _check_sender(self, request: _Request) -> None:
        """Raises _Refused for what does not come from our own page or from a program on this machine."""
        names = [f"{name}:{self.port}" for name in (HOST, "localhost", "[::1]")]
        host = request.headers.get("host", "")
        if host not in names:
            raise _Refused(HTTPStatus.FORBIDDEN, f"this page is at {self.url} and has no other name")
        origin = request.headers.get("origin")
        if origin not in (None, f"http://{host}"):
            raise _Refused(HTTPStatus.FORBIDDEN, "another site may not ask this node")
        site = request.headers.get("sec-fetch-site", "none")  # browsers say so even where they send no Origin
        if request.path != "/" and site not in ("same-origin", "none"):
            raise _Refused(HTTPStatus.FORBIDDEN, "another site may not ask this node")
        if request.method != "POST":
            return
        token = request.headers.get(TOKEN_HEADER, "")
        if origin is None or not secrets.compare_digest(token.encode(), self._token.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN, "this needs the token of the page: reload it")
        if request.headers.get("content-type") != _JSON:
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"send {_JSON}")

    # --- what is answered --------------------------------------------------------------------------------------------

    async def _answer(self, request: _Request) -> _Answer:
        match request.method, request.path:
            case "GET", "/":
                return self._fresh_page()
            case "GET", "/api/status":
                return _Answer(await _json(self._source.status(_since_slot(request))))
            case "POST", "/api/pause":
                try:
                    wanted = _PauseBody.model_validate_json(request.body)
                except pydantic.ValidationError:
                    raise _Refused(
                        HTTPStatus.BAD_REQUEST,
                        f'send {{"seconds": 0 to {PAUSE_S_MAX}, "finish": true or false}}; 0 is until resumed',
                    ) from None
                self._source.pause(wanted.seconds, wanted.finish)
                return _Answer("{}")
            case "POST", "/api/resume":
                return _Answer(json_text(message_dict(self._source.resume())))
            case _, "/" | "/api/status" | "/api/watch":
                raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, "only GET", Allow="GET")
            case _, "/api/pause" | "/api/resume":
                raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED, "only POST", Allow="POST")
        raise _Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _fresh_page(self) -> _Answer:
        nonce = self._new_secret()
        text = self._page.replace("{{nonce}}", nonce).replace("{{token}}", self._token)
        return _Answer(text, "text/html; charset=utf-8", {"Content-Security-Policy": _POLICY.format(nonce=nonce)})

    async def _watch(
        self, connection: h11.Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """The status again and again as server-sent events, with those slots that are new or have changed."""
        if self._watchers >= WATCHERS_MAX:
            raise _Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"{WATCHERS_MAX} pages watch already: close one")
        self._watchers += 1
        try:
            writer.write(_head(connection, HTTPStatus.OK, _Answer("", "text/event-stream"), None))
            since_slot = max(0, self._source.status(NO_SLOTS).slot - SLOTS_SHOWN)
            told: dict[int, bytes] = {}
            while not reader.at_eof():
                reply = self._source.status(since_slot)
                newest = max(reply.slot, *(record.slot for record in reply.slots), 0)
                since_slot = max(since_slot, newest - _SLOTS_AGAIN)
                _keep_news(reply, told, since_slot)
                text = await _json(reply)
                writer.write(connection.send(h11.Data(data=f"data: {text}\n\n".encode())) or b"")
                async with asyncio.timeout(self._exchange_s_max):
                    await writer.drain()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._watch_s):
                        await reader.read(1)  # nothing comes until the page goes away
        finally:
            self._watchers -= 1


def _keep_news(reply: StatusReply, told: dict[int, bytes], since_slot: int) -> None:
    """Take from a reply what the watcher knows, and what no page shows."""
    fresh = [record for record in reply.slots if told.get(record.slot) != record.SerializeToString()]
    told.update((record.slot, record.SerializeToString()) for record in fresh)
    for slot in [slot for slot in told if slot < since_slot]:
        del told[slot]
    del reply.slots[:]
    reply.slots.extend(fresh)
    del reply.digests[:]


async def _json(reply: StatusReply) -> str:
    """In a thread: thousands of slots take longer than the event loop may wait."""
    return await asyncio.to_thread(lambda: json_text(message_dict(reply)))


def _since_slot(request: _Request) -> int:
    [*_, text] = request.query.get("since_slot", ["0"])
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise _Refused(HTTPStatus.BAD_REQUEST, "since_slot is a slot's number")
    return int(text)


async def _read(connection: h11.Connection, reader: asyncio.StreamReader) -> _Request:
    """One request. Raises _Refused for what is none, or is too large."""
    head: h11.Request | None = None
    body = b""
    while True:
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError as error:
            raise _Refused(HTTPStatus(error.error_status_hint), str(error)) from None
        match event:
            case h11.NEED_DATA:
                connection.receive_data(await reader.read(_READ_BYTES))
            case h11.Request():
                head = event
            case h11.Data():
                body += event.data
                if len(body) > BODY_BYTES_MAX:
                    raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"at most {BODY_BYTES_MAX} bytes")
            case h11.EndOfMessage():
                assert head is not None
                path, _, query = head.target.decode("latin-1").partition("?")
                headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
                return _Request(head.method.decode("latin-1"), path, parse_qs(query), headers, body)
            case _:
                raise ConnectionError("it went away before it had asked")


def _head(connection: h11.Connection, status: HTTPStatus, answer: _Answer, length: int | None) -> bytes:
    headers = {**_HEADERS, "Content-Type": answer.content_type, **(answer.headers or {})}
    if length is not None:
        headers["Content-Length"] = str(length)
    fields = [(name.encode(), value.encode()) for name, value in headers.items()]
    response = h11.Response(status_code=status.value, reason=status.phrase.encode(), headers=fields)
    return connection.send(response) or b""
