"""Commands about this node's key: show who it is, keep a copy, take one back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from braniac.node import commands
from braniac.node.cli_options import ConfigFile, Force, Json, Sets, StateDir, node_config

identity_app = typer.Typer(help="Look after this node's key.", no_args_is_help=True)


@identity_app.command("show")
def show(json: Json = False, state_dir: StateDir = None, config: ConfigFile = None, set_: Sets = None) -> None:
    """Show who this node is to others.

    \b
    Examples:
      braniac-node identity show
      braniac-node identity show --json | jq -r .peer_id
    """
    from braniac.node import identity_copy
    from braniac.protocol.identity import peer_id_text

    folder = node_config(config, set_, state__dir=state_dir).state.dir
    peer = peer_id_text(identity_copy.own(folder).peer_id)
    content = {"peer_id": peer, "file": str(identity_copy.path_in(folder))}
    typer.echo(commands.json_text(content) if json else commands.aligned_text(content))


@identity_app.command("export")
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to put the copy; readable by you only.")],
    force: Force = False,
    json: Json = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Copy the key to a file, as a backup.

    Whoever has the file can be this node. Two nodes with one key are found out, and one of them stops.

    \b
    Examples:
      braniac-node identity export ~/backup/braniac.key
      braniac-node identity export /media/stick/braniac.key --force
    """
    from braniac.node import identity_copy
    from braniac.protocol.identity import peer_id_text

    identity = identity_copy.export(node_config(config, set_, state__dir=state_dir).state.dir, file, overwrite=force)
    content = {"peer_id": peer_id_text(identity.peer_id), "file": str(file)}
    typer.echo(commands.json_text(content) if json else f"wrote the key of {content['peer_id']} to {file}")


@identity_app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A key that `identity export` wrote.")],
    force: Force = False,
    json: Json = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Take over a key from a file.

    Not while a node runs on the state directory, nor into one that holds another key's checkpoints.

    \b
    Examples:
      braniac-node identity import ~/backup/braniac.key
      braniac-node identity import ~/backup/braniac.key --state-dir state/new
    """
    from braniac.node import identity_copy
    from braniac.protocol.identity import peer_id_text

    folder = node_config(config, set_, state__dir=state_dir).state.dir
    identity = identity_copy.import_(folder, file, overwrite=force)
    content = {"peer_id": peer_id_text(identity.peer_id), "file": str(identity_copy.path_in(folder))}
    typer.echo(commands.json_text(content) if json else f"this node is {content['peer_id']} now")
