"""Causal self-attention with rotary positions: grouped queries, optional QK-norm, optional nesting, a key-value cache.

What is unusual:
* o_proj is stored input-major [heads * K, D], so that fewer heads are a prefix of rows in all four matrices.
* nanogpt RMS-normalises queries and keys before the rotary embedding (QK-norm), llama does not.
* The values of a layer may have a part that depends on the token alone (value embeddings).
* A cache never wraps around: when it is full, the caller begins a new one (see decoding.py).

Shape legend: B = sequences, T = new tokens, S = all tokens so far, D = hidden size, N = heads, G = key-value heads,
K = head width, I = N * K, J = G * K.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braniac.model.config import ModelConfig
from braniac.model.ffn import Matrix


def rotate(x_BNTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) on halves: cos_TK and sin_TK are [T, K/2]."""
    a, b = x_BNTK.chunk(2, dim=-1)
    return torch.cat((a * cos_TK + b * sin_TK, b * cos_TK - a * sin_TK), dim=-1)


def rotary_angles(config: ModelConfig) -> Tensor:
    """Angle of each position and frequency, float32 [context, K/2].

    The two families turn in opposite directions: modded-nanogpt by -angle, llama by +angle; only differences of angles
    ever count, but a checkpoint must be read by the rule it was trained with.
    """
    frequencies = config.rope_theta ** -torch.linspace(0, 1, config.head_dim // 2 + 1)[:-1]
    if config.rope_scaling:
        frequencies = _stretched(frequencies, *config.rope_scaling)
    angles_TK = torch.arange(config.context).float()[:, None] * frequencies
    return -angles_TK if config.family == "llama" else angles_TK


def _stretched(frequencies: Tensor, factor: float, low: float, high: float, original_context: float) -> Tensor:
    """Llama 3's long-context rule: slow frequencies are divided by `factor`, fast ones kept, those between mixed."""
    turns = original_context * frequencies / (2 * math.pi)  # within the context that the model was trained with first
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / factor)


class KVCache:
    """Keys and values of the tokens seen so far, for all layers. Layers may use fewer heads than it has room for."""

    def __init__(self, config: ModelConfig, batch: int, length: int) -> None:
        """Room for `length` tokens of `batch` sequences."""
        assert 0 < length <= config.context, f"a cache of {length} tokens for a context of {config.context}"
        shape = (config.num_hidden_layers, 2, batch, config.kv_heads, length, config.head_dim)
        self.room = length
        self.length = 0
        self._store = torch.empty(shape)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        assert 0 <= length <= self.length, f"cannot keep {length} of {self.length} tokens"
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Let sequence i continue what row `rows[i]` holds, int64 [B]; for beam search."""
        self._store[:, :, :, :, : self.length] = self._store[:, :, rows, :, : self.length]

    def extend(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values of new tokens; all of that layer's so far, [B, G, S, K] each."""
        batch, groups, new, _ = k_BGTK.shape
        stop = self.length + new
        assert stop <= self.room, f"{stop} tokens do not fit a cache of {self.room}"
        held = self._store[layer, :, :batch, :groups, :stop]
        held[0, :, :, self.length :] = k_BGTK
        held[1, :, :, self.length :] = v_BGTK
        return held[0], held[1]


class Attention(nn.Module):
    """Causal multi-head self-attention of one layer, holding `kv_heads` key-value heads and those that ask them."""

    def __init__(self, config: ModelConfig, layer: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = layer
        self.group = config.num_attention_heads // config.kv_heads
        self.head_dim = config.head_dim
        self.qk_norm = config.normalises_heads
        heads = kv_heads * self.group
        self.q_proj = Matrix(heads * self.head_dim, config.hidden_size, dtype)
        self.k_proj = Matrix(kv_heads * self.head_dim, config.hidden_size, dtype)
        self.v_proj = Matrix(kv_heads * self.head_dim, config.hidden_size, dtype)
        self.o_proj = Matrix(heads * self.head_dim, config.hidden_size, dtype)

    def forward(
        self,
        x_BTD: Tensor,
        cos_TK: Tensor,
        sin_TK: Tensor,
        kv_heads: int,
        cache: KVCache | None,
        extra_BTJ: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D], with the first `kv_heads` key-value heads; `extra_BTJ` is added to their values."""
        kv_rows, rows = kv_heads * self.head_dim, kv_heads * self.group * self.head_dim
        q_BTI = F.linear(x_BTD, self.q_proj.weight[:rows].to(x_BTD.dtype))
        k_BTJ = F.linear(x_BTD, self.k_proj.weight[:kv_rows].to(x_BTD.dtype))
        v_BTJ = F.linear(x_BTD, self.v_proj.weight[:kv_rows].to(x_BTD.dtype))
        v_BTJ = v_BTJ if extra_BTJ is None else v_BTJ + extra_BTJ
        return self.mix(q_BTI, k_BTJ, v_BTJ, cos_TK, sin_TK, cache) @ self.o_proj.weight[:rows].to(x_BTD.dtype)

    def mix(
        self, q_BTI: Tensor, k_BTJ: Tensor, v_BTJ: Tensor, cos_TK: Tensor, sin_TK: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        """What all heads read, between the projections: [B, T, I] from queries [B, T, I], keys and values [B, T, J]."""
        q_BNTK, k_BGTK, v_BGTK = (self._heads(projected) for projected in (q_BTI, k_BTJ, v_BTJ))
        if self.qk_norm:
            q_BNTK, k_BGTK = F.rms_norm(q_BNTK, (self.head_dim,)), F.rms_norm(k_BGTK, (self.head_dim,))
        q_BNTK, k_BGTK = rotate(q_BNTK, cos_TK, sin_TK), rotate(k_BGTK, cos_TK, sin_TK)
        if cache is not None:
            k_BGTK, v_BGTK = cache.extend(self.layer, k_BGTK, v_BGTK)
        y_BNTK = _attend(q_BNTK, k_BGTK, v_BGTK, grouped=self.group > 1)
        return y_BNTK.transpose(1, 2).flatten(2)

    def _heads(self, projected: Tensor) -> Tensor:
        """Split: [B, T, heads * K] -> [B, heads, T, K]."""
        return projected.view(*projected.shape[:-1], -1, self.head_dim).transpose(1, 2)


def _attend(q_BNTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, *, grouped: bool) -> Tensor:
    """Causal attention of the last T of S tokens."""
    new, total = q_BNTK.shape[2], k_BGSK.shape[2]
    mask = None
    if 1 < new < total:  # a block after cached tokens; one token sees all, and a beginning is plainly causal
        mask = torch.ones(new, total, dtype=torch.bool).tril(total - new)
    return F.scaled_dot_product_attention(
        q_BNTK, k_BGSK, v_BGSK, attn_mask=mask, is_causal=new == total, enable_gqa=grouped
    )
