"""What is deployed, as far as it can be checked without a container engine: image, Compose, Prometheus, Grafana."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from braniac.node.clock import FakeClock, SwarmClock
from braniac.node.config import NodeConfig
from braniac.node.metrics import Metrics
from braniac.node.settings_merge import load_config
from braniac.node.splits import Splits
from braniac.node.swarm_metrics import SwarmCollector, SwarmMetrics
from tests.unit.swarm_harness import Swarm

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
FINAL_STAGE = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]


class ComposeLoader(yaml.SafeLoader):
    """Reads Compose's own tags as what they stand before."""


ComposeLoader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def compose_file(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load((DEPLOY / name).read_text(encoding="utf-8"), ComposeLoader)
    return loaded


COMPOSE = compose_file("compose.yaml")
CHAOS = compose_file("compose.chaos.yaml")
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
TIERS = ("tier0", "tier1", "tier2", "tier3")
NODES = ("founder", *TIERS)
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "dashboards.py"), run_name="dashboards")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def with_defaults(value: object) -> str:
    """A value of the compose file as it is when no variable is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))


def image_environment() -> dict[str, str]:
    """What the final stage of the Dockerfile sets about the node."""
    return dict(re.findall(r"(BRANIAC_NODE__\w+)=(\S+)", FINAL_STAGE))


def test_images_are_pinned() -> None:
    images = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    images += [service["image"] for service in (*SERVICES.values(), *CHAOS["services"].values()) if "image" in service]
    assert len(images) == 14
    assert [image for image in images if image != "scratch" and re.fullmatch(r"\S+:\S*\d\S*", image) is None] == []


def test_the_image_is_of_this_version() -> None:
    assert f"ARG VERSION={PROJECT['version']}\n" in FINAL_STAGE
    assert {SERVICES[name]["image"] for name in NODES} == {f"braniac-node:{PROJECT['version']}"}


def test_the_build_finds_the_pinned_torch() -> None:
    (script,) = re.findall(r"sed -n '([^']+)' pyproject\.toml", DOCKERFILE)
    found = subprocess.run(["sed", "-n", script, ROOT / "pyproject.toml"], capture_output=True, text=True, check=True)
    assert found.stdout.split() == [item for item in PROJECT["dependencies"] if item.startswith("torch")]


def test_all_that_is_copied_is_in_the_build_context() -> None:
    copied = {name for line in re.findall(r"^COPY (?!--)(.+)", DOCKERFILE, re.MULTILINE) for name in line.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied == {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)


def test_the_node_runs_as_an_ordinary_user_without_a_compiler() -> None:
    (user,) = re.findall(r"^USER (\d+):(\d+)$", FINAL_STAGE, re.MULTILINE)
    assert int(user[0]) >= 1000
    assert int(user[1]) >= 1000
    assert "apt-get" not in FINAL_STAGE
    assert 'ENTRYPOINT ["braniac-node"]\nCMD ["join"]' in FINAL_STAGE
    assert "STOPSIGNAL SIGTERM" in FINAL_STAGE


def test_health_is_asked_of_the_daemon_itself() -> None:
    assert re.search(r'^HEALTHCHECK .*\\\n +CMD \["braniac-node", "status", "--check"\]$', FINAL_STAGE, re.MULTILINE)
    assert all(set(SERVICES[name]["healthcheck"]) == {"start_interval"} for name in NODES)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_nothing_that_it_need_not(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "mem_limit" in service
    assert "privileged" not in service
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("name", NODES)
def test_a_node_gets_settings_that_exist(name: str) -> None:
    environment = {key: with_defaults(value) for key, value in SERVICES[name]["environment"].items()}
    config = load_config(NodeConfig, None, image_environment() | environment, (), {})
    assert config.state.dir == Path("/var/lib/braniac")
    assert config.metrics.host == "0.0.0.0"
    assert config.network.listen == ("/ip4/0.0.0.0/tcp/4001",)
    mounts = [volume.split(":") for volume in SERVICES[name]["volumes"]]
    assert any(str(config.state.dir) in mount for mount in mounts)
    assert SERVICES[name]["networks"] == ["swarm"]
    assert SERVICES[name]["stop_grace_period"] == "60s"


def test_peers_read_what_the_founder_writes_and_keep_their_state_apart() -> None:
    settings = {name: SERVICES[name]["environment"] for name in NODES}
    file = settings["founder"]["BRANIAC_NODE__network__address_file"]
    assert f"addresses:{Path(file).parent}" in SERVICES["founder"]["volumes"]
    for number, name in enumerate(TIERS):
        assert settings[name]["BRANIAC_NODE__network__peers"] == f"@{file}"
        assert settings[name]["BRANIAC_NODE__train__tier"] == number
        assert SERVICES[name]["volumes"][:2] == ["/var/lib/braniac", f"addresses:{Path(file).parent}:ro"]
        assert SERVICES[name]["depends_on"] == {"founder": {"condition": "service_healthy"}}
    assert COMPOSE["networks"]["swarm"] == {"internal": True}


def test_prometheus_scrapes_the_port_on_which_nodes_and_the_observer_serve() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    lookups = {job["job_name"]: job["dns_sd_configs"][0] for job in config["scrape_configs"]}
    assert tuple(lookups["braniac"]["names"]) == NODES
    assert lookups["observer"]["names"] == ["observer"]
    ports = {SERVICES[name]["environment"]["BRANIAC_NODE__metrics__port"] for name in (*NODES, "observer")}
    assert ports == {lookup["port"] for lookup in lookups.values()}


def test_memory_limits_for_the_large_model_are_those_of_phones() -> None:
    lines = (DEPLOY / "nano-1b.env").read_text(encoding="utf-8").splitlines()
    set_there = dict(line.split("=") for line in lines if not line.startswith("#"))
    used = compose_variables()
    assert set_there.keys() <= used.keys()
    assert {set_there[key] for key in used if key.endswith("_MEMORY")} == {"6g"}


def compose_variables() -> dict[str, str]:
    """What can be set in the environment, with its default."""
    files = [(DEPLOY / name).read_text(encoding="utf-8") for name in ("compose.yaml", "compose.chaos.yaml")]
    return dict(re.findall(r"\$\{(\w+):-([^}]*)\}", "".join(files)))


PROFILES = ("observe", "chaos")


@pytest.mark.parametrize("overlay", [False, True], ids=["plain", "chaos file"])
@pytest.mark.parametrize(
    "profiles", [c for n in range(3) for c in itertools.combinations(PROFILES, n)], ids=lambda c: "+".join(c) or "none"
)
def test_compose_is_content(profiles: tuple[str, ...], overlay: bool) -> None:
    if not compose_is_here():
        pytest.skip("docker has no Compose plugin here")
    files = ["compose.yaml", *(["compose.chaos.yaml"] if overlay else [])]
    arguments = [word for file in files for word in ("--file", str(DEPLOY / file))]
    arguments += [word for profile in profiles for word in ("--profile", profile)]
    command = ["docker", "compose", *arguments, "config", "--quiet"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def compose_is_here() -> bool:
    if shutil.which("docker") is None:
        return False
    run = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=60, check=False)
    return run.returncode == 0


def rule_files() -> list[Path]:
    return sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))


def rules_of(path: Path) -> list[dict[str, Any]]:
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [rule for group in loaded["groups"] for rule in group["rules"]]


@needs_promtool
@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "config", "single-host.yml"],
        ["test", "rules", "tests/alerts.yml"],
    ],
    ids=lambda a: a[-1],
)
def test_promtool_is_content(arguments: list[str]) -> None:
    folder = DEPLOY / "prometheus"
    run = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def exposed() -> set[str]:
    """Every series of nodes and observers, and what is recorded of them."""
    swarm = Swarm.running([0])
    observer = SwarmMetrics("0", 1)
    observer.registry.register(SwarmCollector(swarm.peers[0].engine, Splits(), FakeClock(), SwarmClock(FakeClock())))
    node = Metrics("0", 1)
    node.set_run("0", "test", "0")
    text = node.exposition().decode() + observer.exposition().decode()
    declared = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    recorded = {rule["record"] for path in rule_files() for rule in rules_of(path) if "record" in rule}
    return set(re.findall(r"^(\w+)", text, re.MULTILINE)) | declared | recorded | {"up"}


SERIES = re.compile(r"\b(?:\w+:)?(?:braniac|process)_\w+(?::\w+)?")


def test_every_rule_is_about_series_that_exist() -> None:
    known = exposed()
    for path in rule_files():
        for rule in rules_of(path):
            assert set(SERIES.findall(rule["expr"])) <= known, rule


def test_every_rule_has_a_test() -> None:
    tests = (DEPLOY / "prometheus" / "tests" / "alerts.yml").read_text(encoding="utf-8")
    for path in rule_files():
        for rule in rules_of(path):
            assert (f"alertname: {rule['alert']}\n" if "alert" in rule else rule["record"]) in tests, rule


def panels(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["panels"]
    return found


def test_the_dashboards_are_what_the_script_writes() -> None:
    assert [path.stem for path in DASHBOARDS] == sorted(SCRIPT["DASHBOARDS"])
    for path in DASHBOARDS:
        assert path.read_text(encoding="utf-8") == SCRIPT["text"](path.stem), "run python scripts/dashboards.py"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_well_formed(path: Path) -> None:
    board = json.loads(path.read_text(encoding="utf-8"))
    assert board["uid"] == f"braniac-{path.stem}"
    names = {variable["name"] for variable in board["templating"]["list"]}
    places = set()
    for panel in panels(path):
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        place = panel["gridPos"]
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not places & cells, f"{panel['title']} overlaps"
        assert max(x for x, _ in cells) < 24
        places |= cells
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= names | {"__rate_interval"}
            assert set(SERIES.findall(target["expr"])) <= exposed(), target["expr"]
    ids = [panel["id"] for panel in panels(path)]
    assert len(set(ids)) == len(ids) == len({panel["title"] for panel in panels(path)})


def test_grafana_finds_data_source_and_dashboards() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text(encoding="utf-8"))
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    provider = yaml.safe_load((provisioning / "dashboards" / "braniac.yaml").read_text(encoding="utf-8"))["providers"][
        0
    ]
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in SERVICES["grafana"]["volumes"])
    assert provider["options"]["path"] == mounts["./grafana/dashboards"]
    assert mounts["./grafana/provisioning"] == "/etc/grafana/provisioning"
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).name in {path.name for path in DASHBOARDS}


def test_the_readme_lists_the_variables_with_their_defaults() -> None:
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(\w+)` \| (\S*) \|", readme, re.MULTILINE)) == compose_variables()
