"""Adaptive retrieval: each metric against its definition, the protocol, and narrow queries against the control."""

from __future__ import annotations

import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from braniac.model.encoder import Encoder, EncoderConfig, train_encoder
from braniac.model.errors import ConfigError, DataError
from braniac.model.retrieval import (
    EMBEDDING_BATCH,
    RetrievalSet,
    adaptive_retrieval,
    embed,
    mean_ranks,
    nearest,
    neighbour_overlap,
    recall_at,
    spearman,
)

BENCHMARK: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "retrieval.py"))
CONFIG: EncoderConfig = BENCHMARK["CONFIG"]

Rows = list[list[float]]


@st.composite
def matrices(draw: st.DrawFn, count: int = 2) -> tuple[Rows, ...]:
    """Similarity matrices of one shape; few distinct values, so that ties are common."""
    queries, items = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    value = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]) | st.floats(-1, 1, width=32)
    rows = st.lists(st.lists(value, min_size=items, max_size=items), min_size=queries, max_size=queries)
    return tuple(draw(rows) for _ in range(count))


def slow_nearest(row: list[float], neighbours: int) -> list[int]:
    return sorted(range(len(row)), key=lambda item: (-row[item], item))[:neighbours]


def slow_ranks(row: list[float]) -> list[float]:
    ordered = sorted(row)
    places = {value: [place for place, v in enumerate(ordered, 1) if v == value] for value in row}
    return [sum(places[value]) / len(places[value]) for value in row]


def slow_correlation(one: list[float], other: list[float]) -> float:
    one_mean, other_mean = sum(one) / len(one), sum(other) / len(other)
    covariance = sum((a - one_mean) * (b - other_mean) for a, b in zip(one, other, strict=True))
    spread = math.sqrt(sum((a - one_mean) ** 2 for a in one) * sum((b - other_mean) ** 2 for b in other))
    return covariance / spread if spread else 0.0


@settings(max_examples=50)
@given(matrices(count=1), st.data())
def test_neighbours_and_recall_follow_their_definitions(drawn: tuple[Rows], data: st.DataObject) -> None:
    (rows,) = drawn
    items = len(rows[0])
    neighbours = data.draw(st.integers(1, items))
    query_labels, corpus_labels = (
        data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size)) for size in (len(rows), items)
    )
    expected = [slow_nearest(row, neighbours) for row in rows]
    similarities = torch.tensor(rows)
    assert nearest(similarities, neighbours).tolist() == expected
    hits = [
        any(corpus_labels[item] == label for item in found) for found, label in zip(expected, query_labels, strict=True)
    ]
    recall = recall_at(similarities, torch.tensor(query_labels), torch.tensor(corpus_labels), neighbours)
    assert recall == pytest.approx(sum(hits) / len(hits))


@settings(max_examples=50)
@given(matrices(), st.data())
def test_overlap_follows_its_definition(drawn: tuple[Rows, Rows], data: st.DataObject) -> None:
    one, other = drawn
    neighbours = data.draw(st.integers(1, len(one[0])))
    common = [
        len(set(slow_nearest(a, neighbours)) & set(slow_nearest(b, neighbours))) / neighbours
        for a, b in zip(one, other, strict=True)
    ]
    overlap = neighbour_overlap(torch.tensor(one), torch.tensor(other), neighbours)
    assert overlap == pytest.approx(sum(common) / len(common))


@settings(max_examples=50)
@given(matrices())
def test_rank_correlation_follows_its_definition(drawn: tuple[Rows, Rows]) -> None:
    one, other = drawn
    assert mean_ranks(torch.tensor(one)).tolist() == [slow_ranks(row) for row in one]
    expected = [slow_correlation(slow_ranks(a), slow_ranks(b)) for a, b in zip(one, other, strict=True)]
    measured = spearman(torch.tensor(one), torch.tensor(other))
    assert measured == pytest.approx(sum(expected) / len(expected), abs=1e-9)


def test_rank_correlation_of_known_orders() -> None:
    up = torch.tensor([[0.1, 0.2, 0.3, 0.9]])
    assert spearman(up, up.exp()) == pytest.approx(1.0)
    assert spearman(up, -up) == pytest.approx(-1.0)
    assert spearman(up, torch.zeros(1, 4)) == 0.0
    assert spearman(up, torch.tensor([[1.0, 1.0, 2.0, 2.0]])) == pytest.approx(2 / math.sqrt(5))


def small_set(seed: int = 0, count: int = 6) -> RetrievalSet:
    data = BENCHMARK["retrieval_set"](seed, count)
    assert isinstance(data, RetrievalSet)
    return data


def random_encoder(seed: int = 0) -> Encoder:
    encoder, dice = Encoder(CONFIG), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in encoder.parameters():
            p.normal_(std=0.2, generator=dice)
    return encoder


def test_textures_repeat_with_the_seed_and_differ_in_class_more_than_in_view() -> None:
    textures = BENCHMARK["textures"]
    images: Tensor = textures(8, 3, seed=5)
    assert images.shape == (8, 3, 1, 16, 16)
    assert torch.equal(images, textures(8, 3, seed=5))
    assert not torch.allclose(images, textures(8, 3, seed=6), atol=0.1)
    spectra = torch.fft.fft2(images).abs().flatten(2)  # a magnitude spectrum does not see phases
    within = (spectra[:, 0] - spectra[:, 1]).norm(dim=1).mean()
    between = (spectra[:, 0] - spectra[:, 1].roll(1, 0)).norm(dim=1).mean()
    assert between > 1.3 * within


