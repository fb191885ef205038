"""Diagnostics of a joint step: gradients against plain backward passes, warnings on made series and in training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from braniac.model.config import ModelConfig
from braniac.model.errors import TrainingDiverged
from braniac.model.gpt import GPT
from braniac.model.granularity import (
    DominationWarning,
    DominationWatch,
    FallingBehind,
    GranularityReport,
    Opposed,
    Starved,
    WatchSettings,
    measure,
)
from braniac.model.tiers import is_ffn

SMALL = ModelConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64, context=16
)
LLAMA = ModelConfig(
    family="llama",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=8,
    intermediate_size=64,
    vocab_size=64,
    context=16,
    nested_heads=True,
)


def random_model(config: ModelConfig = SMALL) -> GPT:
    model = GPT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def some_batch() -> tuple[Tensor, Tensor]:
    tokens, targets = torch.randint(0, 64, (2, 4, 16), generator=torch.Generator().manual_seed(1))
    return tokens, targets


def backward(model: GPT, widths: Sequence[int]) -> dict[str, Tensor]:
    """Gradients of the sum of the losses at these widths, by an ordinary backward pass."""
    model.zero_grad()
    for width in widths:
        model.loss(*some_batch(), width).backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([t.flatten() for t in tensors]).norm())


def test_losses_and_norms_are_those_of_separate_backward_passes() -> None:
    model, batch = random_model(), some_batch()
    reports = measure(model, *batch, (16, 64, 32))
    assert [report.width for report in reports] == [64, 32, 16]
    for report, narrower in zip(reports, (32, 16, 16), strict=True):
        g = backward(model, [report.width])
        shared = [g[name][:16] if is_ffn(name) else g[name] for name in g]
        tail = [g[name][narrower : report.width] for name in g if is_ffn(name)]
        assert report.loss == pytest.approx(model.loss(*batch, report.width).item(), rel=1e-6)
        assert report.shared_norm == pytest.approx(norm(shared), rel=1e-5)
        assert report.tail_norm == pytest.approx(norm(tail), rel=1e-5, abs=1e-12)
        assert (report.tail_norm == 0) == (report.width == 16)


def test_cosines_explain_the_norm_of_the_joint_gradient() -> None:
    model = random_model()
    reports = {report.width: report for report in measure(model, *some_batch(), (64, 32, 8))}
    for one, other in ((64, 32), (64, 8), (32, 8)):
        a, b = reports[one], reports[other]
        assert a.cosines[other] == b.cosines[one]
        assert -1 <= a.cosines[other] <= 1
        joint = backward(model, [one, other])
        shared = norm([joint[name][:8] if is_ffn(name) else joint[name] for name in joint])
        squared = a.shared_norm**2 + b.shared_norm**2 + 2 * a.shared_norm * b.shared_norm * a.cosines[other]
        assert shared == pytest.approx(math.sqrt(squared), rel=1e-5)
    assert all(width not in report.cosines for width, report in reports.items())


def test_measuring_leaves_weights_and_gradients_alone() -> None:
    model = random_model()
    first, *others = model.parameters()
    first.grad = torch.ones_like(first)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        reports = measure(model, *some_batch(), (64, 8))
    assert reports == measure(model, *some_batch(), (64, 8, 64))
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in others)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_nested_heads_belong_to_the_tail_too() -> None:
    model = random_model(LLAMA)
    wide, narrow = measure(model, *some_batch(), (64, 16))  # eight heads and two
    g = backward(model, [64])
    sliced = [name for name in g if "_proj" in name]
    tail = [g[name][16 if is_ffn(name) else 8 :] for name in sliced]
    assert wide.tail_norm == pytest.approx(norm(tail), rel=1e-5)
    shared = [g[name][: 16 if is_ffn(name) else 8] if name in sliced else g[name] for name in g]
    assert wide.shared_norm == pytest.approx(norm(shared), rel=1e-5)
    assert narrow.tail_norm == 0


def test_layers_of_different_widths_are_measured() -> None:
    model = GPT(SMALL, neurons=(64, 16))
    model.init_weights(0)
    wide, narrow = measure(model, *some_batch(), (64, 8))
    assert wide.loss == pytest.approx(narrow.loss, abs=1e-4)  # the initial output projections are zero
    assert wide.cosines[8] == pytest.approx(1.0, abs=1e-6)


def test_a_gradient_of_zero_has_no_direction() -> None:
    wide, narrow = measure(GPT(SMALL), *some_batch(), (64, 8))
    assert (wide.shared_norm, wide.cosines[8], narrow.cosines[64]) == (0.0, 0.0, 0.0)


def test_a_loss_that_is_not_finite_is_refused_with_its_width() -> None:
    model = random_model()
    with torch.no_grad():
        model.model.layers[0].get_parameter("mlp.up_proj.weight")[40] = math.nan
    measure(model, *some_batch(), (32, 8))
    with pytest.raises(TrainingDiverged, match="width 64"):
        measure(model, *some_batch(), (64, 8))


def made(
    *, largest: float = 1.0, smallest: float = 1.1, cosine: float = 0.5, norms: tuple[float, float] = (1.0, 1.0)
) -> list[GranularityReport]:
    """Reports of two granularities with these numbers."""
    return [
        GranularityReport(width=64, loss=largest, shared_norm=norms[0], tail_norm=0.1, cosines={8: cosine}),
        GranularityReport(width=8, loss=smallest, shared_norm=norms[1], tail_norm=0.0, cosines={64: cosine}),
    ]


def feed(watch: DominationWatch, series: Sequence[list[GranularityReport]], start: int = 0) -> list[DominationWarning]:
    return [warning for step, reports in enumerate(series, start) for warning in watch.observe(step, reports)]


PROMPT = WatchSettings(decay=0.0, patience=3)


def test_a_lasting_negative_cosine_is_warned_of_once() -> None:
    watch = DominationWatch(PROMPT)
    assert feed(watch, [made(cosine=-0.2)] * 2) == []
    assert feed(watch, [made(cosine=-0.3)] * 5, start=2) == [Opposed(step=2, cosine=-0.3, bound=0.0)]
    assert feed(watch, [made(cosine=0.1), *[made(cosine=-0.4)] * 3], start=7) == [
        Opposed(step=10, cosine=-0.4, bound=0.0)
    ]


def test_a_negative_cosine_now_and_then_is_not_warned_of() -> None:
    assert feed(DominationWatch(PROMPT), [made(cosine=-0.9), made(cosine=-0.9), made(cosine=0.1)] * 5) == []
    # With an average even a long run does no harm as long as the mean is positive.
    smooth = DominationWatch(WatchSettings(decay=0.95, patience=3))
    assert feed(smooth, [made(cosine=0.9)] * 10 + [made(cosine=-0.2)] * 5) == []


def test_a_smallest_that_stands_still_while_the_largest_falls_is_warned_of() -> None:
    series = [made(largest=2.0 - 0.1 * step, smallest=2.0) for step in range(5)]
    (warning,) = feed(DominationWatch(PROMPT), series)
    assert isinstance(warning, FallingBehind)
    # Step 0 has no past; steps 1, 2 and 3 show the sign.
    assert (warning.step, warning.smallest_fall, warning.bound) == (3, 0.0, 0.8)
    assert warning.gap == pytest.approx(0.3)
    assert warning.largest_fall == pytest.approx(math.log(2.0 / 1.7))
    assert "fell by 0.163" in str(warning)


def test_an_average_starts_at_the_first_value() -> None:
    (warning,) = feed(DominationWatch(WatchSettings(decay=0.9, patience=3)), [made(cosine=-0.3)] * 4)
    assert isinstance(warning, Opposed)
    assert warning.cosine == pytest.approx(-0.3)


@pytest.mark.parametrize(
    "series",
    [
        [made(largest=2.0 * 0.9**step, smallest=2.2 * 0.9**step) for step in range(20)],
        [made(largest=2.0, smallest=2.0 + 0.1 * step) for step in range(20)],  # a gap, but nobody gains by it
        [made(largest=2.0 * 0.999**step, smallest=2.0) for step in range(20)],  # less than noise
        [made(largest=0.0, smallest=0.0)] * 20,
    ],
)
def test_a_smallest_that_keeps_up_is_not_warned_of(series: list[list[GranularityReport]]) -> None:
    assert feed(DominationWatch(PROMPT), series) == []


def test_a_smallest_without_gradient_is_warned_of() -> None:
    (warning,) = feed(DominationWatch(PROMPT), [made(norms=(1.0, 0.1))] * 4)
    assert warning == Starved(step=2, share=pytest.approx(0.1 / 1.1), bound=0.125)
    assert feed(DominationWatch(PROMPT), [made(norms=(1.0, 0.2))] * 4) == []
    assert feed(DominationWatch(PROMPT), [made(norms=(0.0, 0.0))] * 4) == []


def test_the_weights_of_the_losses_count_in_the_share() -> None:
    watch = DominationWatch(PROMPT)
    found = [watch.observe(step, made(), {64: 1.0, 8: 0.05}) for step in range(3)]
    assert [type(warning) for warnings in found for warning in warnings] == [Starved]


def test_reports_may_come_in_any_order() -> None:
    series = [made(largest=2.0 - 0.1 * step, smallest=2.0, cosine=-0.1) for step in range(6)]
    backwards = [reports[::-1] for reports in series]
    assert feed(DominationWatch(PROMPT), series) == feed(DominationWatch(PROMPT), backwards) != []


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(0, 1e6)), max_size=60), st.floats(0, 0.99), st.integers(1, 10))
@settings(max_examples=50)
def test_equal_granularities_are_never_warned_of(
    series: list[tuple[float, float]], decay: float, patience: int
) -> None:
    watch = DominationWatch(WatchSettings(decay=decay, patience=patience))
    assert feed(watch, [made(largest=x, smallest=x, cosine=1.0, norms=(n, n)) for x, n in series]) == []


def test_a_watch_refuses_what_it_cannot_judge() -> None:
    with pytest.raises(AssertionError, match="smallest"):
        DominationWatch().observe(0, made()[:1])
    with pytest.raises(AssertionError, match="nan"):
        DominationWatch().observe(0, made(cosine=math.nan))


def train(weights: Mapping[int, float]) -> list[DominationWarning]:
    """Learn one batch by heart with these loss weights, watched at every step without telling the watch of them."""
    model, batch, watch = GPT(SMALL), some_batch(), DominationWatch(WatchSettings(decay=0.5, patience=4))
    model.init_weights(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    warnings: list[DominationWarning] = []
    for step in range(22):
        warnings += watch.observe(step, measure(model, *batch, tuple(weights)))
        optimizer.zero_grad()
        for width, alpha in weights.items():
            if alpha:
                (alpha * model.loss(*batch, width)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return warnings


def test_training_the_largest_alone_is_noticed_and_joint_training_is_not() -> None:
    assert [type(warning) for warning in train({64: 1.0, 8: 0.0})] == [FallingBehind]
    assert train({64: 1.0, 8: 1.0}) == []
