"""A small HTTP/1.1 server in the daemon's own event loop: GET or HEAD of /metrics, /healthz and /readyz, and no more.

One request per connection, bounded in size, time and number, so nobody who reaches the port can hold us up.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from types import TracebackType
from typing import Self

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from braniac.node.errors import ResourceError
from braniac.node.metrics import Metrics

REQUEST_BYTES_MAX = 1 << 13
CONNECTIONS_MAX = 32
EXCHANGE_S_MAX = 5.0

_TEXT = "text/plain; charset=utf-8"


class MetricsServer:
    """Serves `metrics` on host and port (0: any free one), between `start` and `stop` or as `async with`."""

    def __init__(
        self, metrics: Metrics, host: str = "127.0.0.1", port: int = 0, exchange_s_max: float = EXCHANGE_S_MAX
    ) -> None:
        self.host = host
        self.port = port  # the real one after `start`
        self._metrics = metrics
        self._exchange_s_max = exchange_s_max
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def start(self) -> None:
        """Listen. Raises ResourceError if the address cannot be had."""
        try:
            self._server = await asyncio.start_server(self._serve, self.host, self.port, limit=REQUEST_BYTES_MAX)
        except OSError as error:
            raise ResourceError(
                f"cannot serve metrics on {self.host} port {self.port} ({error.strerror or error}): "
                "choose another --metrics-port, 0 for any free one"
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and cut open connections. Harmless when repeated."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
            for writer in self._connections.values():
                writer.transport.abort()
            await asyncio.gather(*self._connections)
            await server.wait_closed()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        try:
            if len(self._connections) <= CONNECTIONS_MAX:
                async with asyncio.timeout(self._exchange_s_max):
                    writer.write(await self._answer(reader))
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        except (TimeoutError, ConnectionError):
            pass  # a slow or vanished client is not worth a line in the log
        finally:
            writer.transport.abort()
            del self._connections[task]

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return _response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        except asyncio.IncompleteReadError:
            return _response(HTTPStatus.BAD_REQUEST)
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response(HTTPStatus.BAD_REQUEST)
        method, target, _ = words
        if method not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED)
        return self._page(target.split(b"?", 1)[0], with_body=method == b"GET")

    def _page(self, path: bytes, *, with_body: bool) -> bytes:
        match path:
            case b"/metrics":
                return _response(
                    HTTPStatus.OK, self._metrics.exposition(), CONTENT_TYPE_PLAIN_0_0_4, with_body=with_body
                )
            case b"/healthz":  # that this line runs is the whole answer
                return _response(HTTPStatus.OK, b"alive\n", with_body=with_body)
            case b"/readyz":
                status = HTTPStatus.OK if self._metrics.ready else HTTPStatus.SERVICE_UNAVAILABLE
                return _response(status, f"{self._metrics.state}\n".encode(), with_body=with_body)
            case _:
                return _response(HTTPStatus.NOT_FOUND, with_body=with_body)


def _response(status: HTTPStatus, body: bytes = b"", content_type: str = _TEXT, *, with_body: bool = True) -> bytes:
    body = body or f"{status.phrase}\n".encode()
    allow = "Allow: GET, HEAD\r\n" if status is HTTPStatus.METHOD_NOT_ALLOWED else ""
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n{allow}"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("ascii") + (body if with_body else b"")
