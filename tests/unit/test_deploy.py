"""What is deployed, as far as it can be checked without a container engine: image, compose file, Prometheus files."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from braniac.node.config import NodeConfig
from braniac.node.metrics import Metrics
from braniac.node.settings_merge import load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
FINAL_STAGE = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
NODES = ("seed", "peer")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def with_defaults(value: object) -> str:
    """A value of the compose file as it is when no variable is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value))


def image_environment() -> dict[str, str]:
    """What the final stage of the Dockerfile sets about the node."""
    return dict(re.findall(r"(BRANIAC_NODE__\w+)=(\S+)", FINAL_STAGE))


def test_images_are_pinned() -> None:
    images = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) + [service["image"] for service in SERVICES.values()]
    assert len(images) == 6
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
    assert re.search(r'^HEALTHCHECK .*\\\n +CMD \["braniac-node", "status", "--json"\]$', FINAL_STAGE, re.MULTILINE)
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


def test_peers_read_what_the_seed_writes_and_keep_their_state_apart() -> None:
    settings = {name: SERVICES[name]["environment"] for name in NODES}
    file = settings["seed"]["BRANIAC_NODE__network__address_file"]
    assert settings["peer"]["BRANIAC_NODE__network__peers"] == f"@{file}"
    assert f"addresses:{Path(file).parent}" in SERVICES["seed"]["volumes"]
    assert SERVICES["peer"]["volumes"] == ["/var/lib/braniac", f"addresses:{Path(file).parent}:ro"]
    assert COMPOSE["networks"]["swarm"] == {"internal": True}


def test_prometheus_scrapes_the_port_on_which_nodes_serve() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = config["scrape_configs"]
    (lookup,) = job["dns_sd_configs"]
    assert tuple(lookup["names"]) == NODES
    assert {SERVICES[name]["environment"]["BRANIAC_NODE__metrics__port"] for name in NODES} == {lookup["port"]}


@needs_promtool
@pytest.mark.parametrize(
    "arguments", [["check", "config", "prometheus.yml"], ["test", "rules", "rules_test.yml"]], ids=lambda a: a[1]
)
def test_promtool_is_content(arguments: list[str]) -> None:
    folder = DEPLOY / "prometheus"
    run = subprocess.run(["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_alert_is_about_a_series_that_nodes_have() -> None:
    rules = yaml.safe_load((DEPLOY / "prometheus" / "rules.yml").read_text(encoding="utf-8"))
    exposed = set(re.findall(r"^(braniac_\w+)", Metrics("0", 1).exposition().decode(), re.MULTILINE))
    tests = (DEPLOY / "prometheus" / "rules_test.yml").read_text(encoding="utf-8")
    for rule in rules["groups"][0]["rules"]:
        assert set(re.findall(r"braniac_\w+", rule["expr"])) <= exposed
        assert f"alertname: {rule['alert']}\n" in tests


def test_the_readme_lists_the_variables_with_their_defaults() -> None:
    used = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", (DEPLOY / "compose.yaml").read_text(encoding="utf-8")))
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(\w+)` \| (\S+) \|", readme, re.MULTILINE)) == used
