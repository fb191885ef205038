"""A small HTTP/1.1 server in the daemon's own event loop: GET or HEAD of /metrics, /healthz, /readyz; nothing else."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from braniac.node.bounded_server import EXCHANGE_S_MAX, BoundedServer
from braniac.node.metrics import BaseMetrics

_TEXT = "text/plain; charset=utf-8"


class MetricsServer(BoundedServer):
    """Serves `metrics`, one request per connection."""

    SUBJECT = "metrics"
    PORT_OPTION = "--metrics-port"

    def __init__(
        self, metrics: BaseMetrics, host: str = "127.0.0.1", port: int = 0, exchange_s_max: float = EXCHANGE_S_MAX
    ) -> None:
        super().__init__(host, port, exchange_s_max)
        self._metrics = metrics

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(self._exchange_s_max):
            writer.write(await self._answer(reader))
            await writer.drain()
            writer.close()
            await writer.wait_closed()

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
