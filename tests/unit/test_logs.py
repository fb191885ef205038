"""Logging: both formats, who is heard at which level, and that no value can forge a line."""

from __future__ import annotations

import io
import json
import logging
from datetime import UTC, datetime, timedelta

import pytest
import structlog

from braniac.node.logs import configure_logging

pytestmark = pytest.mark.usefixtures("own_logging")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_are_readable_and_have_colours_only_on_a_terminal() -> None:
    plain, terminal = io.StringIO(), Terminal()
    for stream in (plain, terminal):
        configure_logging("info", "auto", stream)
        structlog.get_logger("braniac.node.daemon").info("slot done", slot=7, loss=2.31)
    assert plain.getvalue().endswith("slot=7 loss=2.31\n")
    assert "slot done" in plain.getvalue()
    assert "\x1b[" not in plain.getvalue()
    assert "\x1b[" in terminal.getvalue()


def test_a_json_line_is_one_object_with_a_utc_time() -> None:
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    try:
        raise ValueError("no\ngood")
    except ValueError:
        structlog.get_logger("braniac.node.daemon").exception("failed", slot=7, ratio=0.5)
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert (entry["event"], entry["level"], entry["slot"], entry["ratio"]) == ("failed", "error", 7, 0.5)
    assert "ValueError: no\ngood" in entry["exception"]
    assert abs(datetime.fromisoformat(entry["timestamp"]) - datetime.now(UTC)) < timedelta(minutes=1)


def test_others_are_heard_from_warning_on_and_we_from_our_level_on() -> None:
    stream = io.StringIO()
    configure_logging("debug", "json", stream)
    structlog.get_logger("braniac.node.daemon").debug("ours")
    logging.getLogger("grpc").info("chatter")
    logging.getLogger("grpc").warning("trouble with %s", "a socket")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["ours", "trouble with a socket"]

    configure_logging("error", "json", stream := io.StringIO())
    structlog.get_logger("braniac.node.daemon").warning("ours")
    assert stream.getvalue() == ""


def test_configuring_again_replaces_the_first_stream() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logging("info", "json", first)
    log = structlog.get_logger("braniac.node.daemon")
    log.info("one")
    configure_logging("info", "json", second)
    log.info("two")
    assert (first.getvalue().count("\n"), second.getvalue().count("\n")) == (1, 1)


@pytest.mark.parametrize("format", ["console", "json"])
def test_a_value_from_a_peer_cannot_forge_a_line(format: str) -> None:
    stream = io.StringIO()
    configure_logging("info", format, stream)  # type: ignore[arg-type]
    structlog.get_logger("braniac.node.daemon").info("refused", agent="x\n2026 [info] all is well \x1b[2J\u202e")
    logging.getLogger("elsewhere").warning("peer says %s", "x\r\nfake")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert all(line.isprintable() for line in lines)
