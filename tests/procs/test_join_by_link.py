"""A run from its description to its second node: signed, founded, linked to, looked at, asked about and joined."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from braniac.node.join_link import parse_link
from tests.procs.helpers import Nodes, command, nodes_below
from tests.procs.terminal import terminal

pytestmark = pytest.mark.timeout(300)  # a busy machine needs longer than most tests may take

DESCRIPTION = "name: linked\nmodel: {preset: tiny}\nslot_s: 0.5\noptimizer: {learning_rate: 0.01}\n"

IDLE = ("--set", "caps.duty_percent=10")  # a test should leave the machine to others


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    yield from nodes_below(tmp_path)


def test_from_a_description_to_a_second_node(nodes: Nodes, tmp_path: Path) -> None:
    founder, joiner = nodes.make("a"), nodes.make("b")
    (tmp_path / "run.yaml").write_text(DESCRIPTION)
    signed = command("init", tmp_path / "run.yaml", "--state-dir", founder.state_dir, "--json")
    run_id = json.loads(signed.stdout)["run_id"]
    run_file = tmp_path / "run.braniac"

    assert founder.start("--set", "run.slot_s=null", "--run", run_file, *IDLE).training().run_id == run_id

    link = command("link", "--state-dir", founder.state_dir).stdout.strip()
    assert parse_link(link).run_id == run_id
    assert f"join link: {link}\n" in founder.output_path.read_text()
    looked = command("costs", link, "--json", "--swarm-peers", 2)
    assert (json.loads(looked.stdout)["run_id"], looked.stderr) == (run_id, "")

    words = ["join", link, "--state-dir", joiner.state_dir, "--data", nodes.data, "--tier", 3]
    words += ["--listen", "/ip4/127.0.0.1/tcp/0", "--set", "train.batch=1", *IDLE]
    with terminal(*words) as person:
        person.expect("TIER", "3 *", "Download 917.5 kB and take part? [Y/n] ")
        person.press("n\r")
        code, rest = person.end()
    assert (code, "nothing was downloaded, because you did not agree" in rest) == (1, True)
    with terminal(*words) as person:
        person.expect("[Y/n] ")
        person.press("\r")
        person.expect("contributors")
        assert command("leave", "--state-dir", joiner.state_dir).returncode == 0
        assert person.end()[0] == 0
    assert founder.stop() == 0
