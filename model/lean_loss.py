"""Cross-entropy of a large vocabulary in little memory: no logits, and no gradient of the head, ever exist as a whole.

The vocabulary is gone through twice, a block of the head's rows at a time and for each a chunk of tokens at a time:
once for the normaliser of each token, once for the gradients. A block of the head takes its step as soon as its own
gradient is there; what flows back to the tokens was computed from it before. So the head's matmul is done four times
instead of three, which at one billion parameters costs 4% of a step and saves the head's gradient (412 MB) besides the
logits.

Shape legend: N = tokens, D = hidden size, V = rows of the head in a block, M = tokens in a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from braniac.model.rounding import widened

ROWS_AT_ONCE = 512
TOKENS_AT_ONCE = 512


class ChunkedLoss:
    """Cross-entropy of several outputs of one model for the same tokens; the first one may teach the others."""

    def __init__(self, head_VD: Tensor, softcap: float | None, compute: torch.dtype) -> None:
        """`head_VD` is the whole head; `softcap` bounds its logits; matmuls are done in `compute`."""
        self._head = head_VD
        self._softcap = softcap
        self._compute = compute

    def losses(self, outputs: Sequence[Tensor], targets_N: Tensor) -> tuple[list[float], list[Tensor]]:
        """Mean loss of each output [N, D], nats per token, and the normalisers [N] that `gradients` needs."""
        normalisers = [torch.full(targets_N.shape, -math.inf, device=targets_N.device) for _ in outputs]
        picked = [torch.zeros(targets_N.shape, device=targets_N.device) for _ in outputs]
        for rows, head_VD in widened(self._head, ROWS_AT_ONCE, self._compute):
            for at in _chunks(len(targets_N)):
                column_M = targets_N[at] - rows.start
                inside_M = (column_M >= 0) & (column_M < len(head_VD))
                for output_ND, normaliser_N, picked_N in zip(outputs, normalisers, picked, strict=True):
                    logits_MV = self._logits(output_ND[at], head_VD)
                    normaliser_N[at] = torch.logaddexp(normaliser_N[at], logits_MV.logsumexp(1))
                    picked_N[at][inside_M] = logits_MV[inside_M, column_M[inside_M]]
        means = [(n - p).mean().item() for n, p in zip(normalisers, picked, strict=True)]
        return means, normalisers

    def gradients(
        self,
        outputs: Sequence[Tensor],
        targets_N: Tensor,
        normalisers: Sequence[Tensor],
        weights: Sequence[float],
        kl_weight: float,
        update_head: Callable[[slice, Tensor], None],
    ) -> list[Tensor]:
        """What flows back into each output, float32 [N, D], of sum_i weights[i] * (loss_i + kl_weight * KL(0 || i)).

        `update_head` gets the finished gradient of each block of the head, float32 [V, D].
        """
        flows = [torch.zeros(output_ND.shape) for output_ND in outputs]
        room_VD = torch.empty(min(len(self._head), ROWS_AT_ONCE), self._head.shape[1])
        for rows, head_VD in widened(self._head, ROWS_AT_ONCE, self._compute):
            gradient_VD = room_VD[: len(head_VD)].zero_()
            for at in _chunks(len(targets_N)):
                teacher_MV = None
                for number, output_ND in enumerate(outputs):
                    logits_MV = self._logits(output_ND[at], head_VD)
                    # Of a bounded logit, the slope with respect to the unbounded one.
                    slope_MV = None if self._softcap is None else 1 - (logits_MV / self._softcap).square()
                    probs_MV = logits_MV.sub_(normalisers[number][at, None]).exp_()
                    if number == 0 and kl_weight:
                        teacher_MV = probs_MV.clone()
                    pull = kl_weight if number and teacher_MV is not None else 0.0
                    delta_MV = probs_MV.mul_(1 + pull)
                    if pull and teacher_MV is not None:
                        delta_MV.sub_(teacher_MV, alpha=pull)
                    column_M = targets_N[at] - rows.start
                    inside_M = torch.nonzero((column_M >= 0) & (column_M < len(head_VD))).squeeze(1)
                    delta_MV[inside_M, column_M[inside_M]] -= 1
                    delta_MV.mul_(weights[number] / len(targets_N))
                    if slope_MV is not None:
                        delta_MV.mul_(slope_MV)
                    narrow_MV = delta_MV.to(self._compute)
                    flows[number][at] += narrow_MV @ head_VD
                    gradient_VD += narrow_MV.mT @ output_ND[at].to(self._compute)
            update_head(rows, gradient_VD)
        return flows

    def _logits(self, output_MD: Tensor, head_VD: Tensor) -> Tensor:
        logits_MV = (output_MD.to(self._compute) @ head_VD.mT).float()
        return logits_MV if self._softcap is None else logits_MV.div_(self._softcap).tanh_().mul_(self._softcap)


def _chunks(tokens: int) -> list[slice]:
    return [slice(start, min(start + TOKENS_AT_ONCE, tokens)) for start in range(0, tokens, TOKENS_AT_ONCE)]
