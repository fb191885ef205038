"""Text from a model, token by token: greedy, sampling and beam search, with a key-value cache.

What is unusual: a cache does not roll. When it is full, the last half of the window is read anew and becomes the
beginning, so a model sees at least half a context and at most a whole one, at the price of one long pass per half
context. Which tokens are seen depends on the position alone, so speculative decoding sees the same.

Shape legend: T = tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from braniac.model.attention import KVCache
from braniac.model.errors import ModelError
from braniac.model.gpt import GPT
from braniac.model.tiers import WidthMap


class Stream:
    """A model reading one sequence at one width."""

    def __init__(self, model: GPT, width: WidthMap = None) -> None:
        self._model = model
        self._width = width
        self._window: list[int] = []
        """What the cache holds."""
        self._cache = KVCache(model.config, 1, model.config.context)

    @property
    def room(self) -> int:
        """Tokens that can be read before the window must be read anew."""
        return self._cache.room - self._cache.length

    def read(self, tokens: Sequence[int]) -> Tensor:
        """Go on with `tokens`: the logits that follow each of them, [T, V]. They fit the room, unless there is none."""
        if not self.room:
            kept = self._window[-(self._cache.room // 2) :]
            self._window, self._cache.length = [], 0
            return self.read([*kept, *tokens])[-len(tokens) :]
        assert 0 < len(tokens) <= self.room, f"{len(tokens)} tokens for a room of {self.room}"
        self._window += tokens
        with torch.inference_mode():
            logits_BTV: Tensor = self._model(torch.tensor([tokens]), self._width, self._cache)
        return logits_BTV[0]

    def forget(self, count: int) -> None:
        """Take the last `count` tokens back."""
        if count:
            self._cache.truncate(self._cache.length - count)
            del self._window[-count:]


def check_request(model: GPT, prompt: Sequence[int], temperature: float, top_k: int | None, top_p: float) -> None:
    """Raise ModelError for a prompt or a way of choosing that cannot be used."""
    vocab_size = model.config.vocab_size
    if not prompt or not all(0 <= token < vocab_size for token in prompt):
        raise ModelError(f"the prompt must hold at least one token, each from 0 to {vocab_size - 1}.")
    if not temperature >= 0 or (top_k is not None and top_k < 1) or not 0 < top_p <= 1:
        raise ModelError(
            f"temperature {temperature:g}, top_k {top_k} or top_p {top_p:g} is out of range: "
            "take at least 0, at least 1, and more than 0 up to 1."
        )


def probabilities(logits_TV: Tensor, temperature: float, top_k: int | None = None, top_p: float = 1.0) -> Tensor:
    """What to draw the next token from, [T, V]. Temperature 0: all on the likeliest token (of equal ones the first).

    `top_k` leaves the k likeliest, `top_p` the likeliest that together reach that probability (Holtzman et al. 2019).
    """
    if temperature == 0 or top_k == 1:
        return F.one_hot(logits_TV.argmax(-1), logits_TV.shape[-1]).float()
    if top_k is not None and top_k < logits_TV.shape[-1]:
        smallest_T1 = logits_TV.topk(top_k, dim=-1).values[..., -1:]
        logits_TV = logits_TV.masked_fill(logits_TV < smallest_T1, -torch.inf)
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    probs_TV = torch.softmax((logits_TV - logits_TV.amax(-1, keepdim=True)) / temperature, dim=-1)
    if top_p < 1:
        sorted_TV, order_TV = probs_TV.sort(-1, descending=True, stable=True)
        before_TV = sorted_TV.cumsum(-1) - sorted_TV
        kept_TV = sorted_TV.masked_fill(before_TV >= top_p, 0.0)
        probs_TV = torch.zeros_like(probs_TV).scatter(-1, order_TV, kept_TV)
        probs_TV = probs_TV / probs_TV.sum(-1, keepdim=True)
    return probs_TV


def draw(probs_V: Tensor, generator: torch.Generator) -> int:
    """One token; certain ones cost no randomness."""
    likeliest = int(probs_V.argmax())
    return likeliest if probs_V[likeliest] == 1 else int(torch.multinomial(probs_V, 1, generator=generator))


def generate(
    model: GPT,
    prompt: Sequence[int],
    max_new: int,
    *,
    generator: torch.Generator,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    width: WidthMap = None,
    eos: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new` tokens after `prompt`, the last context of which is read; `eos`, if it comes, is the last.

    Raises ModelError for an empty prompt, a token outside the vocabulary, a negative temperature, a `top_k` below 1, or
    a `top_p` outside (0, 1].
    """
    check_request(model, prompt, temperature, top_k, top_p)
    stream = Stream(model, width)
    unread = list(prompt[-model.config.context :])
    for _ in range(max_new):
        token = draw(probabilities(stream.read(unread)[-1:], temperature, top_k, top_p)[0], generator)
        yield token
        if token == eos:
            return
        unread = [token]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One continuation that beam search found."""

    tokens: tuple[int, ...]
    log_probability: float
    """Sum over its tokens, nats."""
    score: float
    """log_probability / length ** length_penalty."""


def beam_search(
    model: GPT,
    prompt: Sequence[int],
    max_new: int,
    *,
    beams: int,
    length_penalty: float = 1.0,
    width: WidthMap = None,
    eos: int | None = None,
) -> list[Hypothesis]:
    """The best continuations of up to `max_new` tokens that keeping `beams` at a time finds, the best first.

    A hypothesis ends with `eos` or after `max_new` tokens. Ties go to the better parent, then to the lower token.
    Raises ModelError if prompt and continuation do not fit the context, and as `generate`.
    """
    check_request(model, prompt, 0.0, None, 1.0)
    if beams < 1 or max_new < 1 or len(prompt) + max_new > model.config.context:
        raise ModelError(
            f"{beams} beams of {len(prompt)} + {max_new} tokens: take at least 1 beam and 1 new token, "
            f"and at most {model.config.context} tokens together."
        )
    cache = KVCache(model.config, beams, len(prompt) + max_new)
    unread_BT = torch.tensor([list(prompt)] * beams)
    live: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    ended: list[Hypothesis] = []
    for length in range(1, max_new + 1):
        with torch.inference_mode():
            log_probs_BV = F.log_softmax(model(unread_BT, width, cache)[:, -1].double(), dim=-1)
        sums_BV = log_probs_BV[: len(live)] + torch.tensor([total for _, total in live], dtype=torch.float64)[:, None]
        order = sums_BV.flatten().sort(descending=True, stable=True)
        rows, grown = [], []
        # At most one child of each live beam ends, so twice as many candidates leave enough that go on.
        for total, place in zip(order.values[: 2 * beams].tolist(), order.indices[: 2 * beams].tolist(), strict=True):
            row, token = divmod(place, sums_BV.shape[1])
            tokens = (*live[row][0], token)
            if token == eos or length == max_new:
                ended.append(Hypothesis(tokens, total, total / length**length_penalty))
            elif len(grown) < beams:
                rows.append(row)
                grown.append((tokens, total))
        if not grown:
            break
        live = grown
        spare = beams - len(live)  # rows of the batch that nothing lives in yet
        cache.select(torch.tensor(rows + [0] * spare))
        unread_BT = torch.tensor([[tokens[-1]] for tokens, _ in live] + [[live[0][0][-1]]] * spare)
    return sorted(ended, key=lambda found: -found.score)[:beams]
