"""A founder and six peers of all tiers in containers, harmed on a schedule, with a real Prometheus watching.

Run by `make test-containers`, which builds the images first.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from braniac.node.compose import Project, docker
from braniac.node.errors import NodeError
from braniac.node.faults import parse
from braniac.node.swarm import Swarm
from braniac.node.swarm_docker import DockerHost
from braniac.node.swarm_options import SwarmOptions

DEPLOY = Path(__file__).parents[2] / "deploy"
PORT = "19090"
SLOT_S = float(os.environ.get("BRANIAC_CONTAINERS_SLOT_S", "6"))

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif("BRANIAC_CONTAINERS" not in os.environ, reason="needs images: run `make test-containers`"),
]


def options(**changes: Any) -> SwarmOptions:
    values: dict[str, Any] = {
        "nodes": 7, "tiers": (0, 1, 2, 3), "seconds": 70 * SLOT_S, "seed": 3, "preset": "tiny", "slot_s": SLOT_S,
        "sets": (), "keep_dir": None, "json": True,
    }  # fmt: skip
    return SwarmOptions(**values | changes)


class Alerts:
    """Which alerts fired, and whether they fell silent again."""

    def __init__(self) -> None:
        self.looks: list[frozenset[str]] = []

    async def follow(self) -> None:
        """Look every two seconds, for ever."""
        query = urllib.parse.urlencode({"query": 'count by (alertname) (ALERTS{alertstate="firing"})'})
        while True:
            try:
                answer = await asyncio.to_thread(_get, f"http://127.0.0.1:{PORT}/api/v1/query?{query}")
            except OSError:
                pass  # not there yet
            else:
                found = json.loads(answer)["data"]["result"]
                self.looks.append(frozenset(sample["metric"]["alertname"] for sample in found))
            await asyncio.sleep(2.0)

    def fired_and_cleared(self, name: str) -> bool:
        """Whether it was seen to fire, and later not to."""
        seen = [name in look for look in self.looks]
        return True in seen and False in seen[seen.index(True) :]


def _get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=10) as answer:
        data: bytes = answer.read()
    return data


async def test_a_swarm_survives_kill_pause_partition_cap_and_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_PORT", PORT)
    wishes = parse("kill,pause:100,partition,cap,loss")
    host = DockerHost(options(faults=wishes), tmp_path, DEPLOY, name="braniac-test", beside=("observer", "prometheus"))
    alerts = Alerts()
    following = asyncio.ensure_future(alerts.follow())
    try:
        report = await Swarm(host._options, host).run()
    finally:
        following.cancel()
    sys.stdout.write(json.dumps({"alerts": sorted(frozenset().union(*alerts.looks)), **report}) + "\n")
    assert [fault["kind"] for fault in report["faults"]] == [wish.kind for wish in wishes]
    assert report["certificates"] > 0
    assert report["digests_agree"]
    assert report["disagreements"] == 0
    assert all(report["loss_end"][tier] < report["loss_start"][tier] - 0.5 for tier in "0123")
    assert report["exit_codes"] == [0] * 7
    assert alerts.fired_and_cleared("NodeDown")
    assert await nothing_is_left("braniac-test")


async def nothing_is_left(name: str) -> bool:
    """No container, network or volume of a project."""
    label = f"label=com.docker.compose.project={name}"
    listings = [("ps", "--all"), ("network", "ls"), ("volume", "ls")]
    return not any([(await docker(*words, "--quiet", "--filter", label)).strip() for words in listings])


async def test_a_replica_that_cannot_fit_its_memory_limit_says_so() -> None:
    project = Project(
        [DEPLOY / "compose.yaml"],
        name="braniac-small",
        environment={"PRESET": "small", "FOUNDER_MEMORY": "330m", "SLOT_S": "5"},
    )
    try:
        with pytest.raises(NodeError, match=r"founder 1 ended(: .* MiB| without a word)"):
            await project.up(["founder"])
    finally:
        await project.down()
    assert await nothing_is_left("braniac-small")


async def test_a_port_in_use_is_a_sentence() -> None:
    server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    project = Project(
        [DEPLOY / "compose.yaml"],
        name="braniac-port",
        profiles=["observe"],
        environment={"PROMETHEUS_PORT": str(port)},
    )
    try:
        with pytest.raises(
            NodeError, match=f"port {port} of this machine is in use: choose another with PROMETHEUS_PORT"
        ):
            await project.up(["prometheus"])
    finally:
        server.close()
        await project.down()


async def test_an_image_runs_as_an_ordinary_user_on_a_read_only_root() -> None:
    image = "braniac-node:0.1.0"
    script = "import os; print(os.getuid()); open('/opt/x', 'w')"
    with pytest.raises(NodeError, match="Read-only file system"):
        await docker("run", "--rm", "--read-only", "--network", "none", "--entrypoint", "python", image, "-c", script)
    user = await docker("run", "--rm", "--network", "none", "--entrypoint", "id", image, "-u")
    assert user.strip() == "10001"
