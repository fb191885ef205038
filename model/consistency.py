"""How alike two widths of one model (or two models) predict: token match, KL divergence and cross-entropy.

A small width that makes the large one's choices is worth more than its loss tells: as a drafter for speculative
decoding, or when the width changes halfway through a text. The measures are those of MatFormer (Devvrit et al. 2023,
arXiv 2310.07707), which calls this consistency.

What a number here means:
* KL is KL(reference || candidate): the reference's probabilities weigh the logarithms. It is not symmetric.
* Cross-entropy is that of the candidate under the reference's distribution, not under the text: it equals KL plus the
  reference's own entropy. All three are in nats per position.
* The temperature divides both sides' logits. Unlike in distillation, nothing is multiplied by its square afterwards.
* A mean is over the positions that count: sums are accumulated, so a short last batch weighs no more than its share.
* Token match asks whether some token is a most likely one on both sides. With a tie at the top, which the soft-cap and
  bfloat16 both produce, no choice among the tied is wrong and which one argmax returns depends on the device. Two
  constant rows thus match. Ties are looked for in the logits as given, where no rounding of ours makes or breaks them.
* Logits of -inf are tokens that cannot occur. Those of the reference add nothing; a token that only the candidate rules
  out makes its KL and cross-entropy infinite, as they truly are, and never NaN.

All probabilities are kept as logarithms, in float64: a softmax would round the unlikely ones to zero before the log.
Shape legend: N = windows, B = sequences, T = tokens, R = positions that count, V = vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from braniac.model.errors import ModelError
from braniac.model.evaluate import EVALUATION_BATCH
from braniac.model.gpt import GPT
from braniac.model.tiers import WidthMap

Key = TypeVar("Key")
Logits = Callable[[Tensor], Tensor]

# Logits widened to float64 at a time: 8 MiB, so that a large vocabulary does not need several copies of a batch.
_LOGITS_AT_ONCE = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Consistency:
    """How a candidate's predictions compare with a reference's, as means over `positions` positions."""

    token_match: float
    """Share of the positions at which some token is a most likely one on both sides."""

    kl: float
    """KL(reference || candidate), nats per position; inf if the candidate rules out what the reference allows."""

    cross_entropy: float
    """Of the candidate under the reference's distribution, nats per position: `kl` + `reference_entropy`."""

    reference_entropy: float
    """Entropy of the reference's distribution, nats per position."""

    positions: int
    """Positions that counted."""


