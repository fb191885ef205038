"""Commands about a running node: how it does, whom it knows, and that it shall rest, go on or stop."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Literal

import typer

from braniac.node import commands, replies
from braniac.node.cli_options import ConfigFile, Json, Sets, StateDir, node_config, running_node

daemon_app = typer.Typer()

_FOLLOW_S = 0.25


@daemon_app.command()
def status(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show it live, until q or Ctrl-C.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Print nothing: exit 0 if the node trains or is paused, 1 if not.")
    ] = False,
    json: Json = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Show what the running node is doing.

    \b
    Examples:
      braniac-node status
      braniac-node status --watch
      braniac-node status --json | jq .slot
      braniac-node status --check && echo well
    """
    client = running_node(config, set_, state_dir)
    if check:
        raise typer.Exit(0 if replies.is_well(client) else 1)
    if watch:
        from braniac.node.watch import watch as watch_until_left

        watch_until_left(client, json=json)
        return
    reply = client.status()
    typer.echo(commands.json_text(commands.message_dict(reply)) if json else replies.status_text(reply))


@daemon_app.command()
def peers(json: Json = False, state_dir: StateDir = None, config: ConfigFile = None, set_: Sets = None) -> None:
    """List the peers that the running node knows.

    \b
    Examples:
      braniac-node peers
      braniac-node peers --json | jq '.peers[].peer_id'
    """
    reply = running_node(config, set_, state_dir).peers()
    typer.echo(commands.json_text(commands.message_dict(reply)) if json else replies.peers_text(reply))


@daemon_app.command()
def pause(
    for_: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="Go on after this time, e.g. 90s, 2h or 1h30m.")
    ] = None,
    finish: Annotated[bool, typer.Option("--finish", help="Finish the slot in hand first.")] = False,
    json: Json = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Let the running node rest.

    It stops training and all traffic, keeps its place and its work, and goes on after `braniac-node resume` or when the
    time is over.

    \b
    Examples:
      braniac-node pause
      braniac-node pause --for 2h30m
      braniac-node pause --finish --for 8h
    """
    seconds = 0.0 if for_ is None else commands.parse_duration_s("--for", for_)
    running_node(config, set_, state_dir).pause(seconds, finish)
    if json:
        typer.echo(commands.json_text({"pause": True, "seconds": seconds or None, "finish": finish}))
        return
    how = "finishes the slot in hand and rests" if finish else "rests"
    end = f"for {commands.duration_text(seconds)}" if seconds else "until 'braniac-node resume'"
    typer.echo(f"the node {how} {end}")


@daemon_app.command()
def finish(json: Json = False, state_dir: StateDir = None, config: ConfigFile = None, set_: Sets = None) -> None:
    """Let the running node rest after the slot in hand.

    The same as `braniac-node pause --finish`.

    \b
    Example:
      braniac-node finish
    """
    pause(for_=None, finish=True, json=json, state_dir=state_dir, config=config, set_=set_)


@daemon_app.command()
def resume(json: Json = False, state_dir: StateDir = None, config: ConfigFile = None, set_: Sets = None) -> None:
    """Let a paused node go on.

    It ends what `pause` or `finish` began. Where the policy wants it to rest, it still does, and this says why.

    \b
    Examples:
      braniac-node resume
      braniac-node resume --json | jq '.reasons[].code'
    """
    reply = running_node(config, set_, state_dir).resume()
    if json:
        typer.echo(commands.json_text(commands.message_dict(reply)))
    elif reply.reasons:
        typer.echo("the node still rests: " + "; ".join(reason.sentence or reason.code for reason in reply.reasons))
    else:
        typer.echo("the node goes on")


@daemon_app.command()
def contributions(
    top: Annotated[int, typer.Option(min=1, metavar="N", help="How many peers to list.")] = 20,
    json: Json = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """List who contributed how much.

    A leaderboard by merged tokens, counted from the certificates that the running node has seen.

    \b
    Examples:
      braniac-node contributions
      braniac-node contributions --json | jq '.contributors[] | select(.me)'
    """
    reply = running_node(config, set_, state_dir).contributions()
    typer.echo(commands.json_text(commands.message_dict(reply)) if json else replies.contributions_text(reply, top))


@daemon_app.command()
def logs(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is written from now on.")] = False,
    lines: Annotated[
        int, typer.Option("--lines", "-n", min=0, metavar="N", help="How many lines to begin with.")
    ] = 100,
    level: Annotated[
        Literal["debug", "info", "warning", "error"], typer.Option(help="The least important messages to show.")
    ] = "debug",
    json: Annotated[bool, typer.Option("--json", help="Print the lines as they are, a JSON object each.")] = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Show what the node has logged.

    It is read from the state directory; the node may be running or not.

    \b
    Examples:
      braniac-node logs
      braniac-node logs -f --level warning
      braniac-node logs -n 1000 --json | jq 'select(.outcome == "missed")'
    """
    settings = node_config(config, set_, state__dir=state_dir)
    from braniac.node import log_view
    from braniac.node.logs import render_line

    def wait() -> None:
        sys.stdout.flush()
        time.sleep(_FOLLOW_S)

    colors = sys.stdout.isatty()
    for line in log_view.lines(log_view.log_path(settings.state.dir), lines, level, wait if follow else None):
        typer.echo(line if json else render_line(line, colors=colors))


@daemon_app.command()
def leave(
    now: Annotated[bool, typer.Option("--now", help="Do not finish the slot in hand.")] = False,
    json: Json = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Ask the running node to stop.

    It finishes the slot in hand and says goodbye first.

    \b
    Examples:
      braniac-node leave
      braniac-node leave --now
    """
    running_node(config, set_, state_dir).leave(now=now)
    if json:
        typer.echo(commands.json_text({"leave": True, "now": now}))
        return
    typer.echo("the node stops now" if now else "the node finishes the slot in hand and stops")
