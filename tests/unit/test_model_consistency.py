"""Consistency between widths: against sums done with Python floats, on wild logits, on windows that end, on models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from braniac.model.config import ModelConfig
from braniac.model.consistency import (
    compare,
    entropy,
    log_probabilities,
    model_consistency,
    valid_positions,
    width_consistency,
)
from braniac.model.errors import ModelError
from braniac.model.evaluate import EVALUATION_BATCH
from braniac.model.gpt import GPT

SMALL = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, context=16)
EOS = 7

# Half of all rows come from a few values only, so that ties and impossible tokens are common.
wild = st.one_of(
    st.sampled_from([0.0, 0.0, 1.0, -math.inf, 1e4, -1e4]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)


@st.composite
def pairs(draw: st.DrawFn, logits: st.SearchStrategy[float] = wild) -> tuple[list[list[float]], list[list[float]]]:
    """Two lists of rows of one shape, no row wholly impossible."""
    rows, vocabulary = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    row = st.tuples(*[logits] * vocabulary).filter(lambda r: max(r) > -math.inf).map(list)
    rows_of = st.tuples(*[row] * rows).map(list)
    return draw(rows_of), draw(rows_of)


def surprises(row: list[float], temperature: float) -> list[float]:
    """-log of each probability, one float at a time and without torch."""
    scaled = [(x - max(row)) / temperature for x in row]
    total = math.fsum(math.exp(x) for x in scaled)
    return [math.log(total) - x for x in scaled]


def expected(reference: list[list[float]], candidate: list[list[float]], temperature: float) -> dict[str, float]:
    """What `compare` must find, as means over the rows."""
    kl, cross, own, matches = [], [], [], 0
    for p_row, q_row in zip(reference, candidate, strict=True):
        p, q = surprises(p_row, temperature), surprises(q_row, temperature)
        for a, b in zip(p, q, strict=True):
            if math.exp(-a) > 0:
                kl.append(math.exp(-a) * (b - a))
                cross.append(math.exp(-a) * b)
                own.append(math.exp(-a) * a)
        best = [{i for i, x in enumerate(row) if x == max(row)} for row in (p_row, q_row)]
        matches += bool(best[0] & best[1])
    count = len(reference)
    total = {"kl": kl, "cross_entropy": cross, "reference_entropy": own}
    return {name: sum(terms) / count for name, terms in total.items()} | {"token_match": matches / count}


@given(pairs(), st.sampled_from([1.0, 0.05, 0.7, 30.0]))
@settings(max_examples=60)
def test_it_agrees_with_sums_of_python_floats(
    rows: tuple[list[list[float]], list[list[float]]], temperature: float
) -> None:
    reference, candidate = rows
    found = compare(torch.tensor(reference), torch.tensor(candidate), temperature=temperature)
    assert found.positions == len(reference)
    for name, value in expected(reference, candidate, temperature).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9, abs=1e-9), name


@given(pairs(), st.floats(1e-300, 1e300))
@settings(max_examples=40)
def test_wild_logits_give_no_nan_and_keep_the_identities(
    rows: tuple[list[list[float]], list[list[float]]], temperature: float
) -> None:
    reference, candidate = torch.tensor(rows[0]), torch.tensor(rows[1])
    found = compare(reference, candidate, temperature=temperature)
    assert 0 <= found.token_match <= 1
    assert 0 <= found.reference_entropy <= math.log(reference.shape[-1]) + 1e-9
    assert found.kl >= 0
    assert found.cross_entropy == pytest.approx(found.kl + found.reference_entropy, rel=1e-9, abs=1e-9)
    # A token that the reference allows and the candidate does not is the only cause of an infinite KL at this scale.
    if temperature == 1.0:
        p = torch.softmax(reference.double(), dim=-1)
        assert math.isinf(found.kl) == bool(((p > 0) & (candidate == -math.inf)).any())
    itself = compare(reference, reference, temperature=temperature)
    assert (itself.token_match, itself.kl) == (1.0, 0.0)
    assert itself.cross_entropy == itself.reference_entropy == found.reference_entropy


@given(pairs(st.sampled_from([-math.inf, 0.0]) | st.floats(-1e4, 1e4)))
@settings(max_examples=30)
def test_a_shift_of_all_logits_of_a_row_changes_nothing(rows: tuple[list[list[float]], list[list[float]]]) -> None:
    reference, candidate = (torch.tensor(side).double() for side in rows)
    plain, shifted = compare(reference, candidate), compare(reference + 1024.0, candidate - 4096.0)
    assert shifted.kl == pytest.approx(plain.kl, rel=1e-6, abs=1e-6)
    assert shifted.reference_entropy == pytest.approx(plain.reference_entropy, rel=1e-6, abs=1e-6)


def test_kl_is_of_the_reference_over_the_candidate() -> None:
    sharp, flat = torch.tensor([[math.log(9.0), 0.0]]), torch.zeros(1, 2)
    forward = compare(sharp, flat)
    assert forward.kl == pytest.approx(math.log(2) - forward.reference_entropy)
    assert forward.cross_entropy == pytest.approx(math.log(2))
    assert compare(flat, sharp).kl == pytest.approx(0.5 * (math.log(5 / 9) + math.log(5)))


def test_temperature_divides_both_sides() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, candidate = torch.randn(2, 5, 9, generator=generator, dtype=torch.float64)
    assert compare(reference, candidate, temperature=4.0) == compare(reference / 4, candidate / 4)
    # In float32 a division by the temperature would make all of these equal; ties belong to the logits as given.
    close = torch.tensor([[1.0, 1.0 + 2**-23]])
    assert compare(close, close.flip(-1), temperature=1e300).token_match == 0.0


def test_an_unlikely_token_keeps_its_logarithm() -> None:
    # The candidate's probability of the reference's token is e^-2000, zero in every float format.
    found = compare(torch.tensor([[0.0, -math.inf]]), torch.tensor([[-2000.0, 0.0]]))
    assert found.kl == found.cross_entropy == 2000.0


def test_a_small_kl_does_not_cancel() -> None:
    # Two distributions so near that the cross-entropy and the entropy agree to about fifteen digits.
    step = 1e-7
    found = compare(torch.tensor([[0.0, 0.0]]), torch.tensor([[step, -step]], dtype=torch.float64))
    assert found.kl == pytest.approx(step**2 / 2, rel=1e-2)


def test_tied_tokens_match_if_one_is_shared() -> None:
    reference = torch.tensor([[5.0, 5.0, 0.0, 0.0]]).expand(4, 4)
    candidate = torch.tensor([[0.0, 9.0, 0, 0], [0.0, 0, 9, 0], [0.0, 7, 7, 0], [0.0, 0, 7, 7]])
    for row, match in zip(range(4), (1.0, 0.0, 1.0, 0.0), strict=True):
        assert compare(reference[row], candidate[row]).token_match == match
        assert compare(candidate[row], reference[row]).token_match == match
    assert compare(torch.zeros(3, 5), torch.zeros(3, 5)).token_match == 1.0


def test_masked_positions_are_not_looked_at() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, candidate = torch.randn(2, 3, 4, 9, generator=generator)
    mask = torch.rand(3, 4, generator=generator) < 0.5
    only = compare(reference[mask], candidate[mask])
    reference[~mask], candidate[~mask] = math.nan, math.inf
    assert compare(reference, candidate, mask=mask) == only
    assert only.positions == int(mask.sum())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_no_distribution_are_refused(bad: float) -> None:
    good, wrong = torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [0, bad, 0]])
    for pair in ((good, wrong), (wrong, good), (good, torch.full((2, 3), -math.inf))):
        with pytest.raises(ModelError, match=r"NaN, \+inf or nothing but -inf"):
            compare(*pair)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"candidate_logits": torch.zeros(2, 4)}, r"shapes \[2, 3\] and \[2, 4\]"),
        ({"mask": torch.ones(2)}, "must be bool"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, r"must be bool \[2\]"),
        ({"mask": torch.zeros(2, dtype=torch.bool)}, "no position is left"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -1.0}, "above zero"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "finite"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        compare(**{"reference_logits": torch.zeros(2, 3), "candidate_logits": torch.zeros(2, 3)} | arguments)


def test_a_large_vocabulary_is_done_in_pieces_with_one_result() -> None:
    generator = torch.Generator().manual_seed(0)
    reference, candidate = torch.randn(2, 40, 1 << 16, generator=generator)
    log_p, log_q = (torch.log_softmax(x.double(), dim=-1) for x in (reference, candidate))
    found = compare(reference, candidate)
    assert found.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-12)
    assert found.positions == 40


def test_entropy_is_that_of_each_row() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, -math.inf]]])
    assert entropy(logits).tolist() == [[pytest.approx(math.log(2)), 0.0]]
    assert log_probabilities(logits)[0, 1].tolist() == [0.0, -math.inf]


def test_positions_from_the_end_on_do_not_count() -> None:
    tokens = torch.tensor([[1, 2, EOS, 0, 0], [EOS, 3, 4, EOS, EOS], [1, 2, 3, 4, 5], [1, EOS, 2, 3, 4]])
    assert valid_positions(tokens, EOS).int().tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0],
    ]


def random_model(seed: int = 0) -> GPT:
    model = GPT(SMALL, 0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def some_windows(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 16), generator=torch.Generator().manual_seed(1))


def test_widths_are_compared_over_all_windows_at_once() -> None:
    model, tokens = random_model(), some_windows(2 * EVALUATION_BATCH + 1)  # the last batch holds a single window
    tokens[-1, 2] = EOS
    found = width_consistency(model, tokens, (64, 32, 8), temperature=0.8, eos=EOS)
    assert list(found) == [64, 32, 8]
    mask = valid_positions(tokens, EOS)
    with torch.no_grad():
        whole, narrow = (model(tokens, width)[mask].double().numpy() / 0.8 for width in (64, 8))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (whole, narrow))  # soft-capped: plain exp is safe
    assert found[8].positions == len(p) < tokens.numel()
    assert found[8].kl == pytest.approx(float(np.mean((p * np.log(p / q)).sum(-1))), rel=1e-5)
    assert found[8].token_match == np.mean(whole.argmax(-1) == narrow.argmax(-1))
    assert (found[64].kl, found[64].token_match) == (0.0, 1.0)
    assert 0 < found[32].kl < found[8].kl


def test_another_width_can_be_the_reference() -> None:
    model, tokens = random_model(), some_windows(2)
    found = width_consistency(model, tokens, (64, 16), reference=16)
    assert found[16].kl == 0.0
    forth, back = found[64], width_consistency(model, tokens, (16,))[16]
    assert forth.token_match == back.token_match
    assert forth.kl != pytest.approx(back.kl, rel=1e-3)


def test_two_models_are_compared_and_left_alone() -> None:
    one, other, tokens = random_model(0), random_model(1), some_windows(3)
    found = model_consistency(one, {"itself": one, "other": other}, tokens)
    assert found["itself"].kl == 0.0
    with torch.no_grad():
        assert found["other"] == compare(one(tokens), other(tokens))
    assert all(p.grad is None for p in one.parameters())


def test_no_windows_are_refused() -> None:
    with pytest.raises(ModelError, match="no position is left"):
        width_consistency(random_model(), some_windows(0), (64,))
