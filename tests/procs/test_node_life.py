"""One daemon through its life: it trains, is asked, killed, told to leave, loses its libp2p daemon, and goes on."""

from __future__ import annotations

import json
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from braniac.node.control_pb2 import StatusReply
from braniac.node.offline import load
from tests.procs.helpers import Node, Nodes, command, nodes_below, until

pytestmark = pytest.mark.timeout(300)  # a busy machine needs longer than most tests may take


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    yield from nodes_below(tmp_path)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A daemon that founded a run and trains."""
    for nodes in nodes_below(tmp_path_factory.mktemp("live")):
        node = nodes.make("a").start()
        node.training(certificates=2)
        yield node
        assert node.stop() == 0


# --- asking a live node ----------------------------------------------------------------------------------------------


def test_status_for_programs_and_for_people(live: Node) -> None:
    run = command("status", "--json", "--state-dir", live.state_dir)
    assert run.returncode == 0
    status = json.loads(run.stdout)
    assert status["state"] == "training"
    assert status["state_reason"] == ""
    assert status["tier"] == 3
    assert status["steps"] > 0
    assert status["generation"] > 0
    assert {record["outcome"] for record in status["slots"]} <= {"merged", "missed", "no_certificate", "not_held"}
    run = command("status", "--state-dir", live.state_dir)
    assert run.returncode == 0
    assert status["run_id"] in run.stdout
    assert "nats/byte" in run.stdout


def test_a_founder_has_no_peers(live: Node) -> None:
    run = command("peers", "--json", "--state-dir", live.state_dir)
    assert (run.returncode, json.loads(run.stdout)) == (0, {"peers": []})


def test_a_live_node_writes_text_and_is_measured(live: Node) -> None:
    wrote = command("generate", "import ", "--tokens", 20, "--state-dir", live.state_dir)
    assert wrote.returncode == 0, wrote.stderr
    assert wrote.stdout.startswith("import ")
    assert len(wrote.stdout) > len("import \n")
    measured = command("evaluate", "--json", "--data", live.data, "--state-dir", live.state_dir)
    assert measured.returncode == 0, measured.stderr
    losses = json.loads(measured.stdout)
    assert set(losses["own"]) == set(losses["agreed"]) == {"3"}
    assert 0 < losses["own"]["3"] < 6
    assert live.ask() is not None


def test_metrics_are_what_prometheus_wants(live: Node) -> None:
    [entry] = live.logged("serving metrics")
    with urllib.request.urlopen(entry["url"], timeout=10) as response:
        page: bytes = response.read()
    checked = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")
    assert b'braniac_node_state{state="training"} 1.0' in page
    ready = entry["url"].replace("/metrics", "/readyz")
    with urllib.request.urlopen(ready, timeout=10) as response:
        assert response.read() == b"training\n"


def test_a_dead_libp2p_daemon_is_replaced(live: Node) -> None:
    before = live.training()
    [p2pd] = live.children()
    p2pd.kill()

    def replaced(status: StatusReply) -> bool:
        return list(status.addresses) != list(before.addresses) and status.certificates > before.certificates

    status = live.until(replaced, "another libp2p daemon")
    assert status.peer_id == before.peer_id
    assert len(live.children()) == 1


# --- ends and new beginnings -----------------------------------------------------------------------------------------


def test_killed_at_any_moment_it_goes_on_from_its_last_generation(nodes: Nodes) -> None:
    node = nodes.make("a").start()
    node.training(certificates=2)
    for moment in ("generation", "certificates"):  # just after a checkpoint, and in the middle between two
        before = node.training()
        # The first generation to come may have been read before we asked; the second holds all that we saw.
        kept = node.until(lambda s, seen=before: s.generation >= seen.generation + 2, "two generations")  # type: ignore[misc]
        node.until(lambda s, at=moment, seen=kept: getattr(s, at) > getattr(seen, at), f"more {moment}")  # type: ignore[misc]
        node.kill()
        again = node.start().until(lambda s: s.state == "training", "training again")
        assert (again.run_id, again.peer_id) == (before.run_id, before.peer_id)
        assert again.steps >= before.steps
        assert again.slot >= kept.slot
        assert all(last_slots(again)[fragment] >= slot for fragment, slot in last_slots(before).items())
        node.training(certificates=again.certificates + 1)
    assert node.stop() == 0


def last_slots(status: StatusReply) -> dict[int, int]:
    """The last slot merged into each fragment's anchor."""
    return {state.fragment: state.slot for state in status.digests}


def test_sigterm_hands_over_and_keeps_everything(nodes: Nodes) -> None:
    node = nodes.make("a").start()
    before = node.training()
    assert node.stop() == 0
    assert node.words() == []
    store, saved, _ = load(node.state_dir)
    generation = store.recover()
    assert generation is not None
    assert generation.number == node.logged("left")[0]["generation"] > before.generation - 1
    assert saved.step >= before.steps
    assert not (node.state_dir / "control.sock").exists()
    # What is asked of a running node now says that there is none; what reads the checkpoint still works.
    asked = command("status", "--state-dir", node.state_dir)
    assert asked.returncode == 9
    assert len(asked.stderr.splitlines()) == 1
    wrote = command("generate", "import ", "--tokens", 5, "--state-dir", node.state_dir)
    assert wrote.returncode == 0, wrote.stderr
    measured = command("evaluate", "--json", "--data", node.data, "--state-dir", node.state_dir)
    assert json.loads(measured.stdout)["step"] == saved.step
    # And the node begins where it stopped.
    assert node.start().until(lambda s: s.state == "training", "training again").steps >= saved.step
    assert node.stop() == 0


def test_a_second_sigterm_means_now(nodes: Nodes) -> None:
    node = nodes.make("a").start("--set", "run.slot_s=60")  # handing over may take three slots
    node.until(lambda s: s.state == "training" and s.steps, "training")
    node.signal(signal.SIGTERM)
    until(lambda: node.logged("leaving: finishing the slot in hand"), "the beginning of the end")
    node.signal(signal.SIGTERM)
    node.signal(signal.SIGTERM)  # one more by an impatient person
    assert node.wait() == 0
    assert node.words() == []


def test_sigterm_while_starting_is_a_clean_end(nodes: Nodes) -> None:
    node = nodes.make("a").start()
    until(lambda: node.log_path.read_bytes(), "the first line of the log")  # metrics are served, libp2p is not started
    assert node.stop() == 0
    assert node.words() == []


def test_leave_and_leave_now(nodes: Nodes) -> None:
    node = nodes.make("a").start()
    node.training()
    run = command("leave", "--state-dir", node.state_dir)
    assert (run.returncode, run.stderr) == (0, "")
    assert node.wait() == 0
    assert len(node.logged("left")) == 1
    node.start().until(lambda s: s.state == "training", "training again")
    asked = time.monotonic()
    run = command("leave", "--now", "--state-dir", node.state_dir)
    assert run.returncode == 0
    assert node.wait() == 0
    assert time.monotonic() > asked
    assert len(node.logged("left")) == 1  # it did not hand over
    assert node.words() == []
