"""Commands about settings: what they are, where they came from, and whether a file of them is right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from braniac.node import commands
from braniac.node.cli_options import ConfigFile, Json, Sets, StateDir, merged_with_origins

config_app = typer.Typer(help="Look at the configuration.", no_args_is_help=True)


@config_app.command("show")
def show(
    origins: Annotated[bool, typer.Option("--origins", help="Say of each value where it came from.")] = False,
    json: Json = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Print every setting as a file for --config.

    Without --config, ~/.config/braniac/node.toml (or what XDG_CONFIG_HOME says) is read if it is there.

    \b
    Examples:
      braniac-node config show > node.toml
      braniac-node config show --config node.toml --set train.tier=2
      braniac-node config show --origins | grep -v 'from the defaults'
    """
    from braniac.node.config import NodeConfig
    from braniac.node.settings_merge import render_toml, values_and_origins

    settings, found = merged_with_origins(NodeConfig, config, set_, state__dir=state_dir)
    if json:
        typer.echo(commands.json_text(values_and_origins(settings, found)))
    else:
        typer.echo(render_toml(settings, found if origins else None), nl=False)


@config_app.command("check")
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="TOML file with settings.")], json: Json = False
) -> None:
    """Say whether a file of settings can be used.

    Exit code 2, with the first mistake in one sentence, if it cannot.

    \b
    Examples:
      braniac-node config check node.toml
      braniac-node config check node.toml && systemctl restart braniac-node
    """
    from braniac.node.config import NodeConfig
    from braniac.node.settings_merge import load_with_origins

    _, found = load_with_origins(NodeConfig, file, {}, (), {})
    keys = sorted(".".join(path) for path in found)
    if json:
        typer.echo(commands.json_text({"ok": True, "file": str(file), "keys": keys}))
    else:
        typer.echo(f"{file} is fine and sets {', '.join(keys) or 'nothing'}")
