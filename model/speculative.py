"""Speculative decoding with one set of weights: a narrow width drafts a block, the whole model verifies it in one pass.

A drafted token x is accepted with probability min(1, p(x) / q(x)), p being the verifier's distribution and q the
drafter's; after the first refusal a token is drawn from max(0, p - q), normalised, and if nothing was refused, one more
from p. The output then has exactly the verifier's distribution, whatever the drafter says (Leviathan et al. 2023, arXiv
2211.17192; Chen et al. 2023, arXiv 2302.01318). p and q both come after temperature, top-k and top-p.

What is unusual:
* Drafter and verifier are slices of the same weights (MatFormer, arXiv 2310.07707); another model may draft too.
* The last bit of a logit may depend on how many tokens are computed at once. At temperature 0 the tokens are those of
  plain decoding, except where two logits are that close.

Shape legend: T = tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from braniac.model.decoding import Stream, check_request, draw, probabilities
from braniac.model.errors import ModelError
from braniac.model.gpt import GPT
from braniac.model.tiers import WidthMap


@dataclass(slots=True)
class Speculation:
    """What happened so far."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    """Of the verifier."""
    rollbacks: int = 0
    """Passes in which a drafted token was refused."""
    tokens: int = 0
    """Given out."""

    @property
    def accept_rate(self) -> float:
        """Accepted of the drafted tokens that were judged or thrown away."""
        return self.accepted / max(1, self.drafted)

    @property
    def rollback_rate(self) -> float:
        """Share of the passes that threw drafted tokens away."""
        return self.rollbacks / max(1, self.passes)


def speculate(
    model: GPT,
    prompt: Sequence[int],
    max_new: int,
    *,
    draft_width: WidthMap,
    block: int,
    generator: torch.Generator,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    width: WidthMap = None,
    eos: int | None = None,
    drafter: GPT | None = None,
    counts: Speculation | None = None,
) -> Iterator[int]:
    """Yield what `generate` would, up to `block` + 1 tokens per pass of `model` at `width`.

    `drafter` (the model itself if not given) proposes `block` tokens at `draft_width`; `counts` is kept up to date.
    Raises ModelError for a block below 1, a drafter with another vocabulary or a shorter context, and as `generate`.
    """
    check_request(model, prompt, temperature, top_k, top_p)
    drafter = model if drafter is None else drafter
    mine, other = model.config, drafter.config
    if block < 1 or mine.vocab_size != other.vocab_size or mine.context > other.context:
        raise ModelError(
            f"a block of {block} by a drafter of {other.vocab_size} tokens and a context of {other.context}: "
            f"draft at least 1 token with {mine.vocab_size} tokens and a context of at least {mine.context}."
        )
    counts = Speculation() if counts is None else counts
    verifying, drafting = Stream(model, width), Stream(drafter, draft_width)
    to_verify = to_draft = list(prompt[-mine.context :])
    left = max_new
    while left:
        # Never past the end of the window, where plain decoding would read it anew. (With no room it is read first.)
        spare = min(verifying.room, drafting.room - len(to_draft) + 1) - len(to_verify)
        size = max(0, min(block, left - 1, spare))
        drafts, q_TV = _draft(drafting, to_draft, size, temperature, top_k, top_p, generator)
        p_TV = probabilities(verifying.read([*to_verify, *drafts])[-size - 1 :], temperature, top_k, top_p)
        accepted, following = _judge(p_TV, q_TV, drafts, generator)
        counts.drafted += size
        counts.accepted += accepted
        counts.passes += 1
        counts.rollbacks += accepted < size
        verifying.forget(size - accepted)
        if size:  # the drafter has not read its last draft
            drafting.forget(max(0, size - 1 - accepted))
            to_draft = []
        to_draft = [*to_draft, *drafts[max(0, size - 1) : accepted], following]
        to_verify = [following]
        for token in (*drafts[:accepted], following):
            counts.tokens += 1
            left -= 1
            yield token
            if token == eos:
                return


def _draft(
    stream: Stream,
    unread: list[int],
    size: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    generator: torch.Generator,
) -> tuple[list[int], Tensor]:
    """`size` tokens and what each was drawn from, [size, V]."""
    drafts: list[int] = []
    drawn_from = []
    for _ in range(size):
        q_V = probabilities(stream.read(unread)[-1:], temperature, top_k, top_p)[0]
        drawn_from.append(q_V)
        drafts.append(draw(q_V, generator))
        unread = drafts[-1:]
    return drafts, torch.stack(drawn_from) if drawn_from else torch.empty(0, 0)


def _judge(p_TV: Tensor, q_TV: Tensor, drafts: list[int], generator: torch.Generator) -> tuple[int, int]:
    """How many drafts stand, and the token that follows them. p_TV has one row more than q_TV."""
    chances = torch.rand(len(drafts), generator=generator).tolist()
    for place, (token, chance) in enumerate(zip(drafts, chances, strict=True)):
        p_V, q_V = p_TV[place], q_TV[place]
        if chance * float(q_V[token]) >= float(p_V[token]):
            rest_V = (p_V - q_V).clamp(min=0)
            # Rounding may leave nothing where p and q are the same but for the last bit.
            return place, draw(rest_V / rest_V.sum() if rest_V.sum() > 0 else p_V, generator)
    return len(drafts), draw(p_TV[-1], generator)
