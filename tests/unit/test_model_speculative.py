"""Speculative decoding is exact: its text has the verifier's distribution, whatever the drafter says."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from braniac.model import speculative
from braniac.model.config import ModelConfig
from braniac.model.decoding import distribution, generate
from braniac.model.errors import ModelError
from braniac.model.gpt import GPT
from braniac.model.speculative import speculate, verify
from tests.unit.test_model_gpt import SMALL, each_family, random_model

VOCAB = 4
TOY = dataclasses.replace(SMALL, num_hidden_layers=1, vocab_size=VOCAB, context=8)
SAMPLES = 800
# 99.99% quantile of chi-square with 4^3 - 1 degrees of freedom.
LIMIT = 113.0


def exact(model: GPT, prompt: list[int], temperature: float) -> Tensor:
    """Probability of each text of 3 tokens, [VOCAB ** 3]."""
    chances = []
    for text in itertools.product(range(VOCAB), repeat=3):
        with torch.no_grad():
            p_TV = distribution(model(torch.tensor([[*prompt, *text]]))[0], temperature, None)
        chances.append(float(torch.stack([p_TV[len(prompt) - 1 + i, token] for i, token in enumerate(text)]).prod()))
    return torch.tensor(chances)


def chi_square(model: GPT, block: int) -> float:
    """Of SAMPLES texts of 3 tokens against what the verifier alone would write."""
    prompt, dice = [1, 3], torch.Generator().manual_seed(0)
    counts = torch.zeros(VOCAB**3)
    for _ in range(SAMPLES):
        text, _ = speculate(model, prompt, 3, draft_width=8, block=block, generator=dice, temperature=1.2)
        a, b, c = text
        counts[(a * VOCAB + b) * VOCAB + c] += 1
    expected = exact(model, prompt, 1.2) * SAMPLES
    return float(((counts - expected).square() / expected).sum())


def test_the_text_has_the_verifiers_distribution() -> None:
    assert chi_square(random_model(config=TOY), block=2) < LIMIT


def test_the_test_would_notice_a_rule_that_accepts_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def accept(drafted: Sequence[int], q_KV: object, p_KV: Tensor, generator: torch.Generator) -> list[int]:
        return [*drafted, int(torch.multinomial(p_KV[len(drafted)], 1, generator=generator))]

    monkeypatch.setattr(speculative, "verify", accept)
    assert chi_square(random_model(config=TOY), block=2) > 3 * LIMIT


def test_one_judgement_turns_any_drafters_choice_into_the_verifiers() -> None:
    p_V, q_V = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.7, 0.2, 0.1, 0.0])
    dice = torch.Generator().manual_seed(0)
    first = [
        verify([int(torch.multinomial(q_V, 1, generator=dice))], [q_V], torch.stack([p_V, p_V]), dice)[0]
        for _ in range(6000)
    ]
    assert torch.allclose(torch.bincount(torch.tensor(first), minlength=4) / 6000, p_V, atol=0.02)


@each_family
@pytest.mark.parametrize("block", [1, 3])
def test_greedy_speculation_writes_what_plain_decoding_writes_also_beyond_the_context(
    config: ModelConfig, block: int
) -> None:
    model = random_model(config=config)
    plain = list(generate(model, [5, 6], 40, generator=torch.Generator(), temperature=0))
    text, stats = speculate(model, [5, 6], 40, draft_width=8, block=block, generator=torch.Generator(), temperature=0)
    assert list(text) == plain
    assert stats.tokens == 40
    assert stats.accepted + stats.passes == 40
    assert 0 <= stats.accepted <= stats.drafted <= block * stats.passes


def test_a_drafter_that_is_the_verifier_is_always_accepted() -> None:
    model = random_model()
    text, stats = speculate(model, [1], 13, draft_width=64, block=3, generator=torch.Generator(), temperature=0)
    assert len(list(text)) == 13
    assert stats.accept_rate == 1
    assert stats.rollback_rate == 0
    assert stats.passes == 4


def test_another_model_may_draft_and_the_clock_is_the_callers() -> None:
    model, drafter = random_model(), GPT(SMALL, 3)
    drafter.init_weights(0)
    ticks = itertools.count()
    text, stats = speculate(
        model,
        [1],
        12,
        draft_width=None,
        block=2,
        generator=torch.Generator(),
        temperature=0,
        drafter=drafter,
        clock=lambda: float(next(ticks)),
    )
    assert list(text) == list(generate(model, [1], 12, generator=torch.Generator(), temperature=0))
    assert stats.accept_rate < 1
    assert stats.seconds == stats.passes


def test_the_end_token_ends_the_text_in_the_middle_of_a_block() -> None:
    model = random_model()
    plain = list(generate(model, [5, 6], 12, generator=torch.Generator(), temperature=0))
    text, stats = speculate(
        model, [5, 6], 12, draft_width=64, block=4, generator=torch.Generator(), temperature=0, eos=plain[2]
    )
    assert list(text) == plain[: plain.index(plain[2]) + 1]
    assert stats.tokens == plain.index(plain[2]) + 1


def test_what_cannot_draft_is_refused() -> None:
    model = random_model()
    other = GPT(dataclasses.replace(SMALL, vocab_size=100))
    for changes in ({"block": 0}, {"drafter": other}, {"draft_width": 13}):
        wanted = {"draft_width": 8, "block": 2} | changes
        with pytest.raises(ModelError):
            speculate(model, [1], 3, generator=torch.Generator(), **wanted)  # type: ignore[arg-type]
