"""What the layers of lean training read besides the residual stream, and its way back: value embeddings, skips.

Both tie a late layer to something early, so on the way back what they owe is kept until the early layer's turn comes:
of a value embedding the gradient of the rows that were looked up, until the first of its two layers is done; of a skip
connection what flows back to the mirror image's input.

Shape legend: N = tokens of all windows, D = hidden size, J = width of all key-value heads, U = distinct tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from braniac.model.gpt import Decoder
from braniac.model.lean_layer import chunks
from braniac.model.lean_optim import LeanOptimizer
from braniac.model.tiers import mirror_of, value_table, value_table_of


class LookUps:
    """What the tokens of one step look up in tables."""

    def __init__(self, optimizer: LeanOptimizer, tokens_N: Tensor, stored: torch.dtype) -> None:
        """What value embeddings say rests in `stored`."""
        self.tokens_N = tokens_N
        self.rows_U, self.place_N = torch.unique(tokens_N, return_inverse=True)
        self._optimizer, self._stored = optimizer, stored
        self._gradients: dict[int, Tensor] = {}

    def extra(self, layer: int) -> Tensor | None:
        """What the tokens add to the values of a layer, [N, J]; None if it has no value embedding."""
        table = value_table_of(self._optimizer.config, layer)
        if table is None:
            return None
        return self._optimizer.params[value_table(table)].detach()[self.tokens_N].to(self._stored)

    def take(self, layer: int, backs: Sequence[Tensor]) -> None:
        """Take what flowed back to a layer's values, [N, J] of each width; move the table when it is complete."""
        table = value_table_of(self._optimizer.config, layer)
        if table is None:
            return
        if table not in self._gradients:
            self._gradients[table] = torch.zeros(len(self.rows_U), backs[0].shape[1])
        gradient_UJ = self._gradients[table]
        for back_NJ in backs:
            for at in chunks(len(back_NJ)):
                gradient_UJ.index_add_(0, self.place_N[at], back_NJ[at].float())
        if layer == table:  # the first layer it serves is the last one on the way back
            self._optimizer.update_rows(value_table(table), self.rows_U, self._gradients.pop(table))


class SkipConnections:
    """The skip connections of one step."""

    def __init__(self, decoder: Decoder) -> None:
        self._config = decoder.config
        self._gains = None if decoder.skips is None else decoder.skips.weight
        self._owed: dict[int, list[Tensor]] = {}

    def entered(self, layer: int, kept: Sequence[Tensor]) -> Tensor:
        """A layer's input, from what came out of the embedding and of each layer before it, [N, D] each."""
        mirror = mirror_of(self._config, layer)
        if mirror is None or self._gains is None:
            return kept[layer]
        out_ND = torch.empty_like(kept[layer])
        for at in chunks(len(out_ND)):
            out_ND[at] = kept[layer][at].float() + self._gains[mirror] * kept[mirror][at].float()
        return out_ND

    def take(self, layer: int, kept: Sequence[Sequence[Tensor]], flows: Sequence[Tensor]) -> None:
        """Take what flowed back to a layer's input, [N, D] of each width, and add to it what later layers owe.

        `kept` is as for `entered`, for each width.
        """
        if layer in self._owed:
            for flow_ND, owed_ND in zip(flows, self._owed.pop(layer), strict=True):
                flow_ND += owed_ND
        mirror = mirror_of(self._config, layer)
        if mirror is None or self._gains is None:
            return
        if self._gains.grad is None:
            self._gains.grad = torch.zeros_like(self._gains)
        self._owed[mirror] = [torch.empty_like(flow_ND) for flow_ND in flows]
        for of_layers, flow_ND, owed_ND in zip(kept, flows, self._owed[mirror], strict=True):
            for at in chunks(len(flow_ND)):
                flow_MD = flow_ND[at].float()
                self._gains.grad[mirror] += (flow_MD * of_layers[mirror][at].float()).sum(0)
                owed_ND[at] = flow_MD * self._gains[mirror]
