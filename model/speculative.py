"""Speculative decoding: a narrow width of the model drafts a block of tokens, a wide one verifies them all in one pass.

Exact: whatever the drafter, a token has the distribution that the verifier alone would give it, temperature and top_k
included. A drafted token x is accepted with probability min(1, p(x) / q(x)); the first refusal is replaced by a draw
from max(0, p - q), normalised, and what was drafted after it is forgotten; if nothing was refused, the verifier's pass
has one more token to give. p is the verifier's distribution, q the drafter's, both after temperature and top_k. At
temperature 0 both are certain of one token, and the text is the verifier's greedy text. (Logits of a block may differ
in their last bits from those of one token at a time, so a near tie of two tokens can fall either way.)

Both roles read the same weights, each with its own keys and values; the window moves on as in `decoding.generate`, so
beyond the context too the distribution is that of plain decoding.

Sources: Leviathan, Kalman & Matias 2023 (arXiv 2211.17192), Chen et al. 2023 (arXiv 2302.01318).
Shape legend: K = tokens drafted, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from braniac.model.decoding import check_request, distribution, draw, last_half
from braniac.model.errors import ModelError
from braniac.model.gpt import GPT
from braniac.model.reader import Reader
from braniac.model.tiers import WidthMap


@dataclass(slots=True)
class SpeculationStats:
    """What a speculative decoding has done so far."""

    tokens: int = 0
    """Tokens made."""
    passes: int = 0
    """Passes of the verifier, each giving one token more than it accepts."""
    drafted: int = 0
    """Tokens proposed by the drafter."""
    accepted: int = 0
    """Of them, tokens that the verifier accepted."""
    drafting_passes: int = 0
    """Passes with at least one drafted token."""
    rollbacks: int = 0
    """Of them, passes that refused one."""
    seconds: float = 0.0
    """Time from the prompt to the last token without what the caller did in between, by the caller's clock if any."""

    @property
    def accept_rate(self) -> float:
        """Share of the drafted tokens that was accepted; 0 if none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def rollback_rate(self) -> float:
        """Share of the drafts of which the verifier refused a part; 0 if none was made."""
        return self.rollbacks / self.drafting_passes if self.drafting_passes else 0.0


@dataclass(frozen=True, slots=True)
class _Rules:
    block: int
    confidence: float
    temperature: float
    top_k: int | None
    eos: int | None
    generator: torch.Generator


def speculate(
    model: GPT,
    prompt: Sequence[int],
    max_new: int,
    *,
    draft_width: WidthMap,
    generator: torch.Generator,
    block: int = 4,
    confidence: float = 0.0,
    temperature: float = 0.8,
    top_k: int | None = None,
    width: WidthMap = None,
    eos: int | None = None,
    drafter: GPT | None = None,
    clock: Callable[[], float] | None = None,
) -> tuple[Iterator[int], SpeculationStats]:
    """Like `decoding.generate`, whose arguments and errors it shares; also returns statistics that grow with the text.

    `block` is the most tokens drafted at a time, by `drafter` (this model if not given) at `draft_width`. A draft ends
    early after a token for which the drafter's likeliest choice had less than `confidence` before temperature and
    top_k. `clock` tells seconds.
    """
    drafter = model if drafter is None else drafter
    check_request(model, prompt, temperature, top_k, width)
    check_request(drafter, prompt, temperature, top_k, draft_width)
    if block < 1 or not 0 <= confidence <= 1:
        raise ModelError(f"block {block} or confidence {confidence:g} is out of range: take at least 1, and 0 to 1.")
    for name in ("vocab_size", "context"):
        theirs, ours = getattr(drafter.config, name), getattr(model.config, name)
        if theirs != ours:
            raise ModelError(f"the drafter's {name} is {theirs}: it must equal the verifier's, {ours}.")
    rules = _Rules(block, confidence, temperature, top_k, eos, generator)
    stats = SpeculationStats()
    readers = Reader(model, width), Reader(drafter, draft_width)
    window = list(prompt[-model.config.context :])
    return _tokens(*readers, window, max_new, rules, stats, clock or (lambda: 0.0)), stats


def _tokens(
    verifier: Reader,
    drafter: Reader,
    window: list[int],
    max_new: int,
    rules: _Rules,
    stats: SpeculationStats,
    clock: Callable[[], float],
) -> Iterator[int]:
    """Rounds of drafting and verifying; between them, neither has read the last token of the window."""
    context = verifier.config.context
    while stats.tokens < max_new:
        began = clock()
        if len(window) > context:
            window = last_half(window, context)
            verifier.truncate(0)
            drafter.truncate(0)
        # A draft never crosses the end of the window, so every token has the window that plain decoding gives it.
        room = min(rules.block, context - len(window), max_new - stats.tokens - 1)
        drafted, q_KV = _draft(drafter, window, room, rules)
        logits_KV = verifier.read([*window, *drafted][verifier.length :], len(drafted) + 1)
        p_KV = distribution(logits_KV, rules.temperature, rules.top_k)
        tokens = verify(drafted, q_KV, p_KV, rules.generator)
        window += tokens
        for reader in (verifier, drafter):
            reader.truncate(min(reader.length, len(window) - 1))
        accepted = len(tokens) - 1
        if rules.eos in tokens:
            tokens = tokens[: tokens.index(rules.eos) + 1]
        stats.passes += 1
        stats.drafted += len(drafted)
        stats.accepted += accepted
        stats.drafting_passes += bool(drafted)
        stats.rollbacks += accepted < len(drafted)
        stats.tokens += len(tokens)
        stats.seconds += clock() - began
        yield from tokens
        if tokens[-1] == rules.eos:
            return


def _draft(drafter: Reader, window: list[int], room: int, rules: _Rules) -> tuple[list[int], list[Tensor]]:
    """Up to `room` tokens after the window, and the distribution each was drawn from, [V]."""
    drafted: list[int] = []
    q_KV: list[Tensor] = []
    while len(drafted) < room:
        logits_V = drafter.read([*window, *drafted][drafter.length :])[0]
        q_V = distribution(logits_V, rules.temperature, rules.top_k)
        drafted.append(draw(q_V, rules.generator))
        q_KV.append(q_V)
        # Whether the draft goes on may depend on what it holds already, never on tokens it would hold next: exact.
        if drafted[-1] == rules.eos or torch.softmax(logits_V, dim=-1).max() < rules.confidence:
            break
    return drafted, q_KV


def verify(drafted: Sequence[int], q_KV: Sequence[Tensor], p_KV: Tensor, generator: torch.Generator) -> list[int]:
    """The accepted beginning of a draft, and one token more.

    `q_KV` holds the distribution [V] that each drafted token was drawn from, `p_KV` [K + 1, V] the verifier's for the
    same positions and the next.
    """
    chances = torch.rand(len(drafted), generator=generator).tolist()
    for number, (token, chance) in enumerate(zip(drafted, chances, strict=True)):
        p_V, q_V = p_KV[number], q_KV[number]
        if chance * float(q_V[token]) >= float(p_V[token]):
            rest_V = (p_V - q_V).clamp(min=0)
            # Equal distributions leave nothing, and only rounding can then have refused.
            return [*drafted[:number], draw(rest_V if rest_V.any() else p_V, generator)]
    return [*drafted, draw(p_KV[len(drafted)], generator)]
