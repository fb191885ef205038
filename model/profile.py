"""Where a forward pass spends its time: attention against FFN, per layer, by FFN width and sequence length.

Every part of every layer is timed alone, on the activations that reach it. Widths and lengths take turns within each
round, so that a machine that slows down for a while slows all of them; the median over rounds is reported.

The knee: attention, embedding and head cost the same at every width, the FFN in proportion to it. At the knee both cost
the same; below it, narrowing the FFN further saves less than half of what is left.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from braniac.model.attention import KVCache
from braniac.model.budget import CostTable
from braniac.model.errors import ConfigError
from braniac.model.gpt import GPT, Block
from braniac.model.tiers import heads_at, layer_widths


@dataclass(frozen=True, slots=True)
class LayerTime:
    """Seconds that one layer takes at one FFN width, for one batch of one length."""

    layer: int
    width: int
    length: int
    attention_s: float
    ffn_s: float


@dataclass(frozen=True, slots=True)
class LengthSummary:
    """One sequence length, all layers together."""

    length: int
    outside_s: float
    """Embedding, final norm and head."""
    attention_s: dict[int, float]
    """Per width."""
    ffn_s: dict[int, float]
    """Per width."""
    knee: int | None
    """FFN width at which the FFN costs as much as everything else; None if it costs less even when whole."""

    def total_s(self, width: int) -> float:
        """A whole forward pass at this width."""
        return self.outside_s + self.attention_s[width] + self.ffn_s[width]


@dataclass(frozen=True, slots=True)
class Profile:
    """All that was measured."""

    batch: int
    decode: bool
    """Whether one new token was computed after `length` cached ones, instead of `length` tokens at once."""
    layers: tuple[LayerTime, ...]
    lengths: tuple[LengthSummary, ...]

    def cost_table(self, length: int) -> CostTable:
        """Seconds per layer and width at one sequence length, for choosing a width map within a latency budget."""
        per_layer: dict[int, dict[int, float]] = defaultdict(dict)
        for row in self.layers:
            if row.length == length:
                per_layer[row.layer][row.width] = row.attention_s + row.ffn_s
        outside_s = next((summary.outside_s for summary in self.lengths if summary.length == length), None)
        if outside_s is None:
            known = ", ".join(str(summary.length) for summary in self.lengths)
            raise ConfigError(f"no sequence of {length} tokens was measured: choose from {known}.")
        return CostTable(
            unit=f"seconds for {length} tokens",
            layers=tuple(per_layer[layer] for layer in sorted(per_layer)),
            fixed=outside_s,
        )


def measure(
    model: GPT,
    widths: Sequence[int],
    lengths: Sequence[int],
    *,
    clock: Callable[[], float],
    batch: int = 1,
    decode: bool = False,
    rounds: int = 7,
) -> Profile:
    """Time the model. `clock` gives seconds. Raises ConfigError for a width or length that the model does not have."""
    context = model.config.context
    for width in widths:
        layer_widths(model.config, width, model.tier)
    for length in lengths:
        if not 0 < length <= context - (1 if decode else 0):
            raise ConfigError(f"{length} tokens do not fit a context of {context}: choose fewer.")
    samples: dict[tuple[int, int, int], list[tuple[float, float]]] = defaultdict(list)
    outside: dict[int, list[float]] = defaultdict(list)
    with torch.inference_mode():
        for round_number in range(rounds + 1):
            for length in lengths:
                for width in widths:
                    layers, outside_s = _time_once(model, width, length, batch, decode, clock)
                    if round_number == 0:
                        continue  # the first touches memory for the first time
                    outside[length].append(outside_s)
                    for layer, seconds in enumerate(layers):
                        samples[layer, width, length].append(seconds)
    times = tuple(
        LayerTime(*key, statistics.median(a for a, _ in pairs), statistics.median(f for _, f in pairs))
        for key, pairs in sorted(samples.items())
    )
    summaries = tuple(
        _summary(times, length, statistics.median(outside[length]), max(model.neurons)) for length in lengths
    )
    return Profile(batch, decode, times, summaries)


def _time_once(
    model: GPT, width: int, length: int, batch: int, decode: bool, clock: Callable[[], float]
) -> tuple[list[tuple[float, float]], float]:
    """Seconds of (attention, FFN) per layer, and of everything outside the layers."""
    tokens_BT = torch.zeros(batch, 1 if decode else length, dtype=torch.int64)
    cache = KVCache(model.config, batch, length + 1) if decode else None
    if cache is not None:
        model(tokens_BT.expand(batch, length), width, cache)
    start = length if decode else 0
    cos_TK, sin_TK = (table[start : start + tokens_BT.shape[1]] for table in (model.model.cos_TK, model.model.sin_TK))
    began = clock()
    sources = model.model.sources(tokens_BT)
    x_BTD, inputs = sources[0], list[Tensor]()
    outside_s = clock() - began
    layers = []
    for layer, block in enumerate(model.model.layers):
        assert isinstance(block, Block)
        x_BTD, extra_BTJ = model.model.entered(layer, x_BTD, inputs), model.model.extra(layer, sources)
        x_BTD, seconds = _time_block(block, x_BTD, cos_TK, sin_TK, width, cache, extra_BTJ, clock)
        layers.append(seconds)
    began = clock()
    model.logits(model.model.norm(x_BTD))
    return layers, outside_s + clock() - began


def _time_block(
    block: Block,
    x_BTD: Tensor,
    cos_TK: Tensor,
    sin_TK: Tensor,
    width: int,
    cache: KVCache | None,
    extra_BTJ: Tensor | None,
    clock: Callable[[], float],
) -> tuple[Tensor, tuple[float, float]]:
    began = clock()
    x_BTD = block.attend(x_BTD, cos_TK, sin_TK, heads_at(block.config, width), cache, extra_BTJ)
    between = clock()
    x_BTD = block.feed(x_BTD, min(width, block.mlp.neurons))
    return x_BTD, (between - began, clock() - between)


def _summary(times: Sequence[LayerTime], length: int, outside_s: float, neurons: int) -> LengthSummary:
    attention_s: dict[int, float] = defaultdict(float)
    ffn_s: dict[int, float] = defaultdict(float)
    for row in times:
        if row.length == length:
            attention_s[row.width] += row.attention_s
            ffn_s[row.width] += row.ffn_s
    return LengthSummary(
        length, outside_s, dict(attention_s), dict(ffn_s), _knee(outside_s, attention_s, ffn_s, neurons)
    )


def _knee(outside_s: float, attention_s: dict[int, float], ffn_s: dict[int, float], neurons: int) -> int | None:
    """Where the FFN's line through the origin, fitted to all widths, crosses the mean of everything else."""
    slope = sum(width * seconds for width, seconds in ffn_s.items()) / sum(width * width for width in ffn_s)
    if slope <= 0:
        return None
    crossing = round((outside_s + statistics.mean(attention_s.values())) / slope)
    return crossing if crossing <= neurons else None
