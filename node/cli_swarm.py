"""Commands about a whole swarm: run one on this machine, watch one from within."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from braniac.node import commands
from braniac.node.cli_options import ConfigFile, Json, Sets, StateDir, node_config
from braniac.node.errors import ConfigError

swarm_app = typer.Typer()


@swarm_app.command()
def swarm(
    nodes: Annotated[int, typer.Option(min=1, max=64, metavar="N", help="How many daemons.")] = 4,
    tiers: Annotated[str, typer.Option(metavar="0,1,...", help="Their tiers, dealt out in turn.")] = "0,1,2,3",
    seconds: Annotated[float, typer.Option(min=1, max=86_400, metavar="S", help="How long to train.")] = 120.0,
    kill: Annotated[int, typer.Option(min=0, max=1000, metavar="N", help="How often to SIGKILL and restart one.")] = 0,
    faults: Annotated[
        str, typer.Option(metavar="KIND[:S],...", help="kill, pause, partition, cap or loss, in turn; S: for how long.")
    ] = "",
    engine: Annotated[
        Literal["processes", "docker"], typer.Option(help="Run daemons as processes, or in containers.")
    ] = "processes",
    deploy_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="With --engine docker: where compose.yaml is.")
    ] = Path("deploy"),
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the run and of the faults.")] = 0,
    preset: Annotated[str, typer.Option(metavar="tiny|small[-llama]", help="Model of the run.")] = "tiny",
    slot_s: Annotated[float, typer.Option(min=0.1, max=3600, metavar="S", help="Slot length in seconds.")] = 1.0,
    set_: Sets = None,
    keep_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep states and logs here instead of removing them.")
    ] = None,
    json: Json = False,
) -> None:
    """Run a whole swarm on this machine.

    Real daemons on loopback, some of them killed on the way, and a report at the end. Containers have limits like
    phones and can also be partitioned, held to 1 Mbit/s, or lose a fifth of all packets; who is hit follows from the
    seed. They need the compose files of a checkout.

    \b
    Examples:
      braniac-node swarm --nodes 4 --tiers 0,1,2,3 --seconds 120 --kill 2 --json
      braniac-node swarm --engine docker --nodes 7 --tiers 0,1,2,3 --slot-s 4 --seconds 300 --faults kill,partition,loss
    """
    from braniac.node.faults import Wish, parse
    from braniac.node.swarm_options import SwarmOptions

    preset = node_config(None, None, run__preset=preset).run.preset
    options = SwarmOptions(
        nodes=nodes, tiers=commands.parse_tiers(tiers), seconds=seconds, seed=seed, preset=preset,
        faults=(Wish("kill"),) * kill + parse(faults), slot_s=slot_s, sets=tuple(set_ or ()), keep_dir=keep_dir,
        json=json,
    )  # fmt: skip
    from braniac.node.swarm import run_swarm

    report = run_swarm(options, deploy_dir if engine == "docker" else None)
    typer.echo(commands.json_text(report) if json else commands.aligned_text(report))
    if not report["ok"]:
        raise typer.Exit(1)


@swarm_app.command()
def observe(
    link: Annotated[
        str | None, typer.Argument(metavar="[LINK]", help="Join link: braniac://RUN_ID@ADDR,...", show_default=False)
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option("--peers", metavar="ADDR", help="Peer to listen through, or @FILE of them; repeatable."),
    ] = None,
    run_id: Annotated[str | None, typer.Option(metavar="HEX", help="Observe this run and no other.")] = None,
    listen: Annotated[
        list[str] | None, typer.Option(metavar="ADDR", help="Multiaddr to listen on, e.g. /ip4/0.0.0.0/tcp/4001.")
    ] = None,
    metrics_port: Annotated[int | None, typer.Option(metavar="N", help="Port of /metrics; 0 is any free one.")] = None,
    log_format: Annotated[str | None, typer.Option(metavar="auto|console|json", help="How to write the log.")] = None,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Serve metrics about a whole run.

    An observer hears and verifies the heartbeats and certificates of all peers, also of those behind routers that
    nobody can scrape. It trains nothing, holds nothing and has no say. Its key is in the folder `observer` of the state
    directory, so it can run beside a node. SIGTERM or Ctrl-C stop it.

    \b
    Examples:
      braniac-node observe --peers /ip4/192.0.2.7/tcp/4001/p2p/12D3KooW... --metrics-port 9465
      braniac-node observe braniac://02e0e79f...@/ip4/192.0.2.7/tcp/4001/p2p/12D3KooW...
    """
    run_id, addresses = commands.whom_to_join(link, run_id, peers)
    settings = node_config(
        config,
        set_,
        network__peers=addresses,
        network__listen=commands.split_addresses(listen),
        network__run_id=run_id,
        state__dir=state_dir,
        metrics__port=metrics_port,
        log__format=log_format,
    )
    from braniac.node.logs import configure_logging

    configure_logging(settings.log.level, settings.log.format)
    from braniac.node.observer import run_observer

    raise typer.Exit(run_observer(settings))


@swarm_app.command()
def shape(
    tcp: Annotated[
        list[str] | None, typer.Option(metavar="PORT=HOST:PORT", help="TCP port to forward; repeatable.")
    ] = None,
    udp: Annotated[
        list[str] | None, typer.Option(metavar="PORT=HOST:PORT", help="UDP port to forward; repeatable.")
    ] = None,
    delay_ms: Annotated[float, typer.Option(min=0, max=60_000, metavar="MS", help="Delay in each direction.")] = 0.0,
    jitter_ms: Annotated[float, typer.Option(min=0, max=60_000, metavar="MS", help="Up to so much more.")] = 0.0,
    kbit_per_s: Annotated[
        float, typer.Option(min=0, metavar="N", help="Bandwidth of each direction of a stream; 0: any.")
    ] = 0.0,
    loss_percent: Annotated[
        float, typer.Option(min=0, max=100, metavar="N", help="Share of UDP datagrams that vanish.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of jitter and loss.")] = 0,
) -> None:
    """Forward ports over a slow line.

    With delay, jitter and a bandwidth, for trying out peers behind bad connections where the kernel cannot delay
    packets. Ctrl-C or SIGTERM stop it.

    \b
    Example:
      braniac-node shape --tcp 4002=192.0.2.7:4001 --delay-ms 150 --jitter-ms 50 --kbit-per-s 1000
    """
    if not tcp and not udp:
        raise ConfigError("there is nothing to forward: give --tcp or --udp, as in --tcp 4002=192.0.2.7:4001")
    from braniac.node import shaper

    line = shaper.Line(delay_ms / 1e3, jitter_ms / 1e3, kbit_per_s * 125, loss_percent / 100)
    streams, datagrams = (tuple(map(shaper.Forward.parse, texts or ())) for texts in (tcp, udp))
    raise typer.Exit(shaper.run_shaper(streams, datagrams, line, seed))
