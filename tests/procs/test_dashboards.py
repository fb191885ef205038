"""Every panel of every dashboard, asked of a real Prometheus that scrapes real nodes and a real observer."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.procs.helpers import COMMAND, ENVIRONMENT, Nodes, nodes_below, until

DEPLOY = Path(__file__).parents[2] / "deploy"
PANELS = [
    (path.stem, panel["title"], target["expr"])
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
    for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]
    for target in panel["targets"]
]

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    yield from nodes_below(tmp_path)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


class Prometheus:
    """A real one that scrapes every second and knows our rules."""

    def __init__(self, folder: Path, targets: dict[str, list[str]]) -> None:
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
        for job in config["scrape_configs"]:
            del job["dns_sd_configs"]
            job["static_configs"] = [{"targets": targets[job["job_name"]]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        self.url = f"http://127.0.0.1:{free_port()}"
        with (folder / "prometheus.log").open("wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'tsdb'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=log,
                stderr=log,
            )

    def query(self, expr: str) -> list[float] | None:
        """Values of an instant query, None while nobody answers. Fails the test if the expression is refused."""
        url = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
        try:
            answer: dict[str, Any] = json.loads(get(url))
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expr}: {error.read().decode()}") from None
        except OSError:
            return None
        result = answer["data"]["result"]
        if answer["data"]["resultType"] == "scalar":
            return [float(result[1])]
        return [float(sample["value"][1]) for sample in result]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def as_grafana_asks(expr: str) -> str:
    """An expression with its variables replaced."""
    return expr.replace("$instance", ".*").replace("$__rate_interval", "10s")


def metrics_of(log: Path) -> str | None:
    """Where a daemon serves its metrics, as its log says."""
    found = re.search(r'"url": ?"(http://127[^"]+)/metrics"', log.read_text(encoding="utf-8"))
    return found[1] if found else None


def test_every_panel_shows_something(nodes: Nodes, tmp_path: Path) -> None:
    founder = nodes.make("founder", tier=0).start("--set", "run.slot_s=2")  # longer than between two scrapes
    address = founder.address
    joiner = nodes.make("joiner").start(peers=address)
    log = tmp_path / "observer.log"
    with log.open("wb") as output:
        arguments = ["observe", "--peers", address, "--state-dir", str(tmp_path / "o"), "--log-format", "json"]
        arguments += ["--listen", "/ip4/127.0.0.1/tcp/0"]
        observer = subprocess.Popen([*COMMAND, *arguments], env=ENVIRONMENT, stdout=output, stderr=output)
    places = {}
    prometheus = None
    try:
        for name, path in (("founder", founder.log_path), ("joiner", joiner.log_path), ("observer", log)):
            places[name] = until(lambda path=path: metrics_of(path), f"the metrics of {name}")  # type: ignore[misc]
        hosts = {name: place.removeprefix("http://") for name, place in places.items()}
        targets = {"braniac": [hosts["founder"], hosts["joiner"]], "observer": [hosts["observer"]]}
        prometheus = Prometheus(tmp_path, targets)
        joiner.training(certificates=3)
        for board, title, expr in PANELS:
            asked = as_grafana_asks(expr)
            found = until(lambda asked=asked: prometheus.query(asked), f"data in {board}: {title}: {asked}")  # type: ignore[misc]
            assert any(map(math.isfinite, found)), f"{board}: {title}: {asked} is not a number"
        assert prometheus.query("sum(up)") == [3.0]
        check_metrics([get(f"{place}/metrics") for place in places.values()])
        counts_match(prometheus)
    finally:
        observer.terminate()
        code = observer.wait(30)
        if prometheus is not None:
            prometheus.close()
    assert code == 0
    assert founder.stop() == joiner.stop() == 0


def check_metrics(expositions: list[str]) -> None:
    """Prometheus' own linter has nothing to say."""
    for text in expositions:
        run = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
        assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def counts_match(prometheus: Prometheus) -> None:
    """What the observer says of the nodes is what they say of themselves, within one slot."""
    live = 'sum(braniac_swarm_peers{state=~"ready|joining"})'
    assert prometheus.query(f"{live} - on () group_right () braniac_peers{{job='braniac'}}") == [1.0, 1.0]
    apart = prometheus.query("max(abs(braniac_slot - on () group_left () braniac_swarm_slot))")
    assert apart is not None
    assert apart[0] <= 1