def test_no_query_is_in_its_corpus() -> None:
    data = small_set()
    assert (len(data.queries_QCSS), len(data.corpus_NCSS)) == (6, 24)
    distances = torch.cdist(data.queries_QCSS.flatten(1), data.corpus_NCSS.flatten(1))
    assert distances.min() > 1.0


def test_the_corpus_stays_at_full_width_and_each_width_of_queries_is_measured_against_it() -> None:
    data, encoder = small_set(), random_encoder()
    whole, narrow, mixed = adaptive_retrieval(encoder, data, [(encoder, None), (encoder, 16), (encoder, (128, 16))], 3)
    assert (whole.widths, narrow.widths, mixed.widths) == ((128, 128), (16, 16), (128, 16))
    assert whole.overlap == 1.0
    assert whole.spearman == pytest.approx(1.0)
    corpus, reference, queries = (
        encoder(data.corpus_NCSS),
        encoder(data.queries_QCSS),
        encoder(data.queries_QCSS, 16),
    )
    assert narrow.spearman == pytest.approx(spearman(queries @ corpus.T, reference @ corpus.T), abs=1e-6)
    assert narrow.overlap == pytest.approx(neighbour_overlap(queries @ corpus.T, reference @ corpus.T, 3))
    assert narrow.recall == pytest.approx(recall_at(queries @ corpus.T, data.query_labels_Q, data.corpus_labels_N, 3))
    assert narrow.accuracy_1nn <= narrow.recall
    assert narrow.spearman < mixed.spearman < 1.0


def test_embedding_in_batches_changes_nothing_and_keeps_no_graph() -> None:
    encoder, images = random_encoder(), torch.randn(EMBEDDING_BATCH + 3, 1, 16, 16, generator=torch.Generator())
    embeddings = embed(encoder, images, 16)
    assert torch.allclose(embeddings, encoder(images, 16), atol=1e-5)
    assert not embeddings.requires_grad


def test_after_joint_training_narrow_queries_find_their_way_where_a_separate_encoder_is_lost() -> None:
    whole, narrow = 128, 16
    joint, separate = Encoder(CONFIG), Encoder(CONFIG, neurons=[narrow] * CONFIG.num_hidden_layers)
    for encoder, widths, seed in ((joint, [whole, narrow], 0), (separate, [narrow], 1)):
        encoder.init_weights(seed)
        train_encoder(encoder, BENCHMARK["training_pairs"](seed, 16), widths, steps=60)
    data = small_set(count=64)
    wide, sliced, control = adaptive_retrieval(joint, data, [(joint, None), (joint, narrow), (separate, None)], 10)
    (alone,) = adaptive_retrieval(separate, data, [(separate, None)], 10)
    assert wide.recall > 0.85
    assert alone.recall > 0.8
    assert sliced.recall > 0.6
    assert control.recall < 0.25  # chance is 0.15
    assert sliced.overlap > 0.35
    assert control.overlap < 0.12  # chance is 0.04
    assert sliced.spearman > 0.7
    assert control.spearman < 0.3


def test_the_benchmark_prints_one_json_object_or_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "1", "--batch", "2", "--textures", "4", "--neighbours", "2", "--seed", "3"]
    BENCHMARK["main"]([*arguments, "--json"])
    printed = json.loads(capsys.readouterr().out)
    for key in ("joint", "separate", "separate_alone", "sliced"):
        assert [row["widths"] for row in printed[key]] == [[128, 128], [64, 64], [32, 32], [16, 16]]
        assert all(0 <= row["accuracy_1nn"] <= row["recall"] <= 1 for row in printed[key])
    assert printed["chance"] == {"accuracy_1nn": 0.25, "recall": pytest.approx(0.45), "overlap": 0.125}
    assert printed["options"]["seed"] == 3
    BENCHMARK["main"](arguments)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 17
    assert lines[0].split() == ["queries", "width", "1-NN", "R@2", "overlap", "spearman"]


@pytest.mark.parametrize("neighbours", [0, 25])
def test_more_neighbours_than_items_are_refused(neighbours: int) -> None:
    with pytest.raises(DataError, match=f"{neighbours} neighbours of a corpus of 24"):
        adaptive_retrieval(random_encoder(), small_set(), [], neighbours)


def test_a_width_that_the_encoder_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match="width 4 in layer 0"):
        adaptive_retrieval(random_encoder(), small_set(), [(random_encoder(), 4)], 3)


@pytest.mark.parametrize("labels", [5, 0])
def test_images_without_their_labels_are_refused(labels: int) -> None:
    data = small_set()
    with pytest.raises(DataError, match=f"queries: {labels and 6} images with {labels} labels"):
        RetrievalSet(
            corpus_NCSS=data.corpus_NCSS,
            corpus_labels_N=data.corpus_labels_N,
            queries_QCSS=data.queries_QCSS if labels else data.queries_QCSS[:0],
            query_labels_Q=data.query_labels_Q[:labels],
        )
