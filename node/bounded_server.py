"""What our small HTTP servers share: listening in the daemon's own event loop, and bounds on who connects.

Connections are bounded in number and each serves one exchange, so nobody who reaches a port can hold us up.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from braniac.node.errors import ResourceError

REQUEST_BYTES_MAX = 1 << 13
CONNECTIONS_MAX = 32
EXCHANGE_S_MAX = 5.0


class BoundedServer(ABC):
    """Listens on host and port (0: any free one), between `start` and `stop` or as `async with`."""

    SUBJECT = "anything"
    """What it serves, for the sentence about a port that cannot be had."""
    PORT_OPTION = "port"
    """What chooses the port."""

    def __init__(self, host: str, port: int, exchange_s_max: float) -> None:
        self.host = host
        self.port = port  # the real one after `start`
        self._exchange_s_max = exchange_s_max
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def start(self) -> None:
        """Listen. Raises ResourceError if the address cannot be had."""
        try:
            self._server = await asyncio.start_server(self._serve, self.host, self.port, limit=REQUEST_BYTES_MAX)
        except OSError as error:
            raise ResourceError(
                f"cannot serve {self.SUBJECT} on {self.host} port {self.port} ({error.strerror or error}): "
                f"choose another {self.PORT_OPTION}, 0 for any free one"
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
                await self._exchange(reader, writer)
        except (TimeoutError, ConnectionError):
            pass  # a slow or vanished client is not worth a line in the log
        finally:
            writer.transport.abort()
            del self._connections[task]

    @abstractmethod
    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request. It ends soon after its connection is cut, and may raise TimeoutError."""
