"""Adaptive retrieval with small image encoders: does a narrow query find its way in a corpus embedded at full width?

Trains one encoder at all widths jointly and one per width separately, for the same steps each, on textures that are
never seen twice, and tests on textures that nobody trained on. Prints a table, or with --json one JSON object; each of
its lists has one entry per width:
  joint             queries of the joint encoder at that width, corpus of the joint encoder at full width
  separate          queries of the encoder trained at that width, corpus of the encoder trained at full width (control)
  separate_alone    the same, but the corpus is also of the encoder trained at that width: how good it is by itself
  sliced            queries of a slice of the encoder trained at full width alone, corpus of that encoder (control)
`chance` is what a random order of the corpus would give.

    python benchmarks/retrieval.py --json --seed 0
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from braniac.model.data import keyed_bits
from braniac.model.encoder import Encoder, EncoderConfig, train_encoder
from braniac.model.retrieval import RetrievalReport, RetrievalSet, adaptive_retrieval

CONFIG = EncoderConfig(
    image_size=16,
    patch_size=4,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=128,
    embedding_size=32,
)
GRATINGS = 3
NOISE = 0.3
VIEWS_IN_CORPUS = 4


def textures(count: int, views: int, seed: int) -> Tensor:
    """`views` images each of `count` random textures, [count, views, 1, 16, 16].

    A texture is a sum of gratings of random frequencies and amplitudes. Between views, the phases of the gratings, the
    contrast and the noise differ, so no pixel by itself tells textures apart.
    """
    dice = torch.Generator().manual_seed(seed)
    frequencies = torch.rand(count, 1, GRATINGS, 1, 1, 2, generator=dice) / 2 - 0.25  # cycles per pixel
    amplitudes = torch.rand(count, 1, GRATINGS, 1, 1, generator=dice) + 0.5
    phases = torch.rand(count, views, GRATINGS, 1, 1, generator=dice)
    contrasts = torch.rand(count, views, 1, 1, 1, generator=dice) + 0.5
    pixels = torch.arange(CONFIG.image_size).float()
    places = torch.stack(torch.meshgrid(pixels, pixels, indexing="ij"), dim=-1)
    waves = amplitudes * torch.sin(2 * math.pi * ((frequencies * places).sum(-1) + phases))
    images = contrasts * waves.sum(2, keepdim=True)
    return images + NOISE * torch.randn(images.shape, generator=dice)


def training_pairs(seed: int, batch: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Two views of `batch` new textures for each step."""

    def pairs(step: int) -> tuple[Tensor, Tensor]:
        images = textures(batch, 2, _texture_seed("training", seed, step))
        return images[:, 0], images[:, 1]

    return pairs


def retrieval_set(seed: int, count: int) -> RetrievalSet:
    """For each of `count` textures one query and a few corpus items."""
    images, labels = textures(count, VIEWS_IN_CORPUS + 1, _texture_seed("evaluation", seed, 0)), torch.arange(count)
    return RetrievalSet(
        corpus_NCSS=images[:, 1:].flatten(0, 1),
        corpus_labels_N=labels.repeat_interleave(VIEWS_IN_CORPUS),
        queries_QCSS=images[:, 0],
        query_labels_Q=labels,
    )


def _texture_seed(purpose: str, seed: int, step: int) -> int:
    return int(keyed_bits(purpose, seed, b"textures", step, 1)[0])


def trained(width: int, widths: Sequence[int], seed: int, options: argparse.Namespace) -> Encoder:
    """An encoder of `width` neurons per layer, trained at `widths`; another seed means other weights and other data."""
    encoder = Encoder(CONFIG, neurons=[width] * CONFIG.num_hidden_layers)
    encoder.init_weights(seed)
    train_encoder(encoder, training_pairs(seed, options.batch), widths, steps=options.steps)
    return encoder


def run(options: argparse.Namespace) -> dict[str, list[RetrievalReport]]:
    data = retrieval_set(options.seed, options.textures)
    whole, *_ = widths = CONFIG.widths
    seeds = range(options.seed * (len(widths) + 1), (options.seed + 1) * (len(widths) + 1))  # no two encoders share one
    joint = trained(whole, widths, seeds[0], options)
    separate = [trained(width, [width], seed, options) for width, seed in zip(widths, seeds[1:], strict=True)]
    k = options.neighbours
    return {
        "joint": adaptive_retrieval(joint, data, [(joint, width) for width in widths], k),
        "separate": adaptive_retrieval(separate[0], data, [(encoder, None) for encoder in separate], k),
        "separate_alone": [adaptive_retrieval(encoder, data, [(encoder, None)], k)[0] for encoder in separate],
        "sliced": adaptive_retrieval(separate[0], data, [(separate[0], width) for width in widths], k),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="training steps of each encoder")
    parser.add_argument("--batch", type=int, default=32, help="textures per step, two views of each")
    parser.add_argument(
        "--textures", type=int, default=128, help="to tell apart; as many queries, four times the corpus"
    )
    parser.add_argument("--neighbours", type=int, default=10, help="K of recall and overlap")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    options = parser.parse_args(arguments)
    results = run(options)
    if options.json:
        rows = {name: [dataclasses.asdict(report) for report in reports] for name, reports in results.items()}
        items, k = VIEWS_IN_CORPUS * options.textures, options.neighbours
        misses = math.comb(items - VIEWS_IN_CORPUS, k) / math.comb(items, k)
        chance = {"accuracy_1nn": 1 / options.textures, "recall": 1 - misses, "overlap": k / items}
        print(json.dumps({**rows, "chance": chance, "options": vars(options)}))
        return
    print(f"{'queries':<15}{'width':>6}{'1-NN':>8}{f'R@{options.neighbours}':>8}{'overlap':>9}{'spearman':>10}")
    for name, reports in results.items():
        for r in reports:
            figures = f"{r.accuracy_1nn:8.3f}{r.recall:8.3f}{r.overlap:9.3f}{r.spearman:10.3f}"
            print(f"{name:<15}{r.widths[0]:>6}{figures}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # these matrices are too small to share
    main()
