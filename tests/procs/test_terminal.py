"""What a person sees: one daemon on a terminal, watched on another, and told to pause, go on, finish and leave."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from braniac.node.control_pb2 import StatusReply
from tests.procs.helpers import SLOT_S, Node, Nodes, command, nodes_below
from tests.procs.terminal import Terminal, run, terminal

_DAY_S = 280.0
pytestmark = pytest.mark.timeout(300)  # a busy machine needs longer than most tests may take


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    yield from nodes_below(tmp_path)


def first_start(node: Node) -> Terminal:
    """The daemon on a terminal, as a person starts it for the first time; read on in the background."""
    opened = Terminal(
        *("join", "--state-dir", node.state_dir, "--tier", 3, "--data", node.data),
        *("--listen", "/ip4/127.0.0.1/tcp/0", "--set", f"run.slot_s={SLOT_S}", "--set", "train.batch=1"),
        *("--set", "caps.duty_percent=25"),  # a test should leave the machine to others
    )
    node.process = opened.process
    opened.expect("founded a run", "taking part", "join with: braniac-node join --peers /ip4/127.0.0.1/tcp/", "merged")
    return opened


def is_resting(status: StatusReply) -> bool:
    return status.state == "paused" and [reason.code for reason in status.reasons] == ["manual"]


def goes_on(node: Node, watching: Terminal, paused: StatusReply) -> None:
    """Resume, and wait until the node trains and gets certificates again, here and on the other terminal."""
    assert run("resume", "--state-dir", node.state_dir) == (0, "the node goes on\r\n")
    watching.expect("braniac-node: training")
    again = node.until(lambda s: s.certificates > paused.certificates and s.steps > paused.steps, "certificates again")
    assert (again.run_id, list(again.reasons)) == (paused.run_id, [])


def test_a_day_with_a_node(nodes: Nodes) -> None:
    node = nodes.make("a")
    daemon = first_start(node)
    shown: list[tuple[int, str]] = []
    reader = threading.Thread(target=lambda: shown.append(daemon.end(_DAY_S)))
    reader.start()
    here = ("--state-dir", node.state_dir)
    try:
        with terminal("status", "--watch", *here) as watching:
            watching.expect("\x1b[?1049h", "braniac-node: training", "nats/byte", "won", "q leaves")
            watching.resize(60, 12)
            asked = command("status", "--json", *here)  # it answers while it trains
            assert (asked.returncode, json.loads(asked.stdout)["state"]) == (0, "training")

            assert run("pause", *here) == (0, "the node rests until 'braniac-node resume'\r\n")
            paused = node.until(is_resting, "rest")
            watching.expect("braniac-node: paused", "paused by hand, until 'braniac-node resume'")
            goes_on(node, watching, paused)

            assert run("finish", *here)[0] == 0
            paused = node.until(is_resting, "rest after the slot in hand")
            watching.expect("braniac-node: paused")
            goes_on(node, watching, paused)
            watching.press("q")
            code, rest = watching.end()
            assert code == 0
            assert "\x1b[?1049l" in rest  # the terminal is as it was
            assert "Traceback" not in rest

        with terminal("status", "--watch", *here) as watching, terminal("status", "--watch", *here) as interrupted:
            watching.expect("braniac-node: training")
            interrupted.expect("braniac-node: training")
            interrupted.press("\x03")
            code, rest = interrupted.end()
            assert (code, "\x1b[?1049l" in rest, "Traceback" in rest) == (130, True, False)
            assert run("leave", *here) == (0, "the node finishes the slot in hand and stops\r\n")
            code, rest = watching.end()
            assert code == 9
            assert "has stopped: start it again with 'braniac-node join'" in rest.replace("\r\n", " ")
        reader.join(60)
        [(code, text)] = shown
        assert code == 0
        for event in ("resting", "going on", "resting: finishing the slot in hand", "leaving", "left"):
            assert event in text
    finally:
        daemon.close()
        reader.join(60)
    code, text = run("logs", "-n", 1, *here)  # can be read after its end, too
    assert (code, text.count("\r\n")) == (0, 1)
    assert "left" in text
