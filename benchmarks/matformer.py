"""One jointly trained MatFormer against a separate model per width, at equal tokens per model.

    python benchmarks/matformer.py --json                 everything, about an hour on two free cores
    python benchmarks/matformer.py --quick --json         the same on `tiny`, a few minutes
    python benchmarks/matformer.py --train joint          only train that model into --out (so two can run at once)

Models are kept in --out and not trained again. Prints one JSON object; the keys:

    joint, separate   held-out loss per FFN width, nats per byte
    gap               joint over separate per width, as a fraction
    mixnmatch         per point between the tiers: width map, parameters, loss, the loss that a straight line between
                      the neighbouring tiers has at that size, and of two controls: the same map with the neurons of
                      each layer shuffled, and on the separate full-width model
    kl, token_match   per width, against the widest of its kind: KL(widest || narrower), share of equal top choices
    accept_rate, speedup   speculative decoding at the best setting; `speculative` has all of them
    slice_overhead    forward and backward of a prefix slice over a dense model of that width, median of interleaved
                      runs, as a fraction more
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from braniac.model.budget import choose, parameter_costs, refine
from braniac.model.checkpoint import from_safetensors, to_safetensors
from braniac.model.config import PRESETS, ModelConfig
from braniac.model.consistency import model_consistency, width_consistency
from braniac.model.data import Batches
from braniac.model.decoding import generate
from braniac.model.evaluate import held_out_loss
from braniac.model.gpt import GPT
from braniac.model.mixnmatch import Sensitivities, Windows, controls, evaluate_maps, sensitivities
from braniac.model.objective import ObjectiveSettings
from braniac.model.sources import Corpus
from braniac.model.speculative import SpeculationStats, speculate
from braniac.model.tiers import parameter_count, tier_width, tier_widths
from braniac.model.trainer import Trainer, TrainSettings
from braniac.node.text import default_text

NAMES = ("joint", "tier0", "tier1", "tier2", "tier3")
HELD_OUT_WINDOWS = 256
SENSITIVITY_WINDOWS = 32
PROMPTS = 6
PROMPT_TOKENS = 64
NEW_TOKENS = 96
DRAFTS = ((2, 0.0), (4, 0.0), (8, 0.0), (8, 0.7))  # block, confidence


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--steps", type=int, default=240, help="of every model")
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="Muon's")
    parser.add_argument("--adam-learning-rate", type=float, default=0.01)
    parser.add_argument("--kl-weight", type=float, default=0.0, help="of the joint model")
    parser.add_argument("--mixed-maps", type=int, default=1, help="random width maps in each step of the joint model")
    parser.add_argument("--mixed-weight", type=float, default=1.0, help="of each such map, in units of a tier's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/matformer"))
    parser.add_argument("--train", choices=(*NAMES, "separate"), help="only train this")
    parser.add_argument("--quick", action="store_true", help="tiny and 200 steps")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    if options.quick:
        options.preset, options.steps, options.out = "tiny", 200, options.out / "quick"
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    corpus = default_text().load(PRESETS[options.preset].vocab_size)
    if options.train:
        for name in NAMES[1:] if options.train == "separate" else (options.train,):
            trained(name, options, corpus)
        return
    models = {name: trained(name, options, corpus) for name in NAMES}
    print(json.dumps(evaluated(models, options, corpus), indent=None if options.json else 2))


def trained(name: str, options: argparse.Namespace, corpus: Corpus) -> GPT:
    """The model of that name, from --out if it was trained with the same settings before."""
    config = PRESETS[options.preset]
    tier = 0 if name == "joint" else int(name[-1])
    recipe = {key: str(vars(options)[key]) for key in ("steps", "batch", "learning_rate", "adam_learning_rate", "seed")}
    if name == "joint":
        recipe |= {key: str(vars(options)[key]) for key in ("kl_weight", "mixed_maps", "mixed_weight")}
    path = options.out / f"{name}.safetensors"
    if path.exists():
        tensors, metadata = from_safetensors(path.read_bytes())
        if metadata.config != config or metadata.tier != tier or metadata.extra != recipe:
            sys.exit(f"{path} was trained with {metadata.extra}, not {recipe}: choose another --out")
        model = GPT(config, tier)
        model.load_state_dict(tensors)
        return model
    joint = ObjectiveSettings(
        mode="joint",
        kl_weight=options.kl_weight,
        mixed_maps=options.mixed_maps,
        mixed_weight=options.mixed_weight,
    )
    settings = TrainSettings(
        learning_rate=options.learning_rate,
        adam_learning_rate=options.adam_learning_rate,
        batch=options.batch,
        total_steps=options.steps,
        seed=options.seed,
        objective=joint if name == "joint" else ObjectiveSettings(mode="fixed"),
    )
    batches = Batches(corpus, options.seed, b"benchmark", config.context, options.batch)
    trainer = Trainer(config, tier, batches, settings)
    began = time.monotonic()
    for step in range(1, options.steps + 1):
        result = trainer.step()
        if step % 20 == 0 or step == options.steps:
            losses = " ".join(f"{loss:.3f}" for loss in result.losses)
            print(
                f"{name} step {step} loss {losses} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True
            )
    tensors = {key: p.detach() for key, p in trainer.model.named_parameters()}
    path.write_bytes(to_safetensors(tensors, config, tier, recipe))
    return trainer.model


def evaluated(models: dict[str, GPT], options: argparse.Namespace, corpus: Corpus) -> dict[str, Any]:
    """All figures."""
    config = PRESETS[options.preset]
    batches = Batches(corpus, options.seed, b"evaluation", config.context, SENSITIVITY_WINDOWS)
    windows = batches.held_out(HELD_OUT_WINDOWS)
    widths = tier_widths(config)
    joint = {width: held_out_loss(models["joint"], windows, width) for width in widths}
    separate = {width: held_out_loss(models[f"tier{tier}"], windows) for tier, width in enumerate(widths)}
    alike = {
        "joint": width_consistency(models["joint"], windows[0], widths[1:]),
        "separate": model_consistency(
            models["tier0"], {width: models[f"tier{tier}"] for tier, width in enumerate(widths) if tier}, windows[0]
        ),
    }
    drafting = {kind: speculation(models, kind, options, windows[0]) for kind in ("joint", "separate")}
    return {
        "preset": options.preset,
        "tokens_per_model": options.steps * options.batch * config.context,
        "joint": joint,
        "separate": separate,
        "gap": {width: joint[width] / separate[width] - 1 for width in widths},
        "mixnmatch": mixnmatch(models["joint"], models["tier0"], batches, joint, windows),
        "kl": {kind: {width: found.kl for width, found in by.items()} for kind, by in alike.items()},
        "token_match": {kind: {width: found.token_match for width, found in by.items()} for kind, by in alike.items()},
        "accept_rate": {kind: found["best"]["accept_rate"] for kind, found in drafting.items()},
        "speedup": {kind: found["best"]["speedup"] for kind, found in drafting.items()},
        "speculative": drafting,
        "slice_overhead": slice_overhead(config),
    }


def mixnmatch(
    model: GPT, unnested: GPT, batches: Batches, by_width: dict[int, float], windows: Windows
) -> list[dict[str, Any]]:
    """Width maps chosen for parameter budgets between the tiers, each beside the straight line between its neighbours.

    Each map has two neighbouring tiers' widths only: maps of very uneven widths fall off the curve (docs/LOG.md). The
    additive proxy can be wrong, so its choice is refined by real losses. Everything is chosen on training text and
    reported on held-out text.
    """
    config = model.config
    chosen_on = batches.batch(0)
    measured = sensitivities(model, chosen_on, tier_widths(config))
    points = []
    for tier in range(config.tiers - 1):
        wide, narrow = parameter_count(config, tier), parameter_count(config, tier + 1)
        between = tier_width(config, tier), tier_width(config, tier + 1)
        wide_loss, narrow_loss = by_width[between[0]], by_width[between[1]]
        costs = parameter_costs(config, between)
        layers = tuple({width: increases[width] for width in between} for increases in measured.layers)
        proxy = Sensitivities(full_loss=measured.full_loss, layers=layers)
        for share in (1 / 3, 2 / 3):
            choice = choose(costs, proxy, narrow + share * (wide - narrow))
            best, _ = refine(model, costs, choice.widths, choice.cost, chosen_on)
            (control,) = controls(model, [best], windows, seed=0, unnested=unnested)
            at = (choice.cost - narrow) / (wide - narrow)
            line = narrow_loss + at * (wide_loss - narrow_loss)
            points.append(
                {
                    "width_map": best,
                    "by_proxy": choice.widths,
                    "loss_by_proxy": evaluate_maps(model, [choice.widths], windows)[0],
                    "parameters": int(choice.cost),
                    "loss": control.loss,
                    "line": line,
                    "off_line": control.loss / line - 1,
                    "loss_neurons_shuffled": control.permuted_loss,
                    "loss_never_nested": control.unnested_loss,
                }
            )
    return points


def speculation(
    models: dict[str, GPT], kind: str, options: argparse.Namespace, tokens_NT: torch.Tensor
) -> dict[str, Any]:
    """Plain decoding of the widest against speculative decoding, in turns: every drafter, block and temperature."""
    config = PRESETS[options.preset]
    verifier = models["joint" if kind == "joint" else "tier0"]
    prompts = [row[:PROMPT_TOKENS].tolist() for row in tokens_NT[:: max(1, len(tokens_NT) // PROMPTS)]][:PROMPTS]
    settings = [(tier, *draft) for tier in range(1, config.tiers) for draft in DRAFTS]
    found = []
    for temperature in (0.0, 1.0):
        plain_s = 0.0
        totals = {setting: SpeculationStats() for setting in settings}
        for number, prompt in enumerate(prompts):
            dice = torch.Generator().manual_seed(number)
            began = time.perf_counter()
            list(generate(verifier, prompt, NEW_TOKENS, generator=dice, temperature=temperature))
            plain_s += time.perf_counter() - began
            for tier, block, confidence in settings:
                text, stats = speculate(
                    verifier,
                    prompt,
                    NEW_TOKENS,
                    drafter=verifier if kind == "joint" else models[f"tier{tier}"],
                    draft_width=tier_width(config, tier),
                    block=block,
                    confidence=confidence,
                    generator=dice,
                    temperature=temperature,
                    clock=time.perf_counter,
                )
                list(text)
                total = totals[tier, block, confidence]
                for name in SpeculationStats.__slots__:
                    setattr(total, name, getattr(total, name) + getattr(stats, name))
        found += [
            {
                "temperature": temperature,
                "draft_width": tier_width(config, tier),
                "block": block,
                "confidence": confidence,
                "accept_rate": total.accept_rate,
                "rollback_rate": total.rollback_rate,
                "tokens_per_s": total.tokens / total.seconds,
                "speedup": plain_s / total.seconds,
            }
            for (tier, block, confidence), total in totals.items()
        ]
    return {"best": max(found, key=lambda row: row["speedup"]), "settings": found}


def slice_overhead(config: ModelConfig, rounds: int = 15) -> dict[int, float]:
    """Per width: how much longer forward and backward take as a slice of the whole model than as a dense model."""
    tokens = torch.randint(0, config.vocab_size, (8, config.context), generator=torch.Generator().manual_seed(0))
    whole = GPT(config, 0)
    whole.init_weights(0)
    overhead = {}
    for tier in range(1, config.tiers):
        width = tier_width(config, tier)
        dense = GPT(config, tier)
        dense.init_weights(0)
        ratios = []
        for round_number in range(rounds + 2):
            pair = [(whole, width), (dense, None)]
            seconds = {}
            for model, asked in pair if round_number % 2 else reversed(pair):
                model.zero_grad()
                began = time.perf_counter()
                model.loss(tokens, tokens, asked).backward()  # type: ignore[no-untyped-call]
                seconds[asked] = time.perf_counter() - began
            if round_number >= 2:
                ratios.append(seconds[width] / seconds[None])
        overhead[width] = statistics.median(ratios) - 1
    return overhead


if __name__ == "__main__":
    main()
