"""Options that several commands share, and the configuration that they add up to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from braniac.node.config import NodeConfig

ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="TOML file with settings.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. train.batch=4; repeatable. Flags win over it."),
]
StateDir = Annotated[
    Path | None, typer.Option("--state-dir", metavar="DIR", help="Folder of the node's key and state.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def node_config(file: Path | None, sets: Sequence[str] | None, **flags: object) -> NodeConfig:
    """A node's configuration from all five layers; a flag's keyword is its setting's key with `__` for the dot."""
    from braniac.node.settings_merge import load_config

    return load_config(file, os.environ, sets or (), {key.replace("__", "."): flag for key, flag in flags.items()})
