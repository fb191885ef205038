"""The nanogpt family: a small decoder in the style of modded-nanogpt whose feed-forward blocks are MatFormer-nested.

What is unusual:
* RMSNorm has no gain, and nothing has a bias: every parameter is a matrix, so every parameter can be tiled.
* Queries and keys are RMS-normalised before the rotary embedding (QK-norm), the embedding right after the look-up.
* Output projections and the head start at zero: each block begins as the identity, the first loss is log(vocab_size).
* Logits are soft-capped: softcap * tanh(logits / softcap).
* The head is not tied to the embedding.
* A model holds only the FFN rows of its tier, and every call may use fewer of them (`width`).

Shape legend: B = sequences, T = tokens, D = hidden size, N = heads, K = head width, V = vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braniac.model.config import ModelConfig
from braniac.model.ffn import MatFormerFFN, Matrix
from braniac.model.initial import initial_tensor
from braniac.model.tiers import parameter_shapes, tier_width


def rms_norm(x: Tensor) -> Tensor:
    """Scale the last dimension to a root mean square of one."""
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x_BNTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021) on halves: cos_TK and sin_TK are [T, K/2]."""
    a, b = x_BNTK.chunk(2, dim=-1)
    return torch.cat((a * cos_TK + b * sin_TK, b * cos_TK - a * sin_TK), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention with QK-norm and rotary positions."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = Matrix(hidden_size, hidden_size)
        self.k_proj = Matrix(hidden_size, hidden_size)
        self.v_proj = Matrix(hidden_size, hidden_size)
        self.o_proj = Matrix(hidden_size, hidden_size)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        q_BNTK, k_BNTK, v_BNTK = (
            projection(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BNTK = rotate(rms_norm(q_BNTK), cos_TK, sin_TK)
        k_BNTK = rotate(rms_norm(k_BNTK), cos_TK, sin_TK)
        y_BNTK = F.scaled_dot_product_attention(q_BNTK, k_BNTK, v_BNTK, is_causal=True)
        out: Tensor = self.o_proj(y_BNTK.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """One transformer layer: attention and FFN, each on a normalised copy, each added to the residual stream."""

    def __init__(self, config: ModelConfig, neurons: int) -> None:
        super().__init__()
        self.self_attn = Attention(config.hidden_size, config.num_attention_heads)
        self.mlp = MatFormerFFN(config.hidden_size, neurons)

    def forward(self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor, width: int) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        x_BTD = x_BTD + self.self_attn(rms_norm(x_BTD), cos_TK, sin_TK)
        x_BTD = x_BTD + self.mlp(rms_norm(x_BTD), width)
        return x_BTD


class Decoder(nn.Module):
    """Embedding and blocks; a class of its own so that parameters carry Hugging Face's `model.` prefix."""

    def __init__(self, config: ModelConfig, neurons: int) -> None:
        super().__init__()
        self.embed_tokens = Matrix(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, neurons) for _ in range(config.num_hidden_layers))
        frequencies = config.rope_theta ** -torch.linspace(0, 1, config.head_dim // 2 + 1)[:-1]
        angles_TK = torch.arange(config.context).float()[:, None] * frequencies
        self.register_buffer("cos_TK", angles_TK.cos(), persistent=False)
        self.register_buffer("sin_TK", angles_TK.sin(), persistent=False)
        self.cos_TK: Tensor
        self.sin_TK: Tensor

    def forward(self, tokens_BT: Tensor, width: int) -> Tensor:
        """int64 [B, T] -> [B, T, D]"""
        length = tokens_BT.shape[1]
        assert length <= len(self.cos_TK), f"{length} tokens do not fit a context of {len(self.cos_TK)}"
        x_BTD = rms_norm(F.embedding(tokens_BT, self.embed_tokens.weight))
        for block in self.layers:
            x_BTD = block(x_BTD, self.cos_TK[:length], self.sin_TK[:length], width)
        return rms_norm(x_BTD)


class GPT(nn.Module):
    """The part of a model that one tier holds. All zero until `init_weights` or until fragments are loaded into it."""

    def __init__(self, config: ModelConfig, tier: int) -> None:
        super().__init__()
        self.config = config
        self.tier = tier
        self.width = tier_width(config, tier)
        self.model = Decoder(config, self.width)
        self.lm_head = Matrix(config.vocab_size, config.hidden_size)
        held = {name: tuple(p.shape) for name, p in self.named_parameters()}
        assert held == parameter_shapes(config, tier), "the module tree and tiers.py disagree about names or shapes"

    def init_weights(self, seed: int) -> None:
        """Write the run's initial weights: a pure function of configuration and seed, the same on every machine."""
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(torch.from_numpy(initial_tensor(self.config, name, (p.shape[0], p.shape[1]), seed)))

    def forward(self, tokens_BT: Tensor, width: int | None = None) -> Tensor:
        """int64 [B, T] -> logits [B, T, V], using the first `width` FFN neurons of each layer (None: all held)."""
        x_BTD = self.model(tokens_BT, self.width if width is None else width)
        softcap = self.config.logit_softcap
        logits_BTV: Tensor = softcap * torch.tanh(self.lm_head(x_BTD) / softcap)
        return logits_BTV

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, width: int | None = None) -> Tensor:
        """Mean cross-entropy, in nats per token."""
        logits_BTV: Tensor = self(tokens_BT, width)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
