"""What is said when engine, Compose, port or container are not as they should be; `docker` is played by a script."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from braniac.node.compose import Project, check_tools, complaint, docker
from braniac.node.errors import ConfigError, NodeError, ResourceError
from braniac.node.faults import parse
from braniac.node.swarm import run_swarm
from braniac.node.swarm_docker import DockerHost
from braniac.node.swarm_options import SwarmOptions

DEPLOY = Path(__file__).parents[2] / "deploy"


class FakeDocker:
    """A `docker` that answers by a table and keeps a list of what it was asked."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.answers: dict[str, tuple[int, str, str]] = {
            "compose version": (0, "2.26.1", ""),
            "version": (0, "26.1.5", ""),
        }
        script = folder / "docker"
        script.write_text(
            f"""#!{sys.executable}
import json, sys
from pathlib import Path
folder = Path({str(folder)!r})
with (folder / "asked").open("a") as asked:
    asked.write(" ".join(sys.argv[1:]) + chr(10))
for start, (code, out, error) in json.loads((folder / "answers").read_text()).items():
    if start in " ".join(sys.argv[1:]):
        print(out)
        print(error, file=sys.stderr)
        sys.exit(code)
"""
        )
        script.chmod(0o755)
        self.save()

    def save(self) -> None:
        (self._folder / "answers").write_text(json.dumps(self.answers))

    def answer(self, start: str, code: int = 0, out: str = "", error: str = "") -> None:
        earlier = {key: answer for key, answer in self.answers.items() if key != start}
        self.answers = {start: (code, out, error), **earlier}
        self.save()

    def asked(self) -> list[str]:
        return (self._folder / "asked").read_text().splitlines()


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDocker:
    monkeypatch.setenv("PATH", str(tmp_path))
    return FakeDocker(tmp_path)


def container(service: str, number: int = 1, state: str = "running", code: int = 0) -> dict[str, object]:
    """As `docker inspect` has it."""
    return {
        "Id": f"{service}-{number}",
        "Config": {
            "Labels": {"com.docker.compose.service": service, "com.docker.compose.container-number": str(number)}
        },
        "State": {"Status": state, "ExitCode": code},
        "NetworkSettings": {"Networks": {"swarm": {"IPAddress": f"10.0.0.{number}"}}},
    }


def options(**changes: object) -> SwarmOptions:
    values: dict[str, object] = {
        "nodes": 3, "tiers": (0, 3), "seconds": 10.0, "seed": 0, "preset": "tiny", "slot_s": 2.0, "sets": (),
        "keep_dir": None, "json": True,
    }  # fmt: skip
    return SwarmOptions(**values | changes)  # type: ignore[arg-type]


async def test_no_docker_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResourceError, match="there is no `docker` command here: install"):
        await docker("version")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Cannot connect to the Docker daemon at unix:///x.sock. Is the docker daemon running?", "does not answer"),
        ("docker: unknown command: docker compose\n\nRun 'docker --help'", "has no Compose"),
        ("docker: 'compose' is not a docker command.", "has no Compose"),
        (
            "Error response from daemon: driver failed programming external connectivity on endpoint "
            "braniac-prometheus-1: Bind for 127.0.0.1:9090 failed: port is already allocated",
            "port 9090 of this machine is in use: choose another with PROMETHEUS_PORT",
        ),
        (
            "Error starting userland proxy: listen tcp4 127.0.0.1:3000: bind: address already in use",
            "port 3000 of this machine is in use",
        ),
        ("a line\nno such service: tier9\n", "`docker compose` failed: no such service: tier9"),
        ("", "no reason given"),
    ],
)
def test_complaints_are_sentences(text: str, sentence: str) -> None:
    assert sentence in str(complaint(["compose", "up"], text))


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (("compose version", "1.29.2"), "Compose is version 1.29.2, and 2.24.4 or newer is needed"),
        (("version --format", "20.10.24"), "the Docker engine is version 20.10.24, and 25.0.0 or newer is needed"),
    ],
)
async def test_tools_that_are_too_old(fake: FakeDocker, answer: tuple[str, str], sentence: str) -> None:
    await check_tools()
    fake.answer(answer[0], out=answer[1])
    with pytest.raises(ResourceError, match=sentence):
        await check_tools()


async def test_a_replica_that_does_not_fit_says_why(fake: FakeDocker) -> None:
    project = Project([DEPLOY / "compose.yaml"], name="p")
    fake.answer("up --detach", 1, error="container p-tier0-1 exited (7)")
    fake.answer("ps --all", out="tier0-1")
    fake.answer("inspect", out=json.dumps([container("founder"), container("tier0", state="restarting", code=7)]))
    said = "braniac-node: tier 0 needs 900 MiB and 300 MiB are free: use --tier auto"
    fake.answer("logs tier0-1", out=f"2026-11-22 a log line\n{said}\n")
    with pytest.raises(NodeError, match="tier0 1 ended: tier 0 needs 900 MiB"):
        await project.up()
    fake.answer("inspect", out=json.dumps([container("tier0", state="exited", code=137)]))
    fake.answer("logs tier0-1", out="2026-11-22 a log line")
    with pytest.raises(ResourceError, match="tier0 1 ended without a word, most likely for want of memory"):
        await project.up()


async def test_down_takes_everything_away(fake: FakeDocker) -> None:
    fake.answer("compose --project-name p")
    await Project([DEPLOY / "compose.yaml"], name="p", profiles=["observe"]).down()
    (asked,) = fake.asked()
    assert asked.endswith("--profile * down --volumes --remove-orphans --timeout 60")


def test_compose_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="with --deploy-dir"):
        run_swarm(options(), tmp_path)


def test_a_founder_must_hold_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="begin --tiers with 0"):
        DockerHost(options(tiers=(3, 0)), tmp_path, DEPLOY)


def test_processes_have_no_network_to_cut() -> None:
    with pytest.raises(ConfigError, match="loss is not possible with processes: use --engine docker"):
        run_swarm(options(faults=parse("loss")))


def test_make_up_ends_with_a_sentence(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "braniac.node.compose", "up"],
        env={"PATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert run.returncode == 7
    assert run.stderr.startswith("braniac-node: there is no `docker` command here: install")
    assert "Traceback" not in run.stderr


async def test_containers_become_peers_by_service_and_number(fake: FakeDocker, tmp_path: Path) -> None:
    host = DockerHost(options(nodes=5, tiers=(0, 3, 1)), tmp_path, DEPLOY)
    there = [container("founder"), container("tier0"), container("tier1"), container("tier3", 2), container("tier3")]
    fake.answer("ps --all", out="some")
    fake.answer("inspect", out=json.dumps([*there, container("prometheus")]))
    await host._find()
    found = [(peer.tier, peer.container.id if peer.container else "") for peer in host.peers]
    assert found == [(0, "founder-1"), (3, "tier3-1"), (1, "tier1-1"), (0, "tier0-1"), (3, "tier3-2")]
    words = await host._cut_from_others(host.peers[:4])
    assert words == "iptables -A INPUT -s 10.0.0.2 -j DROP; iptables -A OUTPUT -d 10.0.0.2 -j DROP"
    override = json.loads((tmp_path / "override.json").read_text())["services"]
    assert override["tier2"]["environment"] == {"BRANIAC_NODE__run__seed": "0"}
