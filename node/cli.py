"""The command line: what each verb takes. Results go to stdout, logs and errors to stderr.

torch, hivemind, grpc, even pydantic are imported inside the command that needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from braniac.node import commands
from braniac.node.cli_config import config_app
from braniac.node.cli_daemon import daemon_app
from braniac.node.cli_doctor import doctor_app
from braniac.node.cli_identity import identity_app
from braniac.node.cli_model import model_app
from braniac.node.cli_options import ConfigFile, HeldOutData, Json, Sets, StateDir, TrainingData, node_config
from braniac.node.cli_run import run_app
from braniac.node.cli_swarm import swarm_app
from braniac.node.failures import explain
from braniac.protocol.limits import PROTOCOL_VERSION

app = typer.Typer(
    name="braniac-node",
    help="Train one language model together with strangers' devices.",
    epilog="Exit codes: 0 clean, 1 failed, 2 wrong use or setting, 4 already running, 5 another run or protocol, "
    "6 key file unusable or in use elsewhere, 7 port, socket, memory or disk, 8 unreadable state, 9 no node running, "
    "10 and 11 the warnings and errors of doctor.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.add_typer(config_app, name="config")
app.add_typer(identity_app, name="identity")
app.add_typer(run_app)
app.add_typer(doctor_app)
app.add_typer(daemon_app)
app.add_typer(model_app)
app.add_typer(swarm_app)


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something unexpected fails.")] = False,
) -> None:
    if debug:
        os.environ["BRANIAC_DEBUG"] = "1"  # in the environment, so that the daemons of `swarm` inherit it


@app.command()
def join(
    link: Annotated[
        str | None, typer.Argument(metavar="[LINK]", help="Join link: braniac://RUN_ID@ADDR,...", show_default=False)
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option("--peers", metavar="ADDR", help="Peer to join through, or @FILE of them; repeatable."),
    ] = None,
    tier: Annotated[str | None, typer.Option(metavar="auto|0..3", help="Part of the model to hold; 0 is all.")] = None,
    data: TrainingData = None,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="FILE", help="Found or join the run that `init` wrote to this file.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before the first download.")] = False,
    preset: Annotated[str | None, typer.Option(metavar="tiny|small[-llama]", help="Model of a new run.")] = None,
    run_id: Annotated[str | None, typer.Option(metavar="HEX", help="Join this run and no other.")] = None,
    listen: Annotated[
        list[str] | None, typer.Option(metavar="ADDR", help="Multiaddr to listen on, e.g. /ip4/0.0.0.0/tcp/4001.")
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(metavar="N", help="Port of /metrics; 0 is any free one.")] = None,
    web: Annotated[
        bool | None, typer.Option("--web/--no-web", help="Serve a page with charts and buttons on this machine.")
    ] = None,
    log_format: Annotated[str | None, typer.Option(metavar="auto|console|json", help="How to write the log.")] = None,
) -> None:
    """Train with others: join, resume or found a run.

    With a link or --peers it joins their run; without, it resumes the one in the state directory or founds one. On a
    terminal it says what a run will cost and asks before it downloads anything for the first time. SIGTERM, Ctrl-C or
    `braniac-node leave` finish the slot in hand and stop it, a second signal stops at once; killed in any other way, it
    goes on from its last checkpoint.

    \b
    Examples:
      braniac-node join
      braniac-node join braniac://02e0e79f...@/ip4/192.0.2.7/tcp/4001/p2p/12D3KooW...
      braniac-node join --peers /ip4/192.0.2.7/tcp/4001/p2p/12D3KooW... --tier 2 --data ~/books
      braniac-node join --run run.braniac
      braniac-node join --config node.toml --set train.threads=2 --metrics-port 9464
      braniac-node join --web --set web.port=9470
    """
    run_id, addresses = commands.whom_to_join(link, run_id, peers)
    settings = node_config(
        config,
        set_,
        network__peers=addresses,
        network__listen=commands.split_addresses(listen),
        network__run_id=run_id,
        run__preset=preset,
        run__file=run,
        train__tier=tier,
        data__paths=data,
        state__dir=state_dir,
        metrics__port=metrics_port,
        web__enabled=web,
        log__format=log_format,
    )
    from braniac.node.logs import configure_logging

    configure_logging(settings.log.level, settings.log.format)
    from braniac.node.consent import terminal_ask
    from braniac.node.service import run_daemon

    raise typer.Exit(run_daemon(settings, ask=None if yes else terminal_ask()))


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(metavar="TEXT", help="How the text begins.")],
    tokens: Annotated[int, typer.Option(min=1, max=100_000, metavar="N", help="How many tokens to write.")] = 200,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, metavar="X", help="0 always takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, metavar="K", help="Choose among the K likeliest; 0: all.")] = 40,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="The same seed gives the same text.")] = 0,
    tier: Annotated[
        int | None, typer.Option(min=0, max=3, metavar="0..3", help="Use this slice of the model; default: all held.")
    ] = None,
    draft_tier: Annotated[
        int | None, typer.Option(min=0, max=3, metavar="0..3", help="Let this slice draft: same texts, other speed.")
    ] = None,
    beams: Annotated[
        int, typer.Option(min=1, max=64, metavar="N", help="Search for the likeliest text with N beams; 1: sample.")
    ] = 1,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Use the model in this folder instead of the node's own.")
    ] = None,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Let the trained model write text.

    It is read from the node's last checkpoint, or from a folder that `export` or `train` wrote; the node may be
    running or not.

    \b
    Examples:
      braniac-node generate "def main("
      braniac-node generate "def main(" --draft-tier 3
      braniac-node generate "def main(" --beams 4 --folder exported/
      braniac-node generate "import" --tokens 500 --temperature 0.5 --tier 3
    """
    settings = node_config(config, set_, state__dir=state_dir)
    from braniac.node import offline

    pieces = offline.generate(
        settings.state.dir, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed, tier=tier,
        data=settings.data, folder=folder, draft_tier=draft_tier, beams=beams,
    )  # fmt: skip
    typer.echo(prompt, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()


@app.command()
def evaluate(
    json: Json = False,
    tiers: Annotated[
        str | None, typer.Option(metavar="0,1,...", help="Slices to evaluate; default: all the node holds.")
    ] = None,
    data: HeldOutData = None,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Measure the trained model on held-out text.

    It is read from the node's last checkpoint; losses are in nats per token, which is a byte unless the run has a
    tokenizer.

    \b
    Examples:
      braniac-node evaluate
      braniac-node evaluate --tiers 0,3 --json
    """
    settings = node_config(config, set_, state__dir=state_dir, data__paths=data)
    wanted = None if tiers is None else commands.parse_tiers(tiers)
    from braniac.node import offline

    result = offline.evaluate(settings.state.dir, data=settings.data, tiers=wanted)
    typer.echo(commands.json_text(result) if json else commands.aligned_text(result))


@app.command()
def version() -> None:
    """Print the version of the program and of the protocol."""
    from importlib.metadata import version as package_version

    typer.echo(f"braniac-node {package_version('braniac-node')}, protocol {PROTOCOL_VERSION}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what was expected to fail ends in one sentence on stderr."""
    try:
        app(args=arguments, prog_name="braniac-node")
    except (
        SystemExit
    ) as exit_:  # also after Ctrl-C (130), wrong use (2), and when the reader of our output went away (1)
        return exit_.code if isinstance(exit_.code, int) else 0
    except Exception as error:
        return explain(error)
    return 0
