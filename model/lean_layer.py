"""One layer of lean training, forward and backward, with its optimizer steps inside the backward pass.

Nothing is kept from forward to backward: the caller keeps the layer's input, and the rest is computed once more.
* All windows, and all widths of a step, are in the layer together, so a matrix's gradient is complete when it is there
  at all: the matrix takes its step at once and the gradient is forgotten (gradient release, after LOMO, Lv et al. 2023,
  arXiv 2306.09782). Nothing is accumulated for later, and a step is the same as with all gradients at once.
* Hidden neurons do not talk to each other, so the FFN goes by blocks of neurons: a block's activations, its rows of the
  matrices and their gradients are all that is there in float32.
* Activations rest in bfloat16; norms are computed in float32, matmuls in `compute`.
Only activation functions, norms and the attention itself are differentiated by autograd, a piece at a time.

Shape legend: N = tokens of all windows, D = hidden size, I and J = width of all heads' queries and of all key-value
heads, W = neurons in a block, M = tokens in a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from braniac.model.ffn import activate
from braniac.model.gpt import Block, Decoder
from braniac.model.lean_optim import VALUES_AT_ONCE, LeanOptimizer
from braniac.model.objective import pairing
from braniac.model.tiers import heads_at

_Place = tuple[slice, slice]

NEURONS_AT_ONCE = 512
TOKENS_AT_ONCE = 512


class LeanLayer:
    """A layer of a model whose matrices are bfloat16."""

    def __init__(
        self, number: int, decoder: Decoder, optimizer: LeanOptimizer, compute: torch.dtype, stored: torch.dtype
    ) -> None:
        """Matmuls are done in `compute`, activations rest in `stored`."""
        block = decoder.layers[number]
        assert isinstance(block, Block)
        self.block, self.decoder, self.optimizer = block, decoder, optimizer
        self.compute, self.stored = compute, stored
        attention, mlp, prefix = block.self_attn, block.mlp, f"model.layers.{number}"
        self.qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.ffn = [matrix for matrix in (mlp.gate_proj, mlp.up_proj, mlp.down_proj) if matrix is not None]
        self.qkv_names = [f"{prefix}.self_attn.{kind}_proj.weight" for kind in "qkv"]
        self.o_name = f"{prefix}.self_attn.o_proj.weight"
        self.ffn_names = [f"{prefix}.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")[3 - len(self.ffn) :]]

    def forward(self, x_ND: Tensor, length: int, width: int, extra_NJ: Tensor | None) -> Tensor:
        """[N, D] -> [N, D], for windows of `length` tokens and an FFN of `width` neurons.

        `extra_NJ` is added to the values of attention.
        """
        return self._feed(self._attend(x_ND, length, self._kv_heads(width), extra_NJ), width)

    def backward(
        self,
        inputs: Sequence[Tensor],
        flows: list[Tensor],
        length: int,
        widths: Sequence[int],
        extra_NJ: Tensor | None,
    ) -> list[Tensor]:
        """Move the layer's matrices, and take `flows` [N, D] in place from its output back to its input.

        All three sequences have one entry for each width that the step trains. Returned is what flows back to the
        values of attention, [N, J] for each width.
        """
        kv_heads = [self._kv_heads(width) for width in widths]
        middles = [self._attend(x_ND, length, heads, extra_NJ) for x_ND, heads in zip(inputs, kv_heads, strict=True)]
        self._feed_backward(middles, flows, widths)
        del middles
        return self._attend_backward(inputs, flows, length, kv_heads, extra_NJ)

    # --- attention ---------------------------------------------------------------------------------------------------

    def _attend(self, x_ND: Tensor, length: int, kv_heads: int, extra_NJ: Tensor | None) -> Tensor:
        """The first half: [N, D] -> [N, D]"""
        qkv = self._project(normalise(self.block.input_layernorm, x_ND), kv_heads, extra_NJ)
        y_NI = torch.empty_like(qkv[0])
        for q_at, kv_at in self._heads(qkv, length):
            leaves = [z[at].to(self.compute) for z, at in zip(qkv, (q_at, kv_at, kv_at), strict=True)]
            y_NI[q_at] = self._mix(leaves, length)
        return self._times(y_NI, self._rows(self.block.self_attn.o_proj, 0, y_NI.shape[1]), plus=x_ND)

    def _project(self, normed_ND: Tensor, kv_heads: int, extra_NJ: Tensor | None) -> list[Tensor]:
        """Queries [N, I], keys and values [N, J]."""
        attention = self.block.self_attn
        kv_rows = kv_heads * attention.head_dim
        rows = (kv_rows * attention.group, kv_rows, kv_rows)
        return [
            self._times(normed_ND, self._rows(matrix, 0, count).mT, plus)
            for matrix, count, plus in zip(self.qkv, rows, (None, None, extra_NJ), strict=True)
        ]

    def _mix(self, qkv: Sequence[Tensor], length: int) -> Tensor:
        """What some heads read in some whole windows: [M, I] from queries [M, I], keys and values [M, J]."""
        cos_TK, sin_TK = (table[:length].to(self.compute) for table in (self.decoder.cos_TK, self.decoder.sin_TK))
        q_BTI, k_BTJ, v_BTJ = (z.view(-1, length, z.shape[1]) for z in qkv)
        return self.block.self_attn.mix(q_BTI, k_BTJ, v_BTJ, cos_TK, sin_TK).flatten(0, 1)

    def _attend_backward(
        self,
        inputs: Sequence[Tensor],
        flows: list[Tensor],
        length: int,
        kv_heads: Sequence[int],
        extra_NJ: Tensor | None,
    ) -> list[Tensor]:
        norm = self.block.input_layernorm
        normed = [normalise(norm, x_ND) for x_ND in inputs]
        projected, mixed = [], []
        for x_ND, flow_ND, heads in zip(normed, flows, kv_heads, strict=True):
            qkv = self._project(x_ND, heads, extra_NJ)
            mixed.append(self._mix_backward(qkv, flow_ND, length))
            projected.append(qkv)  # now their gradients
        self._move(self.o_name, list(zip(mixed, flows, strict=True)))
        del mixed
        for x_ND, flow_ND, deltas in zip(inputs, flows, projected, strict=True):
            back_ND = torch.zeros(x_ND.shape)
            for matrix, delta_NI in zip(self.qkv, deltas, strict=True):
                weight_ID = self._rows(matrix, 0, delta_NI.shape[1])
                for at in chunks(len(x_ND)):
                    _add_product(back_ND[at], delta_NI[at].to(self.compute), weight_ID)
            normalise_backward(norm, x_ND, back_ND, flow_ND)
        for number, name in enumerate(self.qkv_names):
            self._move(name, [(deltas[number], x_ND) for deltas, x_ND in zip(projected, normed, strict=True)])
        return [value_delta_NJ for _, _, value_delta_NJ in projected]

    def _mix_backward(self, qkv: list[Tensor], flow_ND: Tensor, length: int) -> Tensor:
        """What the heads read, [N, I]; overwrites queries, keys and values by their gradients."""
        y_NI = torch.empty_like(qkv[0])
        for q_at, kv_at in self._heads(qkv, length):
            places = (q_at, kv_at, kv_at)
            leaves = [z[at].to(self.compute, copy=True).requires_grad_() for z, at in zip(qkv, places, strict=True)]
            rows, heads = q_at
            out_ID = self._rows(self.block.self_attn.o_proj, heads.start, heads.stop)
            with torch.enable_grad():
                y_MI = self._mix(leaves, length)
                deltas = torch.autograd.grad(pairing(y_MI, flow_ND[rows].to(self.compute) @ out_ID.mT), leaves)
            y_NI[q_at] = y_MI.detach()
            for z, at, delta in zip(qkv, places, deltas, strict=True):
                z[at] = delta
        return y_NI

    def _heads(self, qkv: Sequence[Tensor], length: int) -> Iterator[tuple[_Place, _Place]]:
        """Heads do not talk to each other, nor windows: places of a few of both in queries, and in keys and values."""
        attention, tokens = self.block.self_attn, max(1, TOKENS_AT_ONCE // length) * length
        at_once = max(1, VALUES_AT_ONCE // (tokens * attention.head_dim * attention.group)) * attention.head_dim
        for first, last in _pieces(len(qkv[0]), tokens):
            for start, stop in _pieces(qkv[1].shape[1], at_once):
                rows, group = slice(first, last), attention.group
                yield (rows, slice(start * group, stop * group)), (rows, slice(start, stop))

    def _move(self, name: str, products: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Step of a matrix whose gradient is the sum of a^T b over pairs of a [N, rows] and b [N, D]."""
        rows = max(a_NI.shape[1] for a_NI, _ in products)
        gradient_ID = torch.zeros(rows, products[0][1].shape[1])
        for a_NI, b_ND in products:
            for at in chunks(len(a_NI)):
                _add_product(gradient_ID[: a_NI.shape[1]], a_NI[at].to(self.compute).mT, b_ND[at].to(self.compute))
        direction = self.optimizer.direction(name, rows)
        self.optimizer.add_gradient(direction, 0, gradient_ID)
        del gradient_ID
        self.optimizer.apply(direction)

    # --- feed-forward ------------------------------------------------------------------------------------------------

    def _feed(self, middle_ND: Tensor, width: int) -> Tensor:
        """The second half: [N, D] -> [N, D]"""
        normed_ND = normalise(self.block.post_attention_layernorm, middle_ND)
        total_ND = middle_ND.float()
        for start, stop in _pieces(width, NEURONS_AT_ONCE):
            *pre, down_WD = (self._rows(matrix, start, stop) for matrix in self.ffn)
            for at in chunks(len(total_ND)):
                x_MD = normed_ND[at].to(self.compute)
                _add_product(total_ND[at], self._activate([x_MD @ matrix_WD.mT for matrix_WD in pre]), down_WD)
        return total_ND.to(self.stored)

    def _feed_backward(self, middles: Sequence[Tensor], flows: list[Tensor], widths: Sequence[int]) -> None:
        norm, optimizer, d = self.block.post_attention_layernorm, self.optimizer, middles[0].shape[1]
        directions = [optimizer.direction(name, max(widths)) for name in self.ffn_names]
        normed = [normalise(norm, middle_ND) for middle_ND in middles]
        backs = [torch.zeros(x_ND.shape) for x_ND in normed]
        for start, stop in _pieces(max(widths), NEURONS_AT_ONCE):
            weights = [self._rows(matrix, start, stop) for matrix in self.ffn]
            gradients = [torch.zeros(stop - start, d) for _ in weights]
            for x_ND, flow_ND, back_ND, width in zip(normed, flows, backs, widths, strict=True):
                if (used := min(width, stop) - start) > 0:
                    some = [w[:used] for w in weights], [g[:used] for g in gradients]
                    self._neurons_backward(*some, x_ND, flow_ND, back_ND)
            for direction, gradient_WD in zip(directions, gradients, strict=True):
                optimizer.add_gradient(direction, start, gradient_WD)
        del normed, weights, gradients
        for middle_ND, back_ND, flow_ND in zip(middles, backs, flows, strict=True):
            normalise_backward(norm, middle_ND, back_ND, flow_ND)
        del backs
        while directions:
            optimizer.apply(directions.pop())

    def _neurons_backward(
        self, weights: Sequence[Tensor], gradients: Sequence[Tensor], x_ND: Tensor, flow_ND: Tensor, back_ND: Tensor
    ) -> None:
        """One block of neurons; its matrices [W, D] are gate, if there is one, up and down.

        Adds to their gradients, and to `back_ND` what flows back to the block's input `x_ND`.
        """
        *pre, down_WD = weights
        for at in chunks(len(x_ND)):
            x_MD, flow_MD = x_ND[at].to(self.compute), flow_ND[at].to(self.compute)
            leaves = [(x_MD @ matrix_WD.mT).requires_grad_() for matrix_WD in pre]
            with torch.enable_grad():
                active_MW = self._activate(leaves)
                deltas = torch.autograd.grad(pairing(active_MW, flow_MD @ down_WD.mT), leaves)
            _add_product(gradients[-1], active_MW.detach().mT, flow_MD)
            for delta_MW, matrix_WD, gradient_WD in zip(deltas, pre, gradients[:-1], strict=True):
                _add_product(gradient_WD, delta_MW.mT, x_MD)
                _add_product(back_ND[at], delta_MW, matrix_WD)

    def _activate(self, pre: Sequence[Tensor]) -> Tensor:
        """From the pre-activations of gate, if there is one, and up."""
        return activate(pre[-1], pre[0] if len(pre) > 1 else None, self.block.mlp.activation)

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _times(self, x_NI: Tensor, matrix_IO: Tensor, plus: Tensor | None = None) -> Tensor:
        """x @ matrix (+ plus), [N, O], rounded only in the end."""
        out_NO = torch.empty(len(x_NI), matrix_IO.shape[1], dtype=self.stored)
        for at in chunks(len(x_NI)):
            product_MO = x_NI[at].to(self.compute) @ matrix_IO
            out_NO[at] = product_MO if plus is None else plus[at].to(self.compute) + product_MO
        return out_NO

    def _rows(self, matrix: nn.Module, start: int, stop: int) -> Tensor:
        """Rows of a module's weight, ready to be multiplied."""
        weight = matrix.weight
        assert isinstance(weight, Tensor)
        return weight.detach()[start:stop].to(self.compute)

    def _kv_heads(self, width: int) -> int:
        return heads_at(self.decoder.config, width)


def normalise(norm: nn.Module, x_ND: Tensor) -> Tensor:
    """A norm of [N, D], computed in float32."""
    out_ND = torch.empty_like(x_ND)
    for at in chunks(len(x_ND)):
        out_ND[at] = norm(x_ND[at].float())
    return out_ND


def normalise_backward(norm: nn.Module, x_ND: Tensor, back_ND: Tensor, flow_ND: Tensor) -> None:
    """Add to `flow_ND` what flows back through a norm of `x_ND`; its gain, if any, adds to its gradient."""
    for at in chunks(len(x_ND)):
        leaf_MD = x_ND[at].float().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(pairing(norm(leaf_MD), back_ND[at]))
        assert leaf_MD.grad is not None
        flow_ND[at] += leaf_MD.grad


def chunks(tokens: int) -> Iterator[slice]:
    """Tokens a chunk at a time."""
    for start, stop in _pieces(tokens, TOKENS_AT_ONCE):
        yield slice(start, stop)


def _pieces(count: int, at_once: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, at_once):
        yield start, min(start + at_once, count)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where `total` is float32 and the factors may be bfloat16."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b
