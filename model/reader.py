"""Reading a few tokens at a time with one width of a model: what GPT computes, without what only training needs.

A decoder calls the network for one token, or a block of some, again and again. A model that fits a laptop then spends
its time on reading weights and on the fixed cost of each operation, hardly on arithmetic. Hence:
* All weights are views of the model's own, sliced once; nothing is copied, so several readers share one model.
* Activations are multiplied from the right (weight @ x^T): a block of 2 to 8 tokens then costs MKL little more than one
  token, the other way round half as much again.
* The root mean square is one operation on the vector norm, queries and keys are normalised and rotated together.
Nothing is recorded for a backward pass. The logits equal GPT's but for the last bits, and so do those of a block and
those of the same tokens one by one.

Shape legend: B = sequences, T = new tokens, S = all tokens so far, R = B * T, D = hidden size, N = heads, G = key-value
heads, A = N + 2 G, K = head width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from braniac.model.attention import KVCache
from braniac.model.ffn import activate
from braniac.model.gpt import GPT, Block
from braniac.model.tiers import WidthMap, heads_at, mirror_of, value_table, value_table_of


@dataclass(frozen=True, slots=True)
class _Layer:
    """Views of one layer's weights at its width."""

    kv_heads: int
    qkv: tuple[Tensor, ...]
    o: Tensor
    gate: Tensor | None
    up: Tensor
    down: Tensor
    gains: tuple[Tensor | None, Tensor | None]
    """Of the norms before attention and FFN; llama's alone have any."""
    values: Tensor | None
    """Its value embedding, if it has one."""
    mirror: int | None
    """The layer that its skip connection looks back to, if it has one."""


