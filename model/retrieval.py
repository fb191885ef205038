"""Adaptive retrieval: the corpus is embedded once at full width, queries at whatever width their sender can afford.

It works only if all widths of an encoder share one metric space, which is what MatFormer claims (Devvrit et al. 2023,
arXiv 2310.07707, image retrieval with MatViT): here that is measured. The control is an encoder of the same width that
was trained by itself: as good among its own embeddings, and lost among those of others.

Ties: of equal similarities the lower corpus index is the nearer one; for rank correlation they share their mean rank.

Shape legend: Q = queries, N = corpus items, E = embedding size, C = channels, S = image side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from braniac.model.encoder import Encoder
from braniac.model.errors import DataError
from braniac.model.tiers import WidthMap

EMBEDDING_BATCH = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalSet:
    """What to search, and what for. Raises DataError if images and labels do not fit each other."""

    corpus_NCSS: Tensor
    """Images that are searched, [N, C, S, S]."""

    corpus_labels_N: Tensor
    """What each of them shows, int64 [N]."""

    queries_QCSS: Tensor
    """Images that ask, none of them in the corpus, [Q, C, S, S]."""

    query_labels_Q: Tensor
    """What each of them shows, int64 [Q]: corpus items with the same label are what it should find."""

    def __post_init__(self) -> None:
        for name, images, labels in (
            ("corpus", self.corpus_NCSS, self.corpus_labels_N),
            ("queries", self.queries_QCSS, self.query_labels_Q),
        ):
            if len(images) == 0 or len(images) != len(labels):
                raise DataError(
                    f"{name}: {len(images)} images with {len(labels)} labels: give at least one image, "
                    "and one label for each."
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalReport:
    """How well queries of one width find their way in a corpus of full width. All figures are means over queries."""

    widths: tuple[int, ...]
    """FFN neurons of the query encoder, layer by layer."""

    neighbours: int
    """K of the figures below."""

    accuracy_1nn: float
    """Share of queries whose nearest corpus item has their label: recall at K = 1."""

    recall: float
    """Share of queries with their label among the K nearest corpus items."""

    overlap: float
    """Share of a query's K nearest corpus items that are also nearest to its full-width embedding."""

    spearman: float
    """Rank correlation of a query's similarities to the corpus with those of its full-width embedding."""


def adaptive_retrieval(
    corpus_encoder: Encoder, data: RetrievalSet, query_encoders: Sequence[tuple[Encoder, WidthMap]], neighbours: int
) -> list[RetrievalReport]:
    """One report for each (encoder, width) that embeds the queries; the corpus encoder embeds the corpus at full width.

    Pass the corpus encoder itself at several widths to test a MatFormer, another encoder to test a control.
    Raises DataError if the corpus has no `neighbours` items, ConfigError for a width that an encoder does not have.
    """
    if not 1 <= neighbours <= len(data.corpus_NCSS):
        raise DataError(
            f"{neighbours} neighbours of a corpus of {len(data.corpus_NCSS)}: ask for at least one and at most all."
        )
    corpus_NE = embed(corpus_encoder, data.corpus_NCSS)
    reference_QN = embed(corpus_encoder, data.queries_QCSS) @ corpus_NE.T
    labels = data.query_labels_Q, data.corpus_labels_N
    reports = []
    for encoder, width in query_encoders:
        similarities_QN = embed(encoder, data.queries_QCSS, width) @ corpus_NE.T
        reports.append(
            RetrievalReport(
                widths=encoder.layer_widths(width),
                neighbours=neighbours,
                accuracy_1nn=recall_at(similarities_QN, *labels, 1),
                recall=recall_at(similarities_QN, *labels, neighbours),
                overlap=neighbour_overlap(similarities_QN, reference_QN, neighbours),
                spearman=spearman(similarities_QN, reference_QN),
            )
        )
    return reports


def embed(encoder: Encoder, images_BCSS: Tensor, width: WidthMap = None) -> Tensor:
    """Embeddings of any number of images, [B, C, S, S] -> [B, E], without a graph for gradients."""
    with torch.no_grad():
        return torch.cat([encoder(part, width) for part in torch.split(images_BCSS, EMBEDDING_BATCH)])


def nearest(similarities_QN: Tensor, neighbours: int) -> Tensor:
    """Corpus indices of the most similar items, the most similar first: [Q, N] -> int64 [Q, K]."""
    return similarities_QN.argsort(dim=1, descending=True, stable=True)[:, :neighbours]


def recall_at(similarities_QN: Tensor, query_labels_Q: Tensor, corpus_labels_N: Tensor, neighbours: int) -> float:
    """Share of queries that find their label among their nearest corpus items (Recall@K of metric learning)."""
    found_QK = corpus_labels_N[nearest(similarities_QN, neighbours)] == query_labels_Q[:, None]
    return found_QK.any(1).double().mean().item()


def neighbour_overlap(one_QN: Tensor, other_QN: Tensor, neighbours: int) -> float:
    """Mean share of a query's nearest corpus items that two similarity matrices have in common."""
    one_QK, other_QK = nearest(one_QN, neighbours), nearest(other_QN, neighbours)
    return (one_QK[:, :, None] == other_QK[:, None, :]).any(2).double().mean().item()


def mean_ranks(values_QN: Tensor) -> Tensor:
    """Rank of each value within its row, from 1 for the least; equal values share the mean of their ranks. float64."""
    sorted_QN = values_QN.sort(dim=1).values
    below_QN, not_above_QN = (
        torch.searchsorted(sorted_QN, values_QN.contiguous(), right=right) for right in (False, True)
    )
    return (below_QN + not_above_QN + 1).double() / 2


def spearman(one_QN: Tensor, other_QN: Tensor) -> float:
    """Mean over rows of Spearman's rank correlation. A row of equal values orders nothing and counts as 0."""
    one_QN, other_QN = (
        ranks - ranks.mean(1, keepdim=True) for ranks in (mean_ranks(values) for values in (one_QN, other_QN))
    )
    products_Q = (one_QN * other_QN).sum(1)
    norms_Q = (one_QN.square().sum(1) * other_QN.square().sum(1)).sqrt()
    return torch.where(norms_Q > 0, products_Q / norms_Q, 0.0).mean().item()
