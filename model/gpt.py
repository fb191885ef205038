"""A decoder whose feed-forward blocks are MatFormer-nested: modded-nanogpt's, or Llama's.

What is unusual about nanogpt (all but the first can be switched, see config.py):
* RMSNorm has no gain, and nothing has a bias: every parameter is a matrix, so every parameter can be tiled.
* Queries and keys are RMS-normalised before the rotary embedding (QK-norm), the embedding right after the look-up.
* Output projections and the head start at zero: each block begins as the identity, the first loss is log(vocab_size).
* Logits are soft-capped: softcap * tanh(logits / softcap).
* The head is not tied to the embedding.
And, if asked for:
* Value embeddings: in some layers, each token adds a row of a table of its own to its values.
* Skip connections, as in a U-net: layer L-1-i also gets the input of layer i, times a learnt gain per channel.
Llama is what `LlamaForCausalLM` computes. Of both families, a model holds only the FFN rows of its tier (or, extracted,
of one width per layer), and every call may use fewer of them.

Shape legend: B = sequences, T = tokens, D = hidden size, N = heads, K = head width, J = width of all key-value heads,
V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from braniac.model.attention import Attention, KVCache, rotary_angles
from braniac.model.config import ModelConfig
from braniac.model.errors import ConfigError
from braniac.model.ffn import MatFormerFFN, Matrix
from braniac.model.initial import initial_tensor
from braniac.model.lean_loss import ChunkedLoss
from braniac.model.tiers import (
    WidthMap,
    heads_at,
    layer_widths,
    mirror_of,
    shapes_at,
    tier_width,
    tier_widths,
    value_table_of,
)

_ROWS_AT_ONCE = 512  # of the first weights: a whole matrix in float64 would be the peak of a lean process


class RMSNorm(nn.Module):
    """Scale the last dimension to a root mean square of one; llama's has a gain, nanogpt's has none."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shape = (config.hidden_size,)
        llama = config.family == "llama"
        self.eps = config.rms_norm_eps if llama else None
        self.weight = nn.Parameter(torch.zeros(self.shape)) if llama else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        return F.rms_norm(x_BTD, self.shape, self.weight, self.eps)


class Block(nn.Module):
    """One transformer layer: attention and FFN, each on a normalised copy, each added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, neurons: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        granularities = [width for width in tier_widths(config) if width <= neurons] or [neurons]
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config, layer, heads_at(config, neurons), dtype)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MatFormerFFN(
            config.hidden_size, neurons, granularities, gated=config.gated, activation=config.activation, dtype=dtype
        )

    def forward(
        self,
        x_BTD: Tensor,
        cos_TK: Tensor,
        sin_TK: Tensor,
        width: int,
        cache: KVCache | None,
        extra_BTJ: Tensor | None = None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; `extra_BTJ` is added to the values of attention."""
        return self.feed(self.attend(x_BTD, cos_TK, sin_TK, heads_at(self.config, width), cache, extra_BTJ), width)

    def attend(
        self,
        x_BTD: Tensor,
        cos_TK: Tensor,
        sin_TK: Tensor,
        kv_heads: int,
        cache: KVCache | None,
        extra_BTJ: Tensor | None = None,
    ) -> Tensor:
        """The first half, with that many key-value heads: [B, T, D] -> [B, T, D]"""
        normed_BTD = self.input_layernorm(x_BTD)
        out_BTD: Tensor = x_BTD + self.self_attn(normed_BTD, cos_TK, sin_TK, kv_heads, cache, extra_BTJ)
        return out_BTD

    def feed(self, x_BTD: Tensor, width: int) -> Tensor:
        """The second half, with that many neurons: [B, T, D] -> [B, T, D]"""
        out_BTD: Tensor = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD), width)
        return out_BTD