class Reader:
    """One model at one width (map) with the keys and values of what it has read, up to the model's context."""

    def __init__(self, model: GPT, width: WidthMap = None, batch: int = 1) -> None:
        """For at most `batch` sequences of equal length."""
        config = model.config
        self.config = config
        self.cache = KVCache(config, batch, config.context)
        self._batch = batch
        self._layers = [_views(model, layer, width_used) for layer, width_used in enumerate(model.layer_widths(width))]
        self._embedding = model.model.embed_tokens.weight.detach()
        self._head = self._embedding if model.lm_head is None else model.lm_head.weight.detach()
        gain, skips = model.model.norm.weight, model.model.skips
        self._gain = None if gain is None else gain.detach()
        self._skips = None if skips is None else skips.weight.detach()
        # Half of a head is rotated against the other: x * (cos, cos) + swapped x * (sin, -sin).
        cos_TK, sin_TK = model.model.cos_TK, model.model.sin_TK
        self._cos_TK, self._sin_TK = torch.cat((cos_TK, cos_TK), dim=-1), torch.cat((sin_TK, -sin_TK), dim=-1)
        llama = config.family == "llama"
        self._eps = torch.tensor(config.rms_norm_eps if llama else torch.finfo(torch.float32).eps)

    @property
    def length(self) -> int:
        """Tokens read and not forgotten."""
        return self.cache.length

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.cache.truncate(length)

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Let sequence i continue what row `rows[i]` has read."""
        if self.length and list(rows) != list(range(len(rows))):
            unused = [0] * (self._batch - len(rows))
            self.cache.select(torch.tensor([*rows, *unused]))

    def read(self, tokens: Sequence[int], wanted: int = 1) -> Tensor:
        """Read more tokens of a single sequence; the logits after each of the last `wanted` of them, [wanted, V]."""
        return self.read_batch(torch.tensor([tokens]), wanted)[0]

    @torch.inference_mode()
    def read_batch(self, tokens_BT: Tensor, wanted: int = 1) -> Tensor:
        """int64 [B, T] -> the logits after each of the last `wanted` tokens, [B, wanted, V]."""
        batch, new = tokens_BT.shape
        start, stop = self.cache.length, self.cache.length + new
        assert 0 < wanted <= new, f"logits of {wanted} of {new} tokens"
        assert stop <= self.config.context, f"{stop} tokens do not fit a context of {self.config.context}"
        mask = None
        if start > 0 and new > 1:  # one token sees all, and a beginning is plainly causal
            mask = torch.ones(new, stop, dtype=torch.bool).tril(start)
        x_RD = F.embedding(tokens_BT.flatten(), self._embedding)
        if self.config.normalises_embedding:
            x_RD = self._norm(x_RD, None)
        inputs: list[Tensor] = []
        for number, layer in enumerate(self._layers):
            if layer.mirror is not None and self._skips is not None:
                x_RD = torch.addcmul(x_RD, self._skips[layer.mirror], inputs[layer.mirror])
            inputs.append(x_RD)
            q, k, v = self._queries_keys_values(self._norm(x_RD, layer.gains[0]), layer, batch)
            if layer.values is not None:
                v = v + F.embedding(tokens_BT, layer.values).view(batch, new, layer.kv_heads, -1).transpose(1, 2)
            k, v = self.cache.extend(number, k, v)
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=start == 0, enable_gqa=q.shape[1] > k.shape[1]
            )
            x_RD = torch.addmm(x_RD, y.transpose(1, 2).reshape(batch * new, -1), layer.o)
            x_RD = torch.addmm(x_RD, self._activations(self._norm(x_RD, layer.gains[1]), layer), layer.down)
        self.cache.length = stop
        last_RD = x_RD.view(batch, new, -1)[:, new - wanted :].flatten(0, 1)
        logits = (self._head @ self._norm(last_RD, self._gain).t()).t()
        if (softcap := self.config.softcap) is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return logits.view(batch, wanted, -1)

    def _norm(self, x: Tensor, gain: Tensor | None) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        normed = x * torch.addcmul(self._eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return normed if gain is None else normed * gain

    def _queries_keys_values(self, x_RD: Tensor, layer: _Layer, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """[R, D] -> queries [B, N, T, K], keys and values [B, G, T, K], ready for attention."""
        groups, head_dim, start = layer.kv_heads, self.config.head_dim, self.cache.length
        x_DR = x_RD.t()
        rows_R = torch.cat([weight @ x_DR for weight in layer.qkv])
        heads_BATK = rows_R.view(-1, head_dim, batch, len(x_RD) // batch).permute(2, 0, 3, 1).contiguous()
        qk = heads_BATK[:, :-groups]
        if self.config.normalises_heads:
            qk = self._norm(qk, None)
        stop = start + qk.shape[2]
        qk = torch.addcmul(qk * self._cos_TK[start:stop], qk.roll(head_dim // 2, -1), self._sin_TK[start:stop])
        return qk[:, :-groups], qk[:, -groups:], heads_BATK[:, -groups:]

    def _activations(self, x_RD: Tensor, layer: _Layer) -> Tensor:
        """What the neurons in use say, [R, W]."""
        x_DR = x_RD.t()
        up_WR, gate_WR = layer.up @ x_DR, None if layer.gate is None else layer.gate @ x_DR
        return activate(up_WR, gate_WR, self.config.activation).t()


def _views(model: GPT, layer: int, width: int) -> _Layer:
    config, block, table = model.config, model.model.layers[layer], value_table_of(model.config, layer)
    assert isinstance(block, Block)
    attention, ffn, kv_heads = block.self_attn, block.mlp, heads_at(config, width)
    kv_rows = kv_heads * attention.head_dim
    rows = kv_rows * attention.group
    gains = (block.input_layernorm.weight, block.post_attention_layernorm.weight)
    return _Layer(
        kv_heads=kv_heads,
        qkv=(
            attention.q_proj.weight[:rows].detach(),
            attention.k_proj.weight[:kv_rows].detach(),
            attention.v_proj.weight[:kv_rows].detach(),
        ),
        o=attention.o_proj.weight[:rows].detach(),
        gate=None if ffn.gate_proj is None else ffn.gate_proj.weight[:width].detach(),
        up=ffn.up_proj.weight[:width].detach(),
        down=ffn.down_proj.weight[:width].detach(),
        gains=(None if gains[0] is None else gains[0].detach(), None if gains[1] is None else gains[1].detach()),
        values=None if table is None else model.get_parameter(value_table(table)).detach(),
        mirror=mirror_of(config, layer),
    )
