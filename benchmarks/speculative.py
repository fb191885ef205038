"""Speculative decoding against plain decoding, end to end and in turns, by drafter width and block length.

    python benchmarks/speculative.py --checkpoint joint.safetensors --json     a model trained before
    python benchmarks/speculative.py --preset tiny --steps 200 --json          trains all widths of one jointly first
    python benchmarks/speculative.py --cost 768x12x6144 --json                 only what a pass costs, random weights

Prints one JSON object; the keys:

    plain      tokens_per_s of decoding without a drafter, median over the prompts
    settings   per drafter and block: accept_rate (of the tokens drafted), rollback_rate (drafts of which a part was
               refused), tokens_per_s, speedup (median over the prompts, each against plain decoding of that prompt),
               and at temperature 0 same_text: share of the prompts for which both wrote the same
    best       the setting that was fastest on every other prompt, as it did on the remaining ones
    cost       milliseconds of one pass by width and number of tokens, the fastest of many; per drafter what a pass
               costs as a share of the verifier's, and the least accept rate that makes some block length pay

Plain decoding runs several times per prompt, between the settings, so that both see the same state of the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from braniac.model.checkpoint import from_safetensors
from braniac.model.config import PRESETS, ModelConfig
from braniac.model.data import Batches
from braniac.model.decoding import generate
from braniac.model.gpt import GPT
from braniac.model.objective import ObjectiveSettings
from braniac.model.reader import Reader
from braniac.model.speculative import SpeculationStats, speculate
from braniac.model.tiers import tier_widths
from braniac.model.trainer import Trainer, TrainSettings
from braniac.node.text import default_text

BLOCKS = (2, 3, 4, 6, 8)
PLAIN_EVERY = 4  # settings between two runs of plain decoding


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="safetensors of a whole model")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS), help="of the model to train")
    parser.add_argument("--steps", type=int, default=240, help="of joint training, without --checkpoint")
    parser.add_argument("--cost", metavar="HxLxF", help="hidden size, layers, FFN neurons of a model to only time")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=128, help="to write after each prompt")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top-k", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=40, help="passes to take the fastest of, for `cost`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.cost:
        hidden, layers, neurons = map(int, options.cost.split("x"))
        config = ModelConfig(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            intermediate_size=neurons,
            context=256,
        )
        model = GPT(config)
        model.init_weights(options.seed)
        result: dict[str, Any] = {"config": config.to_dict(), "cost": cost(model, options.repeats)}
    else:
        model = loaded(options.checkpoint) if options.checkpoint else trained(options)
        config = model.config
        corpus = default_text().load(config.vocab_size)
        windows, _ = Batches(corpus, options.seed, b"evaluation", config.context, 1).held_out(options.prompts)
        result = compare(
            model,
            dict.fromkeys(tier_widths(config)[1:], model),
            windows[:, : options.prompt_tokens].tolist(),
            tokens=options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            seed=options.seed,
        )
        result["cost"] = cost(model, options.repeats)
    result["options"] = {key: str(value) for key, value in vars(options).items()}
    print(json.dumps(result, indent=None if options.json else 2))


def loaded(path: Path) -> GPT:
    tensors, metadata = from_safetensors(path.read_bytes())
    model = GPT(metadata.config, metadata.tier)
    model.load_state_dict(tensors)
    return model


def trained(options: argparse.Namespace) -> GPT:
    """A model whose widths were all trained in every step."""
    config = PRESETS[options.preset]
    settings = TrainSettings(total_steps=options.steps, seed=options.seed, objective=ObjectiveSettings(mode="joint"))
    batches = Batches(
        default_text().load(config.vocab_size), options.seed, b"benchmark", config.context, settings.batch
    )
    trainer = Trainer(config, 0, batches, settings)
    for _ in range(options.steps):
        trainer.step()
    return trainer.model


def compare(
    verifier: GPT,
    drafters: Mapping[int, GPT],
    prompts: Sequence[list[int]],
    *,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    blocks: Sequence[int] = BLOCKS,
) -> dict[str, Any]:
    """Every drafter (a model by the FFN width it drafts with) at every block length against plain decoding."""
    settings = list(itertools.product(drafters, blocks))
    plain_rates: list[float] = []
    rates: dict[tuple[int, int], list[float]] = {setting: [] for setting in settings}
    totals = {setting: SpeculationStats() for setting in settings}
    same = dict.fromkeys(settings, 0)
    for number, prompt in enumerate(prompts):
        plain_seconds: list[float] = []
        plain_text: list[int] = []
        shift = number * PLAIN_EVERY % len(settings)
        for turn, (width, block) in enumerate(settings[shift:] + settings[:shift]):
            if turn % PLAIN_EVERY == 0:
                dice = torch.Generator().manual_seed(seed)
                began = time.perf_counter()
                plain_text = list(
                    generate(verifier, prompt, tokens, generator=dice, temperature=temperature, top_k=top_k)
                )
                plain_seconds.append(time.perf_counter() - began)
            text, stats = speculate(
                verifier,
                prompt,
                tokens,
                draft_width=width,
                drafter=drafters[width],
                block=block,
                generator=torch.Generator().manual_seed(seed),
                temperature=temperature,
                top_k=top_k,
                clock=time.perf_counter,
            )
            same[width, block] += list(text) == plain_text
            rates[width, block].append(tokens / stats.seconds)
            for name in SpeculationStats.__slots__:
                setattr(totals[width, block], name, getattr(totals[width, block], name) + getattr(stats, name))
        plain_rates.append(tokens / statistics.median(plain_seconds))

    def row(setting: tuple[int, int], which: slice) -> dict[str, Any]:
        speedups = [rate / plain for rate, plain in zip(rates[setting][which], plain_rates[which], strict=True)]
        return {
            "draft_width": setting[0],
            "block": setting[1],
            "accept_rate": totals[setting].accept_rate,
            "rollback_rate": totals[setting].rollback_rate,
            "tokens_per_s": statistics.median(rates[setting][which]),
            "speedup": statistics.median(speedups),
            **({"same_text": same[setting] / len(prompts)} if temperature == 0 else {}),
        }

    # The fastest of many noisy figures flatters itself, so it is chosen on some prompts and reported on others.
    chosen = max(settings, key=lambda setting: row(setting, slice(0, None, 2))["speedup"])
    return {
        "plain": {"tokens_per_s": statistics.median(plain_rates)},
        "settings": [row(setting, slice(None)) for setting in settings],
        "best": row(chosen, slice(1, None, 2) if len(prompts) > 1 else slice(None)),
    }


def cost(model: GPT, repeats: int) -> dict[str, Any]:
    """What a pass costs at each width, after half a context of text."""
    config = model.config
    widths, half = tier_widths(config), config.context // 2
    counts = [1, *(block + 1 for block in BLOCKS)]
    dice = torch.Generator().manual_seed(0)
    text = torch.randint(0, config.vocab_size, (half + counts[-1],), generator=dice).tolist()
    readers = {width: Reader(model, width) for width in widths}
    for reader in readers.values():
        reader.read(text[:half])

    def one_pass(width: int, count: int) -> float:
        began = time.perf_counter()
        readers[width].read(text[half : half + count], count)
        seconds = time.perf_counter() - began
        readers[width].truncate(half)
        return seconds

    # One width after the other: a verifier's pass would evict the weights that a drafter finds in the cache.
    milliseconds = {
        width: {count: min(one_pass(width, count) for _ in range(repeats)) * 1e3 for count in counts}
        for width in widths
    }
    verifying = {block: milliseconds[widths[0]][block + 1] / milliseconds[widths[0]][1] for block in BLOCKS}
    share = {width: milliseconds[width][1] / milliseconds[widths[0]][1] for width in widths[1:]}
    return {
        "milliseconds": milliseconds,
        "draft_share": share,
        "break_even": {width: least_accept_rate(share[width], verifying) for width in share},
    }


def least_accept_rate(draft: float, verifying: Mapping[int, float]) -> float | None:
    """The least chance of acceptance per token at which some block gains; None if none does.

    `draft` is the cost of a drafter's pass, `verifying` the verifier's by block, both in passes of plain decoding.
    """
    for percent in range(101):
        chance = percent / 100
        if any(sum(chance**n for n in range(block + 1)) > block * draft + cost for block, cost in verifying.items()):
            return chance
    return None


if __name__ == "__main__":
    main()