@dataclass(slots=True)
class _Sums:
    """Sums over the positions seen so far."""

    matches: int = 0
    kl: float = 0.0
    cross_entropy: float = 0.0
    entropy: float = 0.0
    positions: int = 0

    def add(self, reference_RV: Tensor, candidate_RV: Tensor, temperature: float) -> None:
        """Count in some rows of logits."""
        rows = max(1, _LOGITS_AT_ONCE // reference_RV.shape[-1])
        for p_RV, q_RV in zip(torch.split(reference_RV, rows), torch.split(candidate_RV, rows), strict=True):
            log_p_RV, log_q_RV = log_probabilities(p_RV, temperature), log_probabilities(q_RV, temperature)
            entropy_R, cross_entropy_R = _expected_surprise(log_p_RV, log_p_RV), _expected_surprise(log_p_RV, log_q_RV)
            kl_R = _weighted(log_p_RV, log_p_RV - log_q_RV)  # not a difference of sums, which would cancel
            self.matches += int((_most_likely(p_RV) & _most_likely(q_RV)).any(-1).sum())
            self.kl += kl_R.clamp(min=0).sum().item()  # rounding alone can make it negative
            self.cross_entropy += cross_entropy_R.sum().item()
            self.entropy += entropy_R.sum().item()
            self.positions += len(p_RV)

    def mean(self) -> Consistency:
        """Raises ModelError if no position counted."""
        if not self.positions:
            raise ModelError("no position is left to compare: give windows or a mask with at least one that counts.")
        return Consistency(
            token_match=self.matches / self.positions,
            kl=self.kl / self.positions,
            cross_entropy=self.cross_entropy / self.positions,
            reference_entropy=self.entropy / self.positions,
            positions=self.positions,
        )


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits [..., V] -> float64 log-probabilities [..., V] at `temperature`, -inf where the logit is.

    Raises ModelError for a temperature that is not positive and finite, or for rows that are no distribution: with NaN,
    with +inf or with nothing but -inf.
    """
    if not 0 < temperature < math.inf:
        raise ModelError(f"temperature is {temperature!r}: give a finite number above zero.")
    wide = logits.detach().double()
    top = wide.amax(-1, keepdim=True)  # NaN wherever a row holds one
    if not torch.isfinite(top).all():
        raise ModelError(
            "some row of logits holds NaN, +inf or nothing but -inf: check the weights, or mask that position out."
        )
    # Subtracting the largest logit first keeps a tiny temperature from overflowing.
    return torch.log_softmax((wide - top) / temperature, dim=-1)


def entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits [..., V] -> entropy of each distribution, float64 [...], in nats. Errors as in `log_probabilities`."""
    log_p = log_probabilities(logits, temperature)
    return _expected_surprise(log_p, log_p)


def compare(
    reference_logits: Tensor, candidate_logits: Tensor, *, mask: Tensor | None = None, temperature: float = 1.0
) -> Consistency:
    """Compare two sets of logits [..., V] position by position; `mask`, bool [...], is true where a position counts.

    What a masked position holds is never looked at. Raises ModelError for shapes that differ, for a mask that leaves
    nothing, and as `log_probabilities` does.
    """
    sums = _Sums()
    _accumulate(sums, reference_logits, candidate_logits, mask, temperature)
    return sums.mean()


def valid_positions(tokens_BT: Tensor, eos: int) -> Tensor:
    """Where a window has not ended yet, bool [B, T]: false from the first `eos` on, whatever is padded after it.

    The position that predicts the end counts, the end's own prediction does not. An `eos` as the very first token does
    not end a window, because models that have one token for start and end begin with it. For padded windows only: in
    windows cut from a stream of documents the separator ends nothing.
    """
    ended_BT = (tokens_BT == eos).long()
    ended_BT[:, 0] = 0
    return ended_BT.cumsum(1) == 0


def model_consistency(
    reference: Logits,
    candidates: Mapping[Key, Logits],
    tokens_NT: Tensor,
    *,
    temperature: float = 1.0,
    eos: int | None = None,
) -> dict[Key, Consistency]:
    """Compare each candidate with the reference, functions int64 [B, T] -> logits [B, T, V], over windows [N, T].

    With `eos`, positions after a window's end are left out (`valid_positions`). Raises ModelError as `compare` does.
    """
    sums = {key: _Sums() for key in candidates}
    with torch.no_grad():
        for start in range(0, len(tokens_NT), EVALUATION_BATCH):
            tokens_BT = tokens_NT[start : start + EVALUATION_BATCH]
            mask_BT = None if eos is None else valid_positions(tokens_BT, eos)
            reference_BTV = reference(tokens_BT)
            for key, candidate in candidates.items():
                _accumulate(sums[key], reference_BTV, candidate(tokens_BT), mask_BT, temperature)
    return {key: total.mean() for key, total in sums.items()}


def width_consistency(
    model: GPT,
    tokens_NT: Tensor,
    widths: Iterable[int],
    *,
    reference: WidthMap = None,
    temperature: float = 1.0,
    eos: int | None = None,
) -> dict[int, Consistency]:
    """Compare each of `widths` with `reference` (None: all neurons held) over windows, int64 [N, T]."""
    return model_consistency(
        partial(model, width=reference),
        {width: partial(model, width=width) for width in widths},
        tokens_NT,
        temperature=temperature,
        eos=eos,
    )


def _accumulate(
    sums: _Sums, reference_logits: Tensor, candidate_logits: Tensor, mask: Tensor | None, temperature: float
) -> None:
    if reference_logits.shape != candidate_logits.shape:
        raise ModelError(
            f"the logits have shapes {list(reference_logits.shape)} and {list(candidate_logits.shape)}: "
            "compare models with one vocabulary on the same tokens."
        )
    if mask is None:
        mask = torch.ones(reference_logits.shape[:-1], dtype=torch.bool, device=reference_logits.device)
    if mask.dtype != torch.bool or mask.shape != reference_logits.shape[:-1]:
        raise ModelError(
            f"the mask is {mask.dtype} {list(mask.shape)}: it must be bool {list(reference_logits.shape[:-1])}, "
            "one entry per position."
        )
    sums.add(reference_logits[mask], candidate_logits[mask], temperature)


def _weighted(log_p_RV: Tensor, values_RV: Tensor) -> Tensor:
    """Sum of p * value for each row; impossible tokens add nothing, even if their value is infinite or NaN."""
    p_RV = log_p_RV.exp()
    return torch.where(p_RV > 0, p_RV * values_RV, 0.0).sum(-1)


def _expected_surprise(log_p_RV: Tensor, log_q_RV: Tensor) -> Tensor:
    return _weighted(log_p_RV, -log_q_RV)


def _most_likely(logits_RV: Tensor) -> Tensor:
    return logits_RV == logits_RV.amax(-1, keepdim=True)
