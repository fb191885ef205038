"""One layer of lean training, forward and backward, with its optimizer steps inside the backward pass.

Of the forward pass the caller keeps a layer's input. What else the backward pass needs is computed once more, unless
`Kept` was asked for and is given back.
* All windows, and all widths of a step, are in the layer together, so a matrix's gradient is complete when it is there
  at all: the matrix takes its step at once and the gradient is forgotten (gradient release, after LOMO, Lv et al. 2023,
  arXiv 2306.09782). Nothing is accumulated for later, and a step is the same as with all gradients at once.
* Hidden neurons do not talk to each other, so the FFN goes by blocks of neurons: a block's activations, its rows of the
  matrices and their gradients are all that is there in float32.
* Activations rest in bfloat16; norms are computed in float32, matmuls in `compute`.
* Where `compute` is wider than the weights, they are widened a block at a time, always into the same room: fresh pages
  for each block cost a fifth of the step, because the kernel must clear them.
Only activation functions, norms and the attention itself are differentiated by autograd, a piece at a time.

Shape legend: N = tokens of all windows, D = hidden size, I and J = width of all heads' queries and of all key-value
heads, R = rows in a block, W = the same of neurons, M = tokens in a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from braniac.model.ffn import activate
from braniac.model.gpt import Block, Decoder
from braniac.model.lean_optim import LeanOptimizer
from braniac.model.objective import pairing
from braniac.model.rounding import widened
from braniac.model.tiers import heads_at

_Place = tuple[slice, slice]

ROWS_AT_ONCE = 512
"""Rows of a matrix, such as neurons, that are widened or have a gradient at once."""
TOKENS_AT_ONCE = 512
ATTENDED_AT_ONCE = 1 << 18
"""Queries' values that attention sees at once; it makes a dozen temporaries of that size."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a layer's forward pass computes at one width and its backward pass needs again."""

    middle_ND: Tensor
    """Between attention and FFN."""
    qkv: list[Tensor]
    """Queries [N, I], keys and values [N, J]; the backward pass overwrites them."""
    pre: list[Tensor]
    """Gate, if there is one, and up: [N, neurons] before the activation. None of them: to be computed again."""


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

    def forward(
        self, x_ND: Tensor, length: int, width: int, extra_NJ: Tensor | None, keep: bool
    ) -> tuple[Tensor, Kept | None]:
        """[N, D] -> [N, D], for windows of `length` tokens and an FFN of `width` neurons.

        `extra_NJ` is added to the values of attention. With `keep` also what spares the backward pass the same work.
        """
        middle_ND, qkv = self._attend(x_ND, length, self._kv_heads(width), extra_NJ)
        pre = [torch.empty(len(x_ND), width, dtype=self.stored) for _ in self.ffn[:-1]] if keep else []
        return self._feed(middle_ND, width, pre), Kept(middle_ND, qkv, pre) if keep else None

    def backward(
        self,
        inputs: Sequence[Tensor],
        flows: list[Tensor],
        length: int,
        widths: Sequence[int],
        extra_NJ: Tensor | None,
        kept: list[Kept | None],
    ) -> list[Tensor]:
        """Move the layer's matrices, and take `flows` [N, D] in place from its output back to its input.

        All four sequences have one entry for each width that the step trains; `kept` is emptied. Returned is what
        flows back to the values of attention, [N, J] for each width.
        """
        attended = [
            here or Kept(*self._attend(x_ND, length, self._kv_heads(width), extra_NJ), [])
            for here, x_ND, width in zip(kept, inputs, widths, strict=True)
        ]
        kept.clear()
        projected = [here.qkv for here in attended]
        self._feed_backward(attended, flows, widths)
        return self._attend_backward(inputs, projected, flows, length)

    # --- attention ---------------------------------------------------------------------------------------------------

    def _attend(self, x_ND: Tensor, length: int, kv_heads: int, extra_NJ: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The first half: [N, D] -> [N, D], and the queries [N, I], keys and values [N, J] on the way."""
        attention = self.block.self_attn
        normed_ND = normalise(self.block.input_layernorm, x_ND, self.compute)
        kv_rows = kv_heads * attention.head_dim
        rows = (kv_rows * attention.group, kv_rows, kv_rows)
        qkv = [
            self._project(normed_ND, matrix, count, plus)
            for matrix, count, plus in zip(self.qkv, rows, (None, None, extra_NJ), strict=True)
        ]
        del normed_ND
        middle_ND = x_ND.to(torch.float32, copy=True)
        y_NI = torch.empty(qkv[0].shape, dtype=self.compute)
        for q_at, kv_at in self._heads(qkv, length):
            leaves = [z[at].to(self.compute) for z, at in zip(qkv, (q_at, kv_at, kv_at), strict=True)]
            y_NI[q_at] = self._mix(leaves, length)
        for at, weight_RD in self._blocks(attention.o_proj, y_NI.shape[1]):
            for tokens in chunks(len(y_NI)):
                _add_product(middle_ND[tokens], y_NI[tokens, at], weight_RD)
        return middle_ND.to(self.stored), qkv

    def _project(self, normed_ND: Tensor, matrix: nn.Module, rows: int, plus_NJ: Tensor | None) -> Tensor:
        """By the first rows of a matrix, and what is added then: [N, D] -> [N, rows]"""
        out_NR = torch.empty(len(normed_ND), rows, dtype=self.stored)
        for at, weight_RD in self._blocks(matrix, rows):
            for tokens in chunks(len(normed_ND)):
                product_MR = normed_ND[tokens] @ weight_RD.mT
                out_NR[tokens, at] = product_MR if plus_NJ is None else product_MR + plus_NJ[tokens, at]
        return out_NR

    def _mix(self, qkv: Sequence[Tensor], length: int) -> Tensor:
        """What some heads read in some whole windows: [M, I] from queries [M, I], keys and values [M, J]."""
        cos_TK, sin_TK = (table[:length].to(self.compute) for table in (self.decoder.cos_TK, self.decoder.sin_TK))
        q_BTI, k_BTJ, v_BTJ = (z.view(-1, length, z.shape[1]) for z in qkv)
        return self.block.self_attn.mix(q_BTI, k_BTJ, v_BTJ, cos_TK, sin_TK).flatten(0, 1)

    def _attend_backward(
        self, inputs: Sequence[Tensor], projected: Sequence[list[Tensor]], flows: list[Tensor], length: int
    ) -> list[Tensor]:
        """Takes `projected`, the queries, keys and values of each input, and leaves their gradients there."""
        mixed = [self._mix_backward(qkv, flow_ND, length) for qkv, flow_ND in zip(projected, flows, strict=True)]
        self._move(self.o_name, list(zip(mixed, flows, strict=True)))
        del mixed
        norm = self.block.input_layernorm
        for x_ND, flow_ND, deltas in zip(inputs, flows, projected, strict=True):
            back_ND = torch.zeros(x_ND.shape)
            for matrix, delta_NI in zip(self.qkv, deltas, strict=True):
                for at, weight_RD in self._blocks(matrix, delta_NI.shape[1]):
                    for tokens in chunks(len(x_ND)):
                        _add_product(back_ND[tokens], delta_NI[tokens, at].to(self.compute), weight_RD)
            normalise_backward(norm, x_ND, back_ND, flow_ND)
        del back_ND
        normed = [normalise(norm, x_ND, self.compute) for x_ND in inputs]
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
            out_ID = self.block.self_attn.o_proj.weight.detach()[heads].to(self.compute)
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
        at_once = max(1, ATTENDED_AT_ONCE // (tokens * attention.head_dim * attention.group)) * attention.head_dim
        for first, last in _pieces(len(qkv[0]), tokens):
            for start, stop in _pieces(qkv[1].shape[1], at_once):
                rows, group = slice(first, last), attention.group
                yield (rows, slice(start * group, stop * group)), (rows, slice(start, stop))

    def _move(self, name: str, products: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Step of a matrix whose gradient is the sum of a^T b over pairs of a [N, rows] and b [N, D]."""
        rows = max(a_NI.shape[1] for a_NI, _ in products)
        direction = self.optimizer.direction(name, rows)
        room_RD = torch.empty(min(rows, ROWS_AT_ONCE), products[0][1].shape[1])
        for start, stop in _pieces(rows, ROWS_AT_ONCE):
            gradient_RD = room_RD[: stop - start].zero_()
            for a_NI, b_ND in products:
                a_NR = a_NI[:, start:stop]
                for at in chunks(len(a_NR)):
                    part_RD = gradient_RD[: a_NR.shape[1]]
                    _add_product(part_RD, a_NR[at].to(self.compute).mT, b_ND[at].to(self.compute))
            self.optimizer.add_gradient(direction, start, gradient_RD)
        del room_RD, gradient_RD, part_RD
        self.optimizer.apply(direction)

    # --- feed-forward ------------------------------------------------------------------------------------------------

    def _feed(self, middle_ND: Tensor, width: int, kept: Sequence[Tensor]) -> Tensor:
        """The second half: [N, D] -> [N, D]; pre-activations are also written to `kept`, if that is not empty."""
        normed_ND = normalise(self.block.post_attention_layernorm, middle_ND, self.compute)
        total_ND = middle_ND.to(torch.float32, copy=True)
        for neurons, (*matrices, down_WD) in self._neurons(width):
            for at in chunks(len(total_ND)):
                pre = [normed_ND[at] @ matrix_WD.mT for matrix_WD in matrices]
                for all_NW, part_MW in zip(kept, pre, strict=False):
                    all_NW[at, neurons] = part_MW
                _add_product(total_ND[at], self._activate(pre), down_WD)
        return total_ND.to(self.stored)

    def _feed_backward(self, attended: list[Kept], flows: list[Tensor], widths: Sequence[int]) -> None:
        """Empties `attended`."""
        norm, optimizer, widest = self.block.post_attention_layernorm, self.optimizer, max(widths)
        directions = [optimizer.direction(name, widest) for name in self.ffn_names]
        middles, known = [here.middle_ND for here in attended], [here.pre for here in attended]
        attended.clear()
        normed = [normalise(norm, middle_ND, self.compute) for middle_ND in middles]
        backs = [torch.zeros(x_ND.shape) for x_ND in normed]
        rooms = [torch.empty(min(widest, ROWS_AT_ONCE), backs[0].shape[1]) for _ in directions]
        for at, weights in self._neurons(widest):
            gradients = [room_WD[: at.stop - at.start].zero_() for room_WD in rooms]
            for x_ND, pre, flow_ND, back_ND, width in zip(normed, known, flows, backs, widths, strict=True):
                if (used := min(width, at.stop) - at.start) > 0:
                    some = [w[:used] for w in weights], [g[:used] for g in gradients]
                    here = [z_NW[:, at.start : at.start + used] for z_NW in pre]
                    self._neurons_backward(*some, x_ND, here, flow_ND, back_ND)
            for direction, gradient_WD in zip(directions, gradients, strict=True):
                optimizer.add_gradient(direction, at.start, gradient_WD)
        del normed, known, pre, here, weights, rooms, gradients, some, gradient_WD
        for middle_ND, back_ND, flow_ND in zip(middles, backs, flows, strict=True):
            normalise_backward(norm, middle_ND, back_ND, flow_ND)
        del middles, middle_ND, backs, back_ND
        while directions:
            optimizer.apply(directions.pop())

    def _neurons_backward(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        x_ND: Tensor,
        pre: Sequence[Tensor],
        flow_ND: Tensor,
        back_ND: Tensor,
    ) -> None:
        """One block of neurons; its matrices [W, D] are gate, if there is one, up and down.

        `pre` is what comes before the activation [N, W], or nothing: then it is computed. Adds to the gradients, and to
        `back_ND` what flows back to the block's input `x_ND`.
        """
        *matrices, down_WD = weights
        for at in chunks(len(x_ND)):
            x_MD, flow_MD = x_ND[at], flow_ND[at].to(self.compute)
            known = [z_NW[at].to(self.compute) for z_NW in pre] or [x_MD @ matrix_WD.mT for matrix_WD in matrices]
            leaves = [z_MW.requires_grad_() for z_MW in known]
            with torch.enable_grad():
                active_MW = self._activate(leaves)
                deltas = torch.autograd.grad(pairing(active_MW, flow_MD @ down_WD.mT), leaves)
            _add_product(gradients[-1], active_MW.detach().mT, flow_MD)
            for delta_MW, matrix_WD, gradient_WD in zip(deltas, matrices, gradients[:-1], strict=True):
                _add_product(gradient_WD, delta_MW.mT, x_MD)
                _add_product(back_ND[at], delta_MW, matrix_WD)

    def _activate(self, pre: Sequence[Tensor]) -> Tensor:
        """From the pre-activations of gate, if there is one, and up."""
        return activate(pre[-1], pre[0] if len(pre) > 1 else None, self.block.mlp.activation)

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _neurons(self, width: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """Blocks of the FFN's matrices, each with its place, ready to be multiplied."""
        for blocks in zip(*(self._blocks(matrix, width) for matrix in self.ffn), strict=True):
            yield blocks[0][0], [weight_WD for _, weight_WD in blocks]

    def _blocks(self, matrix: nn.Module, rows: int) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the first rows of a module's weight, each with its place, ready to be multiplied."""
        weight = matrix.weight
        assert isinstance(weight, Tensor)
        return widened(weight.detach()[:rows], ROWS_AT_ONCE, self.compute)

    def _kv_heads(self, width: int) -> int:
        return heads_at(self.decoder.config, width)


def normalise(norm: nn.Module, x_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """A norm of [N, D], computed in float32, as `dtype`."""
    out_ND = torch.empty(x_ND.shape, dtype=dtype)
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
