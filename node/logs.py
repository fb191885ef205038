"""Logging: readable lines or JSON lines on stderr; stdout is for results.

structlog and the standard library's `logging` end in one handler, so hivemind's and grpc's warnings look like ours.
Code that logs says `log = structlog.get_logger(__name__)` and `log.info("slot", slot=7, loss=2.31)`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor


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
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        _escape_control_characters,
    ]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *(_json_tail() if format == "json" else _console_tail(colors=stream.isatty())),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("braniac").setLevel(level.upper())
    logging.captureWarnings(True)
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "WARNING")  # read when hivemind is imported; its p2pd heeds it too
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )


def route_hivemind() -> None:
    """Let hivemind's messages through our handler: on import it installs one of its own. Call after importing it."""
    from hivemind.utils.logging import use_hivemind_log_handler  # heavy, and only the daemon has it loaded anyway

    use_hivemind_log_handler("nowhere")


def _console_tail(*, colors: bool) -> list[Processor]:
    return [
        structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%SZ", utc=True),
        structlog.dev.ConsoleRenderer(
            colors=colors, sort_keys=False, exception_formatter=structlog.dev.plain_traceback
        ),
    ]


def _json_tail() -> list[Processor]:
    return [
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ]


def _escape_control_characters(_logger: Any, _method: str, event: EventDict) -> MutableMapping[str, Any]:
    # Values may come from peers: none may forge a line of its own or move the cursor of a terminal.
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable():
            event[key] = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)
    return event
