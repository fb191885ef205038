"""Options that several commands share, and the configuration that they add up to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:  # pydantic and grpc load only for the commands that need them
    from braniac.node.config import NodeConfig, Root
    from braniac.node.control_client import ControlClient

_Root = TypeVar("_Root", bound="Root")

ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file with settings, instead of the default one.")
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. train.batch=4; repeatable. Flags win over it."),
]
StateDir = Annotated[
    Path | None, typer.Option("--state-dir", metavar="DIR", help="Folder of the node's key and state.")
]
TrainingData = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="PATH", help="Text file, folder or hf://DATASET to train on; repeatable."),
]
HeldOutData = Annotated[
    list[str] | None, typer.Option("--data", metavar="PATH", help="Text whose held-out part to use; repeatable.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def merged(root: type[_Root], file: Path | None, sets: Sequence[str] | None, **flags: object) -> _Root:
    """Configuration from all five layers; a flag's keyword is its setting's key with `__` for the dot."""
    return merged_with_origins(root, file, sets, **flags)[0]


def merged_with_origins(
    root: type[_Root], file: Path | None, sets: Sequence[str] | None, **flags: object
) -> tuple[_Root, Mapping[tuple[str, ...], str]]:
    """The same, and who set each (section, key) that is not as by default."""
    from braniac.node.settings_merge import load_with_origins

    if file is None and root.DEFAULT_FILE is not None and (default := root.DEFAULT_FILE()).exists():
        file = default
    named = {key.replace("__", "."): flag for key, flag in flags.items()}
    return load_with_origins(root, file, os.environ, sets or (), named)


def node_config(file: Path | None, sets: Sequence[str] | None, **flags: object) -> NodeConfig:
    """A node's configuration."""
    from braniac.node.config import NodeConfig as Node

    return merged(Node, file, sets, **flags)


def running_node(file: Path | None, sets: Sequence[str] | None, state_dir: Path | None) -> ControlClient:
    """The way to the node that runs on a state directory; whether one does, the first call tells."""
    from braniac.node.control_client import ControlClient as Client

    return Client(node_config(file, sets, state__dir=state_dir).control_socket)
