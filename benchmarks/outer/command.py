"""Options that the comparing scripts share, and what they mean."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from braniac.model.config import ModelConfig
from braniac.model.errors import DataError, ModelError
from braniac.model.fragments import fragment_table
from braniac.model.sources import Corpus
from braniac.model.tokenizer import ByteTokenizer
from braniac.node.config import DataSection
from braniac.node.founding import TURNS
from braniac.node.text import text_source
from braniac.protocol.codec import CodecRules
from braniac.protocol.errors import ProtocolError
from braniac.protocol.manifest import MergeRules
from outer.braniac import manifest_of
from outer.methods import Method, chosen
from outer.results import Results
from outer.swarm import MICRO, TILE, Plan

MODEL = ModelConfig(
    hidden_size=128,
    num_hidden_layers=5,
    num_attention_heads=2,
    intermediate_size=512,
    context=64,
    matformer_factor=1,
)
"""1,048,576 parameters in 256 tiles of 64x64."""

MODELS = {"1m": MODEL, "82k": replace(MICRO, matformer_factor=1)}
"""By parameters; the smaller one has 81,920 in 20 tiles."""

QUICK = Plan(config=MODELS["82k"], tiers=(0,) * 4, windows=4, steps=8, batch=4, fragments=4, evaluated=64)
"""Shows that everything runs, not who wins."""

PEERS_MAX = 256
"""Peers' keys are made from a number of one byte."""


def parser(description: str) -> argparse.ArgumentParser:
    """With the options of every comparison."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--methods", help="which, by name, with commas (default: all)")
    made.add_argument("--data", nargs="+", default=[], help="files, folders or hf:// (default: the standard library)")
    made.add_argument("--seeds", type=positive, default=3, help="how many (default: 3)")
    made.add_argument("--model", choices=MODELS, default="1m", help="its parameters: 1,048,576 or 81,920")
    made.add_argument("--peers", type=_up_to(PEERS_MAX), default=8)
    made.add_argument("--windows", type=positive, default=12, help="of H steps")
    made.add_argument("--steps", type=positive, default=30, help="H, inner steps per window")
    made.add_argument("--batch", type=positive, default=8, help="windows of text per step")
    made.add_argument("--fragments", type=positive, default=8, help="for methods that send parts in turn")
    made.add_argument("--up", type=_up_to(TILE), default=64, help="Braniac: values of 4096 that a peer sends")
    made.add_argument("--down", type=_up_to(TILE), default=512, help="Braniac: values of 4096 in a merged update")
    made.add_argument("--coverage", type=int, default=1, choices=(0, 1, 2), help="Braniac: normaliser, see merge.py")
    made.add_argument("--constant", action="store_true", help="learning rates do not fall at the end")
    made.add_argument("--quick", action="store_true", help="a small model, one seed, few steps: under a minute")
    made.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    made.add_argument("--results", type=Path, help="a new folder for CSV files, such as benchmarks/results/NAME")
    return made


def plan_of(options: argparse.Namespace) -> Plan:
    """The plan that options ask for; --quick decides all sizes."""
    plan = (
        QUICK
        if options.quick
        else Plan(
            config=MODELS[options.model],
            tiers=(0,) * options.peers,
            windows=options.windows,
            steps=options.steps,
            batch=options.batch,
            fragments=options.fragments,
        )
    )
    return replace(
        plan,
        cooldown=not options.constant,
        up=CodecRules(options.up, 1, TURNS),
        down=CodecRules(options.down, 2),
        merge=MergeRules(coverage_halves=options.coverage),
    )


def corpus_of(options: argparse.Namespace, plan: Plan) -> Corpus:
    """The text, read as bytes. Raises DataError if it is not there or too short for one batch or for evaluation."""
    corpus = text_source(DataSection(paths=tuple(options.data)), ByteTokenizer()).load(plan.config.vocab_size)
    # Evaluation windows may overlap, but not by more than seven eighths.
    for tokens, purpose, needed in (
        (corpus.train, "training", plan.batch * plan.config.context + 1),
        (corpus.held_out, "evaluation", plan.evaluated // 8 * plan.config.context + 1),
    ):
        held = sum(map(len, tokens))
        if held < needed:
            raise DataError(
                f"{corpus.name} holds {held} tokens for {purpose}, and {needed} are needed: give more text."
            )
    if options.model == "82k" or options.quick:
        # Each window of a mapped file is a page to be fetched: a seventh of the time of so short a step.
        train, held_out = (tuple(map(np.array, side)) for side in (corpus.train, corpus.held_out))
        return Corpus(corpus.name, train, held_out, skipped=corpus.skipped)
    return corpus


@dataclass(frozen=True)
class Setup:
    """All that a comparison needs before its first run."""

    methods: dict[str, Method]
    plan: Plan
    corpus: Corpus
    seeds: range
    results: Results | None


def set_up(options: argparse.Namespace, known: Mapping[str, Method], outer_rates: Sequence[float] = (1.0,)) -> Setup:
    """What options ask for, with the factors on Braniac's outer step that will be tried.

    Raises ValueError for an unknown method, OSError for a folder that exists, ModelError, and ManifestError for what
    no run of Braniac may have.
    """
    torch.set_num_threads(1)
    names = chosen(options.methods, list(known)) if options.methods else list(known)
    plan = plan_of(options)
    corpus = corpus_of(options, plan)
    fragment_table(plan.config, plan.fragments)  # refuses too many
    for rate in outer_rates if "braniac" in names else ():
        manifest_of(replace(plan, outer_rate=rate))
    results = Results(options.results) if options.results else None
    if results is not None:
        results.write_about(plan, vars(options))
    seeds = range(1 if options.quick else options.seeds)
    return Setup({name: known[name] for name in names}, plan, corpus, seeds, results)


def show(options: argparse.Namespace, setup: Setup, report: Mapping[str, object]) -> None:
    """Print a report, and what it was measured with."""
    found = {
        **report,
        "tokens_per_peer": setup.plan.tokens_per_peer,
        "peers": len(setup.plan.tiers),
        "seeds": len(setup.seeds),
        "text": setup.corpus.name,
    }
    print(json.dumps(found, indent=None if options.json else 2, allow_nan=False))


@contextmanager
def one_sentence(made: argparse.ArgumentParser) -> Iterator[None]:
    """What is asked for and cannot be done ends the program with its cause and exit code 2."""
    try:
        yield
    except (ModelError, ProtocolError, ValueError, OSError) as error:
        made.error(str(error))


def positive(text: str) -> int:
    """A number given as an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _up_to(most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if (value := positive(text)) > most:
            raise argparse.ArgumentTypeError(f"{text!r} is more than {most}")
        return value

    return number
