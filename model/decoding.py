"""Writing text with a model: greedily, by sampling, by beam search. A cache saves computing any token twice.

Positions count from where the window begins, so a cache cannot slide. When the window is full, reading starts again
from its last half: beyond its context, the model sees between context/2 and context tokens, and reads each token twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from braniac.model.errors import ModelError
from braniac.model.gpt import GPT
from braniac.model.reader import Reader
from braniac.model.tiers import WidthMap, layer_widths


def generate(
    model: GPT,
    prompt: Sequence[int],
    max_new: int,
    *,
    generator: torch.Generator,
    temperature: float = 0.8,
    top_k: int | None = None,
    width: WidthMap = None,
    eos: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new` tokens after `prompt`; `eos` is the last one, if it comes.

    Temperature 0 takes the likeliest token, `top_k` limits the choice. Raises ModelError for an empty prompt, a token
    outside the vocabulary, a negative temperature or a `top_k` below 1, and ConfigError for a width of another model.
    """
    check_request(model, prompt, temperature, top_k, width)
    context = model.config.context
    reader = Reader(model, width)
    window = list(prompt[-context:])
    for _ in range(max_new):
        if len(window) > context:
            window = last_half(window, context)
            reader.truncate(0)
        logits_V = reader.read(window[reader.length :])[0]
        token = draw(distribution(logits_V, temperature, top_k), generator)
        yield token
        if token == eos:
            return
        window.append(token)


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One continuation that a beam search found."""

    tokens: tuple[int, ...]
    """What follows the prompt, with the end token if it came to one."""
    log_probability: float
    """Of all of it, in nats."""
    score: float
    """What it was ranked by: log_probability / len(tokens) ** length_penalty."""
    finished: bool
    """Whether it came to the end token."""


def beam_search(
    model: GPT,
    prompt: Sequence[int],
    max_new: int,
    *,
    beams: int,
    length_penalty: float = 0.0,
    width: WidthMap = None,
    eos: int | None = None,
) -> list[Hypothesis]:
    """The best continuations of up to `max_new` tokens that a beam of `beams` finds, the best first.

    Every hypothesis that comes to `eos` leaves the beam, which is one narrower from then on; one beam is thus exactly
    greedy decoding. Equal probabilities are ranked by the parent's rank, then by token. `length_penalty` 0 compares
    probabilities, 1 the mean per token; it decides the final order alone. Raises as `generate`.
    """
    check_request(model, prompt, 0.0, None, width)
    if beams < 1 or max_new < 1 or not math.isfinite(length_penalty):
        raise ModelError(
            f"a beam search with beams {beams}, max_new {max_new}, length_penalty {length_penalty:g}: "
            "give at least one beam, one token and a finite penalty."
        )
    context = model.config.context
    reader = Reader(model, width, beams)
    windows = [list(prompt[-context:])]
    texts: list[tuple[int, ...]] = [()]
    totals = torch.zeros(1, dtype=torch.float64)
    found: list[Hypothesis] = []
    for _ in range(max_new):
        if len(windows[0]) > context:
            windows = [last_half(window, context) for window in windows]
            reader.truncate(0)
        logits_BV = reader.read_batch(torch.tensor(windows)[:, reader.length :])[:, 0]
        scores_BV = totals[:, None] + torch.log_softmax(logits_BV.double(), dim=-1)
        parents, tokens, scores = _best(scores_BV, beams - len(found))
        ended = [token == eos for token in tokens]
        alive = [number for number, end in enumerate(ended) if not end]
        grown = [(*texts[parent], token) for parent, token in zip(parents, tokens, strict=True)]
        found += [
            _hypothesis(grown[number], scores[number], length_penalty, finished=True)
            for number, end in enumerate(ended)
            if end
        ]
        windows = [[*windows[parents[number]], tokens[number]] for number in alive]
        texts = [grown[number] for number in alive]
        totals = torch.tensor([scores[number] for number in alive], dtype=torch.float64)
        if not alive:
            break
        reader.select([parents[number] for number in alive])
    found += [
        _hypothesis(text, total, length_penalty, finished=False)
        for text, total in zip(texts, totals.tolist(), strict=True)
    ]
    return sorted(found, key=lambda hypothesis: (-hypothesis.score, hypothesis.tokens))


def _best(scores_BV: Tensor, count: int) -> tuple[list[int], list[int], list[float]]:
    """Row, column and score of the `count` highest scores, the highest first, ties in order of row and column."""
    scores = scores_BV.flatten()
    lowest = scores.topk(min(count, len(scores))).values[-1]
    candidates = (scores >= lowest).nonzero().flatten()
    order = scores[candidates].argsort(descending=True, stable=True)[:count]
    chosen = candidates[order]
    vocab_size = scores_BV.shape[1]
    return (chosen // vocab_size).tolist(), (chosen % vocab_size).tolist(), scores[chosen].tolist()


def _hypothesis(tokens: tuple[int, ...], total: float, length_penalty: float, *, finished: bool) -> Hypothesis:
    return Hypothesis(tokens, total, total / len(tokens) ** length_penalty, finished)


def check_request(model: GPT, prompt: Sequence[int], temperature: float, top_k: int | None, width: WidthMap) -> None:
    """Raise ModelError or ConfigError for what no decoder can use."""
    vocab_size = model.config.vocab_size
    if not prompt or not all(0 <= token < vocab_size for token in prompt):
        raise ModelError(f"the prompt must hold at least one token, each from 0 to {vocab_size - 1}.")
    if not 0 <= temperature < math.inf or (top_k is not None and top_k < 1):
        raise ModelError(f"temperature {temperature:g} or top_k {top_k} is out of range: take at least 0 and 1.")
    if width is not None:
        layer_widths(model.config, width, model.tier)


def last_half(window: Sequence[int], context: int) -> list[int]:
    """The tokens to read again when the window does not fit the context any more."""
    return list(window[-max(1, context // 2) :])


def distribution(logits: Tensor, temperature: float, top_k: int | None) -> Tensor:
    """Logits [..., V] -> the probabilities to draw from [..., V]; at temperature 0 all on the first likeliest token."""
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    return torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)


def draw(probabilities_V: Tensor, generator: torch.Generator) -> int:
    """One token at random."""
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
