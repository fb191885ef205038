"""How good a model is: mean loss on text that nobody trains on."""

from __future__ import annotations

import torch
from torch import Tensor

from braniac.model.gpt import GPT
from braniac.model.tiers import WidthMap

EVALUATION_BATCH = 16
EVALUATION_TOKENS = 4096


def held_out_loss(model: GPT, windows: tuple[Tensor, Tensor], width: WidthMap = None) -> float:
    """Mean cross-entropy over (tokens, targets), each int64 [N, T], in nats per token: per byte for byte-level text."""
    tokens, targets = windows
    assert len(tokens) > 0, "no windows to evaluate"
    total, device = 0.0, model.model.embed_tokens.weight.device
    batch = max(1, min(EVALUATION_BATCH, EVALUATION_TOKENS // tokens.shape[1]))
    with torch.no_grad():
        for x, y in zip(torch.split(tokens, batch), torch.split(targets, batch), strict=True):
            total += model.loss(x.to(device), y.to(device), width).item() * len(x)
    return total / len(tokens)
