"""Commands about models rather than about a running node: use one, train one, measure one, turn one into another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from braniac.node import commands
from braniac.node.cli_options import ConfigFile, Json, Sets, StateDir, node_config

model_app = typer.Typer()


@model_app.command()
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
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Let the trained model write text.

    It is read from the node's last checkpoint; the node may be running or not.

    \b
    Examples:
      braniac-node generate "def main("
      braniac-node generate "import" --tokens 500 --temperature 0.5 --tier 3
    """
    settings = node_config(config, set_, state__dir=state_dir)
    from braniac.node import offline

    pieces = offline.generate(
        settings.state.dir, prompt, tokens=tokens, temperature=temperature, top_k=top_k, seed=seed, tier=tier
    )
    typer.echo(prompt, nl=False)
    for piece in pieces:
        typer.echo(piece, nl=False)
    typer.echo()


@model_app.command()
def evaluate(
    json: Json = False,
    tiers: Annotated[
        str | None, typer.Option(metavar="0,1,...", help="Slices to evaluate; default: all the node holds.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option("--data", metavar="PATH", help="Text whose held-out part to use; repeatable.")
    ] = None,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
) -> None:
    """Measure the trained model on held-out text.

    It is read from the node's last checkpoint; losses are in nats per byte.

    \b
    Examples:
      braniac-node evaluate
      braniac-node evaluate --tiers 0,3 --json
    """
    settings = node_config(config, set_, state__dir=state_dir, data__paths=data)
    wanted = None if tiers is None else commands.parse_tiers(tiers)
    from braniac.node import offline

    result = offline.evaluate(settings.state.dir, data=settings.data.paths, tiers=wanted)
    typer.echo(commands.json_text(result) if json else commands.aligned_text(result))
