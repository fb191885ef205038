"""Commands about runs: sign one, tell others of it, count what it costs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from braniac.node import commands
from braniac.node.cli_options import ConfigFile, Force, Json, Sets, StateDir, node_config, running_node
from braniac.node.errors import ConfigError, NodeError

if TYPE_CHECKING:
    from braniac.node.config import NodeConfig
    from braniac.protocol.manifest import Manifest

run_app = typer.Typer()

_Peers = Annotated[int, typer.Option("--swarm-peers", min=1, max=4096, metavar="N", help="Assume so many peers.")]


@run_app.command()
def init(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Description of a run, YAML or TOML.", show_default=False)
    ] = None,
    example: Annotated[bool, typer.Option("--example", help="Print a description with comments, and stop.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write; default: beside FILE, ending in .braniac.")
    ] = None,
    force: Force = False,
    json: Json = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Describe a new run and sign it with this node's identity.

    What is signed cannot be changed any more, and its slots are counted from now on. `join --run` founds the run on
    the node that signed it, and joins it everywhere else.

    \b
    Examples:
      braniac-node init --example > run.yaml
      braniac-node init run.yaml
      braniac-node join --run run.braniac
    """
    if example:
        from braniac.node.run_example import EXAMPLE

        typer.echo(EXAMPLE, nl=False)
        return
    if file is None:
        raise ConfigError("init needs the description of a run: `braniac-node init --example > run.yaml` writes one")
    settings = node_config(config, set_, state__dir=state_dir)
    target = out or file.with_suffix(".braniac")
    if target.exists() and not force:  # said before anything is made
        raise ConfigError(f"{target} exists: choose another --out, or replace that run with --force")
    from braniac.node import identity_file, run_file, run_spec

    spec = run_spec.read_spec(file)
    _make(settings.state.dir)
    identity = identity_file.load_or_create(settings.state.dir / "identity.key")
    manifest, body, signature = run_spec.manifest_of(spec, identity, time.time())
    run_file.write(target, body, signature, overwrite=force)
    found = _costs(manifest, settings, peers=None)
    if json:
        typer.echo(commands.json_text({"file": str(target), **found["json"]}))
    else:
        command = f"braniac-node join --run {target}" + (f" --state-dir {state_dir}" if state_dir else "")
        typer.echo(f"{found['text']}\nwrote {target}; found the run with: {command}")


@run_app.command()
def link(
    qr: Annotated[bool, typer.Option("--qr", help="Also as a QR code, to be photographed from the terminal.")] = False,
    json: Json = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Print the link by which others join the running node's run.

    \b
    Examples:
      braniac-node link
      braniac-node link --qr
    """
    from braniac.node.join_link import link_for, qr_text

    reply = running_node(config, set_, state_dir).status(since_slot=1 << 62)
    found = link_for(reply.run_id, reply.addresses)
    if not reply.run_id or not found.addresses:
        raise NodeError(
            "the node has no run to join yet: try again when `braniac-node status` shows a run and addresses"
        )
    if json:
        typer.echo(commands.json_text({"link": str(found), "run_id": found.run_id, "addresses": found.addresses}))
        return
    typer.echo(str(found))
    if qr:
        typer.echo(qr_text(found), nl=False)


@run_app.command("costs")
def costs(
    link: Annotated[
        str | None, typer.Argument(metavar="[LINK]", help="Join link of the run.", show_default=False)
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", metavar="FILE", help="Run file instead of a link.")] = None,
    swarm_peers: _Peers = 8,
    json: Json = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Show what taking part in a run costs, without joining.

    Memory, disk and traffic by tier. With a link, a peer is asked for the run's manifest and nothing else.

    \b
    Examples:
      braniac-node costs --run run.braniac
      braniac-node costs braniac://02e0e79f...@/ip4/192.0.2.7/tcp/4001/p2p/12D3KooW...
      braniac-node costs --run run.braniac --swarm-peers 50 --set train.batch=16
    """
    if (link is None) == (run is None):
        raise ConfigError("costs needs either a join link or --run FILE: give one of them")
    settings = node_config(config, set_, state__dir=state_dir)
    if run is not None:
        from braniac.node import run_file

        manifest = run_file.read(run.expanduser())[0]
    else:
        assert link is not None
        from braniac.node.join_link import parse_link

        wanted = parse_link(link)  # first: what it takes to ask a peer takes seconds to load
        from braniac.node.logs import configure_logging
        from braniac.node.look import manifest_behind

        configure_logging("warning", settings.log.format)

        manifest = manifest_behind(wanted, settings.network.call_timeout_s)
    found = _costs(manifest, settings, swarm_peers)
    typer.echo(commands.json_text(found["json"]) if json else found["text"])


def _costs(manifest: Manifest, settings: NodeConfig, peers: int | None) -> dict[str, Any]:
    """The costs of a run as `json` and as `text`."""
    from braniac.node import bridge, consent
    from braniac.node import costs as counted
    from braniac.node.founding import train_settings
    from braniac.node.run_data import run_data

    model, peers = bridge.model_of(manifest)[0], peers or counted.PEERS
    training, text = train_settings(settings.train, manifest), run_data(manifest).text
    every = counted.costs_of(manifest, model, training, peers=peers, generations=settings.state.keep_generations)
    return {
        "json": counted.as_json(manifest, every, peers, text),
        "text": consent.description(manifest, every, None, text, peers),
    }


def _make(state_dir: Path) -> None:
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot keep a key in {state_dir} ({error.strerror}): choose another --state-dir") from None