class Decoder(nn.Module):
    """Embedding and blocks; a class of its own so that parameters carry Hugging Face's `model.` prefix."""

    def __init__(self, config: ModelConfig, neurons: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Matrix(config.vocab_size, config.hidden_size, dtype)
        self.layers = nn.ModuleList(Block(config, layer, count, dtype) for layer, count in enumerate(neurons))
        self.norm = RMSNorm(config)
        values = config.kv_heads * config.head_dim
        tables = (Matrix(config.vocab_size, values, dtype) for _ in range(config.value_embeddings))
        self.value_embeds = nn.ModuleList(tables)
        self.skips = Matrix(config.num_hidden_layers // 2, config.hidden_size) if config.skip_connections else None
        angles_TK = rotary_angles(config)
        self.register_buffer("cos_TK", angles_TK.cos(), persistent=False)
        self.register_buffer("sin_TK", angles_TK.sin(), persistent=False)
        self.cos_TK: Tensor
        self.sin_TK: Tensor
        self.recomputed_layers = 0
        """Of so many first layers keep only the input for the backward pass, and compute the rest once more."""

    def forward(self, tokens_BT: Tensor, widths: Sequence[int], cache: KVCache | None) -> Tensor:
        """int64 [B, T] -> [B, T, D]"""
        sources = self.sources(tokens_BT)
        out_BTD = self._through(0, sources[0], sources, widths, cache)
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        return out_BTD

    def sources(self, tokens_BT: Tensor) -> list[Tensor]:
        """What layers may read of the tokens themselves: the embedding [B, T, D], each value embedding [B, T, J]."""
        values = [F.embedding(tokens_BT, table.weight) for table in self.value_embeds if isinstance(table, Matrix)]
        return [self.embed(tokens_BT), *(_widened(value_BTJ) for value_BTJ in values)]

    def begin(self, tokens_BT: Tensor, widths: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """The first layer at several widths, which share what does not depend on the width: [B, T, D] for each.

        Also what `sources` gives, for the other layers.
        """
        sources = self.sources(tokens_BT)
        x_BTD, block = sources[0], self.layers[0]
        assert isinstance(block, Block)
        cos_TK, sin_TK = self._rotary(0, tokens_BT.shape[1])
        if self.config.nested_heads:
            return [block(x_BTD, cos_TK, sin_TK, width, None) for width in widths], sources  # no value embeddings here
        x_BTD = block.attend(x_BTD, cos_TK, sin_TK, self.config.kv_heads, None, self.extra(0, sources))
        nested = block.mlp.nested(block.post_attention_layernorm(x_BTD), widths)
        return [x_BTD + y_BTD for y_BTD in nested], sources

    def finish(self, x_BTD: Tensor, sources: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
        """The other layers, from what `begin` gave for the first of `widths`: [B, T, D] -> [B, T, D]"""
        return self._through(1, x_BTD, sources, widths, None)

    def _through(
        self, first: int, x_BTD: Tensor, sources: Sequence[Tensor], widths: Sequence[int], cache: KVCache | None
    ) -> Tensor:
        cos_TK, sin_TK = self._rotary(0 if cache is None else cache.length, x_BTD.shape[1])
        inputs = list(sources[:first])  # of the layers that a mirror image looks back to
        for layer, (block, width) in list(enumerate(zip(self.layers, widths, strict=True)))[first:]:
            x_BTD = self.entered(layer, x_BTD, inputs)
            arguments = (cos_TK, sin_TK, width, cache, self.extra(layer, sources))
            if layer < self.recomputed_layers and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, *arguments, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, *arguments)
        out_BTD: Tensor = self.norm(x_BTD)
        return out_BTD

    def entered(self, layer: int, x_BTD: Tensor, inputs: list[Tensor]) -> Tensor:
        """A layer's input: the residual stream, and what its skip connection adds of the `inputs` before, if any.

        Appends to `inputs` what a later layer will ask for.
        """
        if self.skips is None:
            return x_BTD
        mirror = mirror_of(self.config, layer)
        if mirror is None:
            inputs.append(x_BTD)
            return x_BTD
        return x_BTD + self.skips.weight[mirror] * inputs[mirror]

    def extra(self, layer: int, sources: Sequence[Tensor]) -> Tensor | None:
        """What a layer's value embedding adds to its values, if it has any: [B, T, J]"""
        table = value_table_of(self.config, layer)
        return None if table is None else sources[1 + table]

    def _rotary(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `count` positions from `start` on, [T, K/2] each."""
        stop = start + count
        assert stop <= len(self.cos_TK), f"{stop} tokens do not fit a context of {len(self.cos_TK)}"
        return self.cos_TK[start:stop], self.sin_TK[start:stop]

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """int64 [B, T] -> [B, T, D]"""
        return self.settle(_widened(F.embedding(tokens_BT, self.embed_tokens.weight)))

    def settle(self, x_BTD: Tensor) -> Tensor:
        """Embeddings as the first layer wants them."""
        return F.rms_norm(x_BTD, (self.config.hidden_size,)) if self.config.normalises_embedding else x_BTD


def _widened(x: Tensor) -> Tensor:
    """In float32, in which everything is computed, if it is bfloat16."""
    return x.float() if x.dtype == torch.bfloat16 else x


class GPT(nn.Module):
    """The part of a model that one tier holds. All zero until `init_weights` or until weights are loaded into it."""

    def __init__(
        self,
        config: ModelConfig,
        tier: int = 0,
        *,
        neurons: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """`neurons` holds one FFN width per layer instead of the tier's, as Mix'n'Match extracts them.

        `dtype` is that of the matrices, float32 or bfloat16; gains, and all that is computed, are float32.
        """
        super().__init__()
        self.config = config
        self.tier = tier
        self.neurons = tuple(neurons) if neurons is not None else (tier_width(config, tier),) * config.num_hidden_layers
        self.width = max(self.neurons)
        self.model = Decoder(config, self.neurons, dtype)
        self.lm_head = None if config.tie_word_embeddings else Matrix(config.vocab_size, config.hidden_size, dtype)
        held = {name: tuple(p.shape) for name, p in self.named_parameters()}
        assert held == shapes_at(config, self.neurons), "the module tree and tiers.py disagree about names or shapes"

    def init_weights(self, seed: int) -> None:
        """Write the run's initial weights: a pure function of configuration and seed, the same on every machine."""
        with torch.no_grad():
            for name, p in self.named_parameters():
                for row0 in range(0, len(p), _ROWS_AT_ONCE if p.dim() == 2 else len(p)):
                    part = p[row0 : row0 + _ROWS_AT_ONCE] if p.dim() == 2 else p
                    part.copy_(torch.from_numpy(initial_tensor(self.config, name, tuple(part.shape), seed, row0)))

    def layer_widths(self, width: WidthMap) -> tuple[int, ...]:
        """One width per layer; a layer that holds fewer neurons than asked for uses all it has."""
        if width is None:
            return self.neurons
        if isinstance(width, int):
            assert width <= self.width, f"width {width} of {self.width}"
            return tuple(min(width, held) for held in self.neurons)
        return tuple(width)

    def held_widths(self, width_map: WidthMap) -> tuple[int, ...]:
        """Like `layer_widths`, but each is checked to be there. Raises ConfigError."""
        widths = self.neurons if width_map is None else layer_widths(self.config, width_map)
        for layer, (width, held) in enumerate(zip(widths, self.neurons, strict=True)):
            if width > held:
                raise ConfigError(
                    f"a width of {width} in layer {layer} exceeds the {held} neurons that this model holds there: "
                    "choose a smaller one, or load the whole model."
                )
        return widths

    def forward(self, tokens_BT: Tensor, width: WidthMap = None, cache: KVCache | None = None) -> Tensor:
        """int64 [B, T] -> logits [B, T, V]. With a cache, the tokens continue what it holds, and it grows by them."""
        return self.logits(self.model(tokens_BT, self.layer_widths(width), cache))

    def logits(self, x_BTD: Tensor) -> Tensor:
        """Of the final norm's output: [B, T, D] -> [B, T, V]"""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        logits_BTV: Tensor = head(x_BTD)
        softcap = self.config.softcap
        return logits_BTV if softcap is None else softcap * torch.tanh(logits_BTV / softcap)

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor, width: WidthMap = None) -> Tensor:
        """Mean cross-entropy, in nats per token."""
        if not torch.is_grad_enabled() and self.lm_head is not None and self.lm_head.weight.dtype == torch.bfloat16:
            return self._lean_loss(self.model(tokens_BT, self.layer_widths(width), None), targets_BT)
        logits_BTV: Tensor = self(tokens_BT, width)
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    def _lean_loss(self, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """The loss of the final norm's output, without its logits ever being there as a whole."""
        assert self.lm_head is not None
        chunked = ChunkedLoss(self.lm_head.weight, self.config.softcap, torch.float32)
        return torch.tensor(chunked.losses([x_BTD.flatten(0, 1)], targets_BT.flatten())[0][0])
