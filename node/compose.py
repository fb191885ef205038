"""The `docker` command, asked for what a swarm in containers needs; whatever it complains of comes out as a sentence.

`python -m braniac.node.compose up|down` is what `make up` and `make down` run.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from braniac.node.errors import ConfigError, NodeError, ResourceError

COMPOSE_MIN = (2, 24, 4)  # understands !override
ENGINE_MIN = (25, 0, 0)  # understands start_interval
_UP_S = 600
_LAST_WORDS = "braniac-node: "
_KILLED = 137
_DEPLOY = Path(__file__).resolve().parents[1] / "deploy"  # in a checkout
_VERSION = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?")


@dataclass(frozen=True)
class Container:
    """One container of a project, as the engine sees it."""

    id: str
    service: str
    number: int
    state: str
    """created, running, paused, restarting, exited or dead."""
    exit_code: int
    restarts: int
    addresses: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.service} {self.number}"


async def docker(*arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run the `docker` command: its stdout. Raises ResourceError, or NodeError with its last words."""
    try:
        process = await asyncio.create_subprocess_exec(
            "docker",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **(environment or {})},
        )
    except FileNotFoundError:
        raise ResourceError(
            "there is no `docker` command here: install Docker Engine 25 or newer with its Compose plugin"
        ) from None
    out, error = await process.communicate()
    if process.returncode:
        raise complaint(arguments, error.decode(errors="replace"))
    return out.decode(errors="replace")


def complaint(arguments: Sequence[str], text: str) -> NodeError:
    """What `docker` wrote to stderr, as an error with a remedy."""
    if re.search(r"cannot connect to the docker daemon|error during connect|docker\.sock", text, re.IGNORECASE):
        return ResourceError("the Docker engine does not answer: start it, or say with DOCKER_HOST where it is")
    if re.search(r"unknown command: docker compose|'compose' is not a docker command|unknown shorthand flag", text):
        return ResourceError("this docker has no Compose: install its plugin, version 2.24.4 or newer")
    if port := re.search(r"(?:listen|bind)\D.*?:(\d+)[^\d\n]*(?:already|in use)|Bind for \S+?:(\d+) failed", text):
        return ResourceError(
            f"port {port[1] or port[2]} of this machine is in use: choose another with PROMETHEUS_PORT or GRAFANA_PORT"
        )
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")
    return NodeError(f"`docker {arguments[0]}` failed: {last}")


async def check_tools() -> None:
    """Make sure that engine and Compose are there and new enough. Raises ResourceError."""
    compose = await docker("compose", "version", "--short")
    engine = await docker("version", "--format", "{{.Server.Version}}")
    for what, found, least in (("Compose", compose, COMPOSE_MIN), ("the Docker engine", engine, ENGINE_MIN)):
        if (version := _version(found)) is not None and version < least:
            needed = ".".join(map(str, least))
            raise ResourceError(f"{what} is version {found.strip()}, and {needed} or newer is needed: update it")


def _version(text: str) -> tuple[int, int, int] | None:
    found = _VERSION.search(text)
    return (int(found[1]), int(found[2]), int(found[3] or 0)) if found else None


class Project:
    """The containers that some compose files describe."""

    def __init__(
        self,
        files: Sequence[Path],
        *,
        name: str = "braniac",
        profiles: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Raises ConfigError for a file that is not there."""
        for file in files:
            if not file.is_file():
                raise ConfigError(f"there is no {file}: give the deploy folder of a checkout with --deploy-dir")
        self.name = name
        self._environment = dict(environment or {})
        self._arguments = ["compose", "--project-name", name]
        for file in files:
            self._arguments += ["--file", str(file)]
        for profile in profiles:
            self._arguments += ["--profile", profile]

    async def compose(self, *arguments: str) -> str:
        """Run one `docker compose` command: its stdout. Raises NodeError."""
        return await docker(*self._arguments, *arguments, environment=self._environment)

    async def up(self, services: Sequence[str] = (), scale: Mapping[str, int] | None = None) -> None:
        """Start, and wait until all are healthy. Raises NodeError: one that ends by itself says why."""
        scales = [f"--scale={service}={count}" for service, count in (scale or {}).items()]
        try:
            await self.compose("up", "--detach", "--wait", f"--wait-timeout={_UP_S}", *scales, *services)
        except ResourceError:
            raise
        except NodeError as error:
            raise await self._why(error) from None

    async def _why(self, error: NodeError) -> NodeError:
        """The last words of a container that ended, also of one that was started again since."""
        for container in await self.containers():
            lines = (await self.logs(container)).splitlines()
            said = next((line for line in reversed(lines) if line.startswith(_LAST_WORDS)), None)
            if said is not None:
                return NodeError(f"{container.name} ended: {said.removeprefix(_LAST_WORDS)}")
            if container.exit_code == _KILLED or container.restarts:
                return ResourceError(
                    f"{container.name} ended without a word, most likely for want of memory: raise its memory limit"
                )
        return error

    async def logs(self, container: Container) -> str:
        """Everything a container wrote, stdout and stderr."""
        process = await asyncio.create_subprocess_exec(
            "docker", "logs", container.id, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        return (await process.communicate())[0].decode(errors="replace")

    async def containers(self) -> list[Container]:
        """All of the project, running or not, in order of service and number."""
        label = f"label=com.docker.compose.project={self.name}"
        ids = (await docker("ps", "--all", "--quiet", "--no-trunc", "--filter", label)).split()
        found = json.loads(await docker("inspect", *ids)) if ids else []
        return sorted(map(_container, found), key=lambda container: (container.service, container.number))

    async def down(self) -> None:
        """Remove containers, networks and volumes, whatever state they are in."""
        await self.compose("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "60")


def _container(found: dict[str, Any]) -> Container:
    labels, state = found["Config"]["Labels"], found["State"]
    networks = found["NetworkSettings"]["Networks"].values()
    return Container(
        id=found["Id"],
        service=labels["com.docker.compose.service"],
        number=int(labels.get("com.docker.compose.container-number", "1")),
        state=state["Status"],
        exit_code=state["ExitCode"],
        restarts=found.get("RestartCount", 0),
        addresses=tuple(network["IPAddress"] for network in networks if network["IPAddress"]),
    )


async def _main(verb: str) -> None:
    project = Project([_DEPLOY / "compose.yaml"], profiles=["observe"] if os.environ.get("OBSERVE") else [])
    if verb == "down":
        return await project.down()
    await check_tools()
    await project.up()


if __name__ == "__main__":
    from braniac.node.failures import explain

    try:
        asyncio.run(_main(sys.argv[1]))
    except NodeError as error:
        sys.exit(explain(error))
