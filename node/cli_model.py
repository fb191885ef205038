"""Commands about models rather than about a node: train one, measure one, turn one into another."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from braniac.node import commands
from braniac.node.cli_options import (
    ConfigFile,
    HeldOutData,
    Json,
    Sets,
    StateDir,
    TrainingData,
    merged,
    node_config,
)
from braniac.node.errors import ConfigError

model_app = typer.Typer()


@model_app.command()
def train(
    data: TrainingData = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the checkpoints; default: trained.")
    ] = None,
    restart: Annotated[
        bool, typer.Option("--restart/--resume", help="Discard the checkpoints in --out, or go on from the newest.")
    ] = False,
    config: ConfigFile = None,
    set_: Sets = None,
    show_config: Annotated[
        bool, typer.Option("--show-config", help="Print every setting as a file for --config, and stop.")
    ] = False,
    json: Json = False,
) -> None:
    """Train a model on this device alone.

    Progress goes to stderr, the result to stdout. SIGTERM or Ctrl-C finish the step in hand and save; the same command
    then goes on from there, to the same weights as without the interruption. Losses are in nats per token.

    \b
    Examples:
      braniac-node train
      braniac-node train --data ~/books --out mine --set model.preset=small --set train.steps=5000
      braniac-node train --set objective.mode=joint --set objective.alphas=4,2,1,1 --set optimizer.learning_rate=0.01
      braniac-node train --config joint.toml --set objective.alphas.0=2.0 --show-config
    """
    from braniac.node.train_config import TrainConfig

    settings = merged(TrainConfig, config, set_, data__paths=data, out__dir=out)
    if show_config:
        from braniac.node.settings_merge import render_toml

        typer.echo(render_toml(settings), nl=False)
        return
    from braniac.node import train_command

    result = train_command.train(
        settings, restart=restart, say=lambda line: typer.echo(line, err=True), clock=time.monotonic
    )
    typer.echo(commands.json_text(result) if json else train_command.result_text(result))


@model_app.command()
def profile(
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Checkpoint to time; default: a preset, untrained.")
    ] = None,
    preset: Annotated[str, typer.Option(metavar="NAME", help="Preset to time: tiny, small, ...")] = "small",
    widths: Annotated[str | None, typer.Option(metavar="W,W,...", help="FFN widths; default: the tiers'.")] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="T,T,...", help="Sequence lengths; default: the context, a half, a quarter.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=4096, metavar="N", help="Sequences at once.")] = 1,
    decode: Annotated[
        bool, typer.Option("--decode", help="Time one new token after LENGTH cached ones, as text is written.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, max=256, metavar="N", help="CPU threads.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, max=1000, metavar="N", help="Repetitions; the median counts.")] = 7,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="Also draw a picture.")] = None,
    json: Json = False,
) -> None:
    """Time attention against FFN, by width and sequence length.

    Names the knee: the width below which narrowing the FFN further saves little.

    \b
    Examples:
      braniac-node profile --preset small --png profile.png
      braniac-node profile --folder out/step-1000 --decode --lengths 64,255
    """
    from braniac.node import profile_command

    measured = profile_command.profile_model(
        preset=preset,
        folder=folder,
        widths=None if widths is None else commands.parse_integers("--widths", widths),
        lengths=None if lengths is None else commands.parse_integers("--lengths", lengths),
        batch=batch,
        decode=decode,
        threads=threads,
        rounds=rounds,
    )
    if png is not None:
        profile_command.draw(measured, png)
    as_json = profile_command.profile_json(measured)
    typer.echo(commands.json_text(as_json) if json else profile_command.profile_text(measured))


@model_app.command()
def mixnmatch(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint that was trained at several widths.")],
    budget: Annotated[
        float | None, typer.Option(metavar="X", help="The most that the model may cost, in --unit.")
    ] = None,
    unit: Annotated[
        str,
        typer.Option(metavar="UNIT", help="parameters, flops (of one token) or seconds (of a forward pass, measured)."),
    ] = "parameters",
    length: Annotated[
        int | None,
        typer.Option(min=1, metavar="T", help="Tokens that flops attend to, or seconds are for; default: the context."),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(metavar="W,W,...", help="FFN widths to choose from; default: the tiers' and those halfway."),
    ] = None,
    data: HeldOutData = None,
    refined: Annotated[
        bool, typer.Option("--refine", help="Improve the choice by measuring the maps near it. Takes much longer.")
    ] = False,
    recipe: Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="Write the choice to FILE.")] = None,
    use: Annotated[
        Path | None, typer.Option("--use", metavar="FILE", help="Take the map in this recipe instead of choosing one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write the model that the map makes, on its own.")
    ] = None,
    json: Json = False,
) -> None:
    """Choose an FFN width for every layer of a model.

    Measures what narrowing each layer costs in loss, and finds the map of the least sum within the budget. PERMUTED is
    the loss of the same map with each layer's neurons in random order: what the nesting is worth. The sum is only a
    guess at the loss; --refine goes on from there with real losses.

    \b
    Examples:
      braniac-node mixnmatch out/step-1000 --budget 300000 --recipe r.json --out mixed
      braniac-node mixnmatch out/step-1000 --budget 0.01 --unit seconds --length 64
      braniac-node mixnmatch out/step-1000 --use r.json --out mixed
    """
    from braniac.node import mixnmatch_command

    if (budget is None) == (use is None):
        raise ConfigError("mixnmatch needs either a --budget to choose a map for or a recipe to --use")
    text = node_config(None, None, data__paths=data).data
    if use is not None:
        result = mixnmatch_command.use_recipe(folder, use, data=text, out=out)
    else:
        assert budget is not None
        result = mixnmatch_command.choose_map(
            folder,
            budget=budget,
            unit=unit,
            length=length,
            widths=None if widths is None else commands.parse_integers("--widths", widths),
            data=text,
            recipe=recipe,
            out=out,
            refined=refined,
        )
    typer.echo(commands.json_text(result) if json else mixnmatch_command.mixnmatch_text(result))


@model_app.command()
def export(
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder or file to write.")],
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Checkpoint folder to export; default: what the node has.")
    ] = None,
    weights: Annotated[
        Literal["agreed", "own"],
        typer.Option(help="Of a node: what the swarm agreed on, or with its own work."),
    ] = "agreed",
    form: Annotated[
        Literal["folder", "gguf"], typer.Option("--format", help="A Hugging Face folder, or a file for llama.cpp.")
    ] = "folder",
    tier: Annotated[int | None, typer.Option(min=0, metavar="T", help="Only this tier.")] = None,
    width: Annotated[int | None, typer.Option(min=1, metavar="W", help="Only the first W FFN neurons.")] = None,
    tiers: Annotated[
        str | None, typer.Option(metavar="1,2,...", help="Everything, and these tiers as OUT-tier1, ... beside it.")
    ] = None,
    dtype: Annotated[Literal["f32", "bf16", "f16"], typer.Option(help="Precision of the weights.")] = "f32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
    set_: Sets = None,
    json: Json = False,
) -> None:
    """Write a model, or any slice of it, for other programs.

    A llama-family model becomes a stock LlamaForCausalLM. What is written appears whole or not at all.

    \b
    Examples:
      braniac-node export exported
      braniac-node export exported --folder trained/step-1000 --tiers 1,2,3 --dtype bf16
      braniac-node export model.gguf --folder trained/step-1000 --format gguf --tier 2 --dtype f16
    """
    settings = node_config(config, set_, state__dir=state_dir)
    from braniac.node import export_command

    written = export_command.export(
        target,
        folder=folder,
        state_dir=settings.state.dir,
        data=settings.data,
        weights=weights,
        form=form,
        tier=tier,
        width=width,
        tiers=None if tiers is None else commands.parse_tiers(tiers),
        dtype=dtype,
        overwrite=overwrite,
    )
    typer.echo(commands.json_text(written) if json else commands.aligned_text(written))


@model_app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint that was trained at one width.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    ordering: Annotated[
        Literal["activation", "fisher", "norm", "random"],
        typer.Option(help="What makes a neuron important; random is the control."),
    ] = "activation",
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="PATH", help="Text to sort by and measure on; repeatable.")
    ] = None,
    json: Json = False,
) -> None:
    """Sort a dense model's neurons so that narrow widths work.

    The whole model computes what it did before. Prints the loss at every tier, in nats per token; training it further
    at several widths then lowers the narrow ones. A model that was trained at several widths is sorted already.

    \b
    Examples:
      braniac-node convert dense nested --data ~/books
      braniac-node convert dense nested --ordering norm --json
    """
    from braniac.node import convert_command

    text = node_config(None, None, data__paths=data).data
    result = convert_command.convert(source, target, ordering=ordering, data=text)
    typer.echo(commands.json_text(result) if json else convert_command.convert_text(result))
