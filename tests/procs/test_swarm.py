"""Several daemons together: they find each other, agree, survive a kill, and `swarm` reports on them truthfully."""

from __future__ import annotations

import json
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from braniac.node.control_pb2 import StatusReply
from tests.procs.helpers import COMMAND, ENVIRONMENT, SLOT_S, Node, Nodes, command, nodes_below, until

pytestmark = pytest.mark.timeout(300)  # a busy machine needs longer than most tests may take


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    yield from nodes_below(tmp_path)


def test_a_node_joins_and_both_decide_together(nodes: Nodes) -> None:
    founder = nodes.make("founder").start()
    founder.training()
    joiner = nodes.make("joiner").start(peers=founder.address)
    joined = joiner.until(lambda s: s.contributions_merged > 1, "its work to be merged")
    # Only what this tier holds was downloaded, once.
    assert 0 < joined.join_bytes_needed <= joined.join_bytes_received <= 1.1 * joined.join_bytes_needed
    founder.until(lambda s: any(record.contributors == 2 for record in s.slots), "a certificate over both")
    listed = command("peers", "--json", "--state-dir", founder.state_dir)
    [peer] = json.loads(listed.stdout)["peers"]
    assert (peer["peer_id"], peer["tier"], peer["state"]) == (joined.peer_id, 3, "live")
    until(lambda: agree(founder, joiner), "the same bytes of every fragment at both")
    # While its disk is full the joiner can move no anchor; with space again it applies what it could not, in order.
    psutil.Process(joiner.pid).rlimit(psutil.RLIMIT_FSIZE, (48 * 1024, resource.RLIM_INFINITY))
    full = joiner.until(lambda s: "free some space" in s.state_reason, "a full disk to be told")
    joiner.until(lambda s: s.slot > full.slot + s.fragments, "a whole window")
    psutil.Process(joiner.pid).rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    joiner.until(lambda s: s.certificates > full.certificates + 1, "certificates again")
    until(lambda: agree(founder, joiner), "agreement after the disk was full")
    assert joiner.logged("downloading a fragment again") == []
    # The founder goes; who is left trains on alone, and takes it in again when it returns.
    address = founder.address
    founder.kill()
    alone = joiner.until(lambda s: s.peers_live == 0, "the founder's silence to be noticed")
    joiner.until(lambda s: s.certificates > alone.certificates + 1, "certificates without the founder")
    founder.start(listen=address.partition("/p2p/")[0])
    founder.until(lambda s: s.peers_live == 1 and s.state == "training", "the founder's return")
    until(lambda: agree(founder, joiner), "agreement again")
    assert founder.stop() == 0
    joiner.until(lambda s: s.peers_live == 0, "the founder's goodbye", patience_s=4 * SLOT_S + 10)
    assert joiner.stop() == 0


def agree(*nodes: Node) -> bool:
    """Whether one look at all nodes shows the same last slot and bytes of every fragment."""
    replies = [node.ask() for node in nodes]
    return all(replies) and len({digests(reply) for reply in replies if reply}) == 1


def digests(reply: StatusReply) -> tuple[tuple[int, int, bytes], ...]:
    """Fragment, last slot and hash of every anchor."""
    return tuple(sorted((each.fragment, each.slot, each.digest) for each in reply.digests))


def test_the_swarm_command_reports_on_real_daemons() -> None:
    arguments = ["swarm", "--nodes", "2", "--tiers", "0,3", "--seconds", "15", "--kill", "1", "--json"]
    run = subprocess.run([*COMMAND, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=110)
    report = json.loads(run.stdout.splitlines()[-1])
    assert run.returncode == (0 if report["ok"] else 1), run.stderr
    assert report["nodes"] == 2
    assert report["tiers"] == [0, 3]
    assert report["kills"] == len(report["killed"]) == 1
    assert report["digests_agree"]
    assert report["disagreements"] == 0
    assert report["exit_codes"] == [0, 0]
    assert report["certificates"] > 0
    assert report["contributions_merged"] > 0
    assert report["tokens"] > 0
    assert 0 < report["join_bytes_ratio_max"] <= 1.1
    assert set(report["loss_start"]) == set(report["loss_end"]) == {"0", "3"}
    assert all(report["loss_end"][tier] < report["loss_start"][tier] for tier in ("0", "3"))
