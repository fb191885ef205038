"""Logging: readable lines or JSON lines on stderr, JSON lines in a file; stdout is for results.

structlog and the standard library's `logging` end in one handler, so hivemind's and grpc's warnings look like ours.
Code that logs says `log = structlog.get_logger(__name__)` and `log.info("slot", slot=7, loss=2.31)`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import queue
import sys
from collections.abc import Iterator, MutableMapping
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor

from braniac.node.failures import in_short


def configure_logging(
    level: Literal["debug", "info", "warning", "error"] = "info",
    format: Literal["auto", "console", "json"] = "auto",
    stream: TextIO | None = None,
) -> None:
    """Send our messages of at least `level`, and other libraries' warnings, to `stream` (default: stderr).

    "auto" and "console" write readable lines, with colours on a terminal; "json" writes one object per line. Calling it
    again replaces what was configured before.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_formatter(_json_tail() if format == "json" else _console_tail(colors=stream.isatty())))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("braniac").setLevel(level.upper())
    logging.captureWarnings(True)
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "WARNING")  # read when hivemind is imported; its p2pd heeds it too
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_shared(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def route_hivemind() -> None:
    """Let hivemind's messages through our handler: on import it installs one of its own. Call after importing it."""
    from hivemind.utils.logging import use_hivemind_log_handler  # heavy, and only the daemon has it loaded anyway

    use_hivemind_log_handler("nowhere")


@contextlib.contextmanager
def log_to_file(path: Path, bytes_max: int, files_kept: int) -> Iterator[None]:
    """Write what goes to stderr to a file too, as JSON lines, and what ended the node if something did.

    A file of `bytes_max` is set aside as `path`.1 and so on, of which `files_kept` stay. Its own thread writes, so that
    a slow disk holds nobody up.
    """
    entries: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = logging.handlers.QueueHandler(entries)
    handler.setFormatter(_formatter(_json_tail()))
    listener = logging.handlers.QueueListener(entries, LogFile(path, bytes_max, files_kept))
    root = logging.getLogger()
    root.addHandler(handler)
    listener.start()
    try:
        yield
    except Exception as error:
        stopped = logging.LogRecord(__name__, logging.ERROR, __file__, 0, "stopped: %s", (in_short(error),), None)
        handler.handle(stopped)  # into the file only: stderr is told by whoever catches it
        raise
    finally:
        root.removeHandler(handler)
        listener.stop()
        listener.handlers[0].close()


class LogFile(logging.handlers.RotatingFileHandler):
    """A log file that only its owner can read, whose failures harm nobody."""

    def __init__(self, path: Path, bytes_max: int, files_kept: int) -> None:
        self.failed = False
        """Whether a line could not be written."""
        super().__init__(path, maxBytes=bytes_max, backupCount=files_kept, encoding="utf-8", delay=True)

    def _open(self) -> TextIOWrapper:
        folder = Path(self.baseFilename).parent
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return open(self.baseFilename, "a", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600))

    def handleError(self, record: logging.LogRecord) -> None:
        """Say once that the disk is full, and do without the lines it does not take."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.failed:
            self.failed = True
            logging.getLogger("braniac.node.logs").warning("cannot write the log file: %s", error)

    def close(self) -> None:
        """Close, whatever the disk says."""
        with contextlib.suppress(OSError):
            super().close()


def render_line(line: str, *, colors: bool) -> str:
    """A line of the log file as the console shows it; what is no JSON object as it is, made printable."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    if not isinstance(entry, dict):
        return printable(line)
    exception = entry.pop("exception", None)
    event = {printable(key): value for key, value in entry.items()}
    _escape_control_characters(None, "", event)
    event["timestamp"] = f"{str(event.get('timestamp', '?'))[:19]}Z"
    event["level"] = str(event.get("level", "info"))
    text = str(_console_renderer(colors=colors)(None, "", {"event": "", **event}))
    if exception:
        text += "\n" + "\n".join(map(printable, str(exception).splitlines()))
    return text


def _shared() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _escape_control_characters,
    ]


def _formatter(tail: list[Processor]) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[structlog.stdlib.add_logger_name, *_shared()],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *tail],
    )


def _console_tail(*, colors: bool) -> list[Processor]:
    return [structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%SZ", utc=True), _console_renderer(colors=colors)]


def _console_renderer(*, colors: bool) -> structlog.dev.ConsoleRenderer:
    return structlog.dev.ConsoleRenderer(
        colors=colors, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
    )


def _json_tail() -> list[Processor]:
    return [
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ]


def _escape_control_characters(_logger: Any, _method: str, event: EventDict) -> MutableMapping[str, Any]:
    # Values may come from peers: none may forge a line of its own or move the cursor of a terminal.
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = printable(value)
    return event


def printable(text: str) -> str:
    """Text in which whatever a terminal would obey is spelled out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
