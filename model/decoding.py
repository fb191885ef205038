"""Sampling text from a model, one token at a time, over a rolling window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from braniac.model.errors import ModelError
from braniac.model.gpt import GPT


def generate(
    model: GPT,
    prompt: Sequence[int],
    max_new: int,
    *,
    generator: torch.Generator,
    temperature: float = 0.8,
    top_k: int | None = None,
    width: int | None = None,
) -> Iterator[int]:
    """Yield `max_new` tokens after `prompt`. Temperature 0 takes the likeliest token; `top_k` limits the choice.

    The model sees the last `context` tokens and recomputes them for each new one. Raises ModelError for an empty
    prompt, a token outside the vocabulary, a negative temperature or a `top_k` below 1.
    """
    vocab_size, context = model.config.vocab_size, model.config.context
    if not prompt or not all(0 <= token < vocab_size for token in prompt):
        raise ModelError(f"the prompt must hold at least one token, each from 0 to {vocab_size - 1}.")
    if temperature < 0 or (top_k is not None and top_k < 1):
        raise ModelError(f"temperature {temperature:g} or top_k {top_k} is out of range: take at least 0 and 1.")
    window = list(prompt[-context:])
    for _ in range(max_new):
        with torch.no_grad():
            logits_V = model(torch.tensor([window]), width)[0, -1]
        token = _choose(logits_V, temperature, top_k, generator)
        yield token
        window = [*window, token][-context:]


def _choose(logits_V: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    if top_k is not None and top_k < len(logits_V):
        smallest = logits_V.topk(top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, -torch.inf)
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    probabilities_V = torch.softmax((logits_V - logits_V.max()) / temperature, dim=-1)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
