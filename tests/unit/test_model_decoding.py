"""Decoding: the reader computes what the model computes; greedy, sampling and beams against naive references."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import pytest
import torch

from braniac.model.config import ModelConfig
from braniac.model.decoding import beam_search, distribution, generate
from braniac.model.errors import ModelError
from braniac.model.gpt import GPT
from braniac.model.reader import Reader
from braniac.model.tiers import WidthMap
from tests.unit.test_model_gpt import FAMILIES, each_family, random_model, some_tokens

TINY_VOCAB = dataclasses.replace(FAMILIES["llama"], vocab_size=5, context=8)


@each_family
@pytest.mark.parametrize("width", [None, 24, (8, 64)])
def test_a_reader_computes_what_the_model_computes(config: ModelConfig, width: WidthMap) -> None:
    model, tokens = random_model(config=config), some_tokens(batch=1)
    with torch.no_grad():
        expected = model(tokens, width)[0]
    reader, row = Reader(model, width), tokens[0].tolist()
    parts = [reader.read(row[a:b], b - a) for a, b in ((0, 5), (5, 6), (6, 9), (9, 16))]
    assert torch.allclose(torch.cat(parts), expected, atol=1e-3)
    reader.truncate(7)
    assert torch.allclose(reader.read(row[7:12])[0], expected[11], atol=1e-3)


def naive(model: GPT, prompt: list[int], count: int, width: WidthMap = None) -> list[int]:
    """Greedy decoding that computes the whole window for every token."""
    text, window = [], prompt[-model.config.context :]
    for _ in range(count):
        if len(window) > model.config.context:
            window = window[-(model.config.context // 2) :]
        with torch.no_grad():
            token = int(model(torch.tensor([window]), width)[0, -1].argmax())
        text.append(token)
        window = [*window, token]
    return text


@pytest.mark.parametrize("width", [None, 8])
@pytest.mark.parametrize("prompt", [[1, 2, 3], list(range(40))])
def test_greedy_text_is_that_of_recomputing_everything_also_beyond_the_context(
    prompt: list[int], width: WidthMap
) -> None:
    model = random_model()
    text = generate(model, prompt, 40, generator=torch.Generator(), temperature=0, width=width)
    assert list(text) == naive(model, prompt, 40, width)


def test_sampling_follows_the_distribution_and_the_seed() -> None:
    model = random_model(config=TINY_VOCAB)
    with torch.no_grad():
        expected = distribution(model(torch.tensor([[1, 2]]))[0, -1], 1.5, 3)
    dice = torch.Generator().manual_seed(0)
    drawn = [next(generate(model, [1, 2], 1, generator=dice, temperature=1.5, top_k=3)) for _ in range(1500)]
    counts = torch.bincount(torch.tensor(drawn), minlength=5)
    assert int((expected > 0).sum()) == 3
    assert torch.allclose(counts / 1500, expected, atol=0.04)
    assert not counts[expected == 0].any()


def test_the_end_token_ends_the_text() -> None:
    model = random_model()
    text = naive(model, [1, 2, 3], 10)
    stopped = list(generate(model, [1, 2, 3], 10, generator=torch.Generator(), temperature=0, eos=text[4]))
    assert stopped == text[: text.index(text[4]) + 1]


def total_log_probability(model: GPT, prompt: Sequence[int], text: Sequence[int]) -> float:
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([[*prompt, *text]]))[0].double(), dim=-1)
    return sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(text))


def test_a_wide_enough_beam_finds_the_best_of_all_texts() -> None:
    model, prompt = random_model(config=TINY_VOCAB), [0, 3]
    ranked = sorted(itertools.product(range(5), repeat=3), key=lambda text: -total_log_probability(model, prompt, text))
    found = beam_search(model, prompt, 3, beams=25)
    assert [hypothesis.tokens for hypothesis in found[:5]] == ranked[:5]
    for hypothesis in found:
        expected = total_log_probability(model, prompt, hypothesis.tokens)
        assert hypothesis.log_probability == pytest.approx(expected, abs=1e-3)


def test_one_beam_is_greedy_decoding() -> None:
    model = random_model()
    (only,) = beam_search(model, [1, 2, 3], 10, beams=1)
    assert list(only.tokens) == naive(model, [1, 2, 3], 10)


def test_a_beam_ends_at_the_end_token_and_the_penalty_decides_the_order() -> None:
    model = random_model(config=TINY_VOCAB)
    eos = beam_search(model, [1], 5, beams=4)[0].tokens[2]
    for penalty in (0.0, 1.0):
        found = beam_search(model, [1], 5, beams=4, eos=eos, length_penalty=penalty)
        assert len(found) == 4
        assert any(len(hypothesis.tokens) < 5 for hypothesis in found)
        assert all(eos not in hypothesis.tokens[:-1] for hypothesis in found)
        assert all((hypothesis.tokens[-1] == eos) == hypothesis.finished for hypothesis in found)
        scores = [h.log_probability / len(h.tokens) ** penalty for h in found]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(("beams", "max_new"), [(0, 3), (2, 0)])
def test_a_beam_search_refuses_what_it_cannot_do(beams: int, max_new: int) -> None:
    with pytest.raises(ModelError):
        beam_search(random_model(), [1], max_new, beams=beams)
