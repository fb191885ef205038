"""One training step of a big model in little memory: `precision: lean`.

What makes it small (sizes for the whole `nano-1b` and 2048 tokens per step):
* Of the forward pass only each layer's input is kept, in bfloat16 (8 MB). The backward pass is driven by hand, a layer
  at a time, and the optimizer steps happen inside it (lean_layer.py): gradients of two layers never coexist.
* Where there is more memory, `kept_layers` trades 67 MB per layer for the time of computing that layer's forward pass
  twice.
* The head and its loss go by blocks of the vocabulary (lean_loss.py).
* Weights are bfloat16 without a float32 copy, the optimizer keeps one byte per parameter of the matrices between
  embedding and head (lean_optim.py); stochastic rounding makes up for both (rounding.py).
* Freed memory is returned to the system.

Matmuls are done in bfloat16 where the processor can, else in float32 of a piece at a time: emulated, a product of
bfloat16 takes four times as long as one of float32 with AVX-512 and a hundred times as long without.

Shape legend: B = windows, T = tokens in a window, N = B * T, D = hidden size, U = distinct tokens, M = tokens in a
chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from braniac.model import lean_layer, lean_loss
from braniac.model.config import ModelConfig
from braniac.model.errors import ConfigError, TrainingDiverged
from braniac.model.gpt import GPT
from braniac.model.lean_layer import Kept, LeanLayer, chunks, normalise, normalise_backward
from braniac.model.lean_loss import ChunkedLoss
from braniac.model.lean_optim import MULTIPLIED_AT_ONCE, LeanOptimizer
from braniac.model.lean_sources import LookUps, SkipConnections
from braniac.model.malloc import give_back_memory, return_large_blocks_at_once
from braniac.model.objective import Term, pairing
from braniac.model.tiers import EMBEDDING, HEAD, is_gain, is_table, parameter_shapes, tier_width


def compute_type(device: torch.device | None = None) -> torch.dtype:
    """What matmuls are done in: bfloat16 if the device, this processor if not given, does so natively, else float32."""
    if device is not None and device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # Not torch.ops.mkldnn._is_mkldnn_bf16_supported: that is true of all AVX-512, most of which emulates it.
        able = torch.cpu.get_capabilities()
        native = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's
    return torch.bfloat16 if native else torch.float32


class LeanStep:
    """Runs the steps of one model, whose matrices are bfloat16."""

    def __init__(
        self,
        model: GPT,
        optimizer: LeanOptimizer,
        compute: torch.dtype | None = None,
        stored: torch.dtype = torch.bfloat16,
        kept_layers: int = 0,
    ) -> None:
        """`compute` is what matmuls are done in, the fastest type if not given; activations rest in `stored`.

        Of so many last layers what the forward pass computed is kept for the backward pass.

        Raises ConfigError for a model whose head is its embedding.
        """
        if model.lm_head is None:
            raise ConfigError(
                "lean training cannot train a model whose head is its embedding (tie_word_embeddings), because the two "
                "would move at different times: use precision fp32."
            )
        self.model = model
        self.optimizer = optimizer
        return_large_blocks_at_once()
        compute = compute or compute_type(model.lm_head.weight.device)
        self._stored = stored
        self._loss = ChunkedLoss(model.lm_head.weight.detach(), model.config.softcap, compute)
        numbers = range(model.config.num_hidden_layers)
        self._kept_from = len(numbers) - kept_layers
        self._layers = [LeanLayer(number, model.model, optimizer, compute, stored) for number in numbers]

    @torch.no_grad()
    def run(
        self, tokens_BT: Tensor, targets_BT: Tensor, terms: Sequence[Term], kl_weight: float, lr_scale: float, seed: int
    ) -> list[float]:
        """One update by the weighted losses; the plain loss of each term, before the update, nats per token.

        Raises TrainingDiverged: with nothing changed if a loss is not finite; if only some gradients are not, after
        the step of all parameters but theirs.
        """
        norm, length, targets_N = self.model.model.norm, tokens_BT.shape[1], targets_BT.flatten()
        looked_up, skips = LookUps(self.optimizer, tokens_BT.flatten(), self._stored), SkipConnections(self.model.model)
        # Per term, what came out of the embedding and of each layer, and what is kept of each layer.
        passes = [self._forward(tokens_BT, term.widths, looked_up, skips) for term in terms]
        outs, kept = [out for out, _ in passes], [of_layers for _, of_layers in passes]
        del passes
        ends = [out.pop() for out in outs]
        outputs = [normalise(norm, x_ND, self._stored) for x_ND in ends]
        losses, normalisers = self._loss.losses(outputs, targets_N)
        if not all(map(math.isfinite, losses)):
            raise TrainingDiverged(
                f"the loss is not finite ({losses[0]:g}): lower the learning rate or reload the weights."
            )
        self.optimizer.begin(lr_scale, seed)
        weights = [term.weight for term in terms]
        backs = self._loss.gradients(outputs, targets_N, normalisers, weights, kl_weight, self._move_head)
        del outputs, normalisers
        flows = [torch.zeros_like(x_ND) for x_ND in ends]
        for x_ND, back_ND, flow_ND in zip(ends, backs, flows, strict=True):
            normalise_backward(norm, x_ND, back_ND, flow_ND)
        del ends, backs
        for number in reversed(range(len(self._layers))):
            give_back_memory()
            inputs, widths = [skips.entered(number, out) for out in outs], [term.widths[number] for term in terms]
            here = [of_layers.pop() for of_layers in kept]
            backs = self._layers[number].backward(inputs, flows, length, widths, looked_up.extra(number), here)
            looked_up.take(number, backs)
            skips.take(number, outs, flows)
            for out in outs:
                out.pop()
            del inputs, backs
        self._move_embedding(looked_up, flows)
        self.optimizer.update_gains()
        give_back_memory()
        self._check_refused()
        return losses

    def _forward(
        self, tokens_BT: Tensor, widths: Sequence[int], looked_up: LookUps, skips: SkipConnections
    ) -> tuple[list[Tensor], list[Kept | None]]:
        """What comes out of the embedding and of each layer: [N, D] each. And what is kept of each layer."""
        outs, kept = [self.model.model.embed(tokens_BT).flatten(0, 1).to(self._stored)], []
        for number, (layer, width) in enumerate(zip(self._layers, widths, strict=True)):
            x_ND, keep = skips.entered(number, outs), number >= self._kept_from
            out_ND, here = layer.forward(x_ND, tokens_BT.shape[1], width, looked_up.extra(number), keep)
            outs.append(out_ND)
            kept.append(here)
        return outs, kept

    def _move_head(self, rows: slice, gradient_VD: Tensor) -> None:
        self.optimizer.update_rows(HEAD, rows, gradient_VD)

    def _move_embedding(self, looked_up: LookUps, flows: Sequence[Tensor]) -> None:
        """The step of the rows that were looked up."""
        table = self.model.model.embed_tokens.weight
        gradient_UD = torch.zeros(len(looked_up.rows_U), table.shape[1])
        for flow_ND in flows:
            for at in chunks(len(flow_ND)):
                row_MD = table[looked_up.tokens_N[at]].float().requires_grad_()
                with torch.enable_grad():
                    x_MD = self.model.model.settle(row_MD)
                    (delta_MD,) = torch.autograd.grad(pairing(x_MD, flow_ND[at].float()), [row_MD])
                gradient_UD.index_add_(0, looked_up.place_N[at], delta_MD)
        self.optimizer.update_rows(EMBEDDING, looked_up.rows_U, gradient_UD)

    def _check_refused(self) -> None:
        if refused := self.optimizer.refused:
            others = f" and {len(refused) - 1} others" if len(refused) > 1 else ""
            raise TrainingDiverged(
                f"the gradient of {refused[0]}{others} is not finite, so that was left as it was: "
                "lower the learning rate or reload the weights."
            )


def lean_bytes_needed(config: ModelConfig, tier: int, tokens: int, terms: int, kept_layers: int = 0) -> int:
    """Estimate of what lean training of a tier adds to the process at its peak; a step has `tokens` and `terms` widths.

    Weights, momentum, the inputs of all layers and what is kept of some, and the largest of what is there for a while.
    """
    shapes, d, width = parameter_shapes(config, tier), config.hidden_size, tier_width(config, tier)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    momentum = sum(size for name, size in sizes.items() if not is_table(name) and not is_gain(name))
    queries, keys = config.num_attention_heads * config.head_dim, config.kv_heads * config.head_dim
    chunk, flows = min(tokens, lean_layer.TOKENS_AT_ONCE), terms * tokens * d
    matrices = 3 if config.gated else 2
    rows = min(width, lean_layer.ROWS_AT_ONCE)
    feeding = 12 * flows + 2 * matrices * width * d + 8 * matrices * rows * d + 4 * chunk * (5 * rows + 2 * d)
    orthogonalising = 4 * flows + 2 * matrices * width * d + 20 * min(width, d) ** 2 + 12 * MULTIPLIED_AT_ONCE
    attending = 8 * flows + 4 * terms * tokens * (queries + keys) + 14 * queries * d + 20 * min(queries, d) ** 2
    head = 8 * flows + 8 * min(config.vocab_size, lean_loss.ROWS_AT_ONCE) * (d + 2 * chunk)
    at_once = max(feeding, orthogonalising, attending, head)
    if config.value_embeddings:  # what one layer looks up, and the gradients of all tables
        at_once += keys * (2 * tokens + 4 * config.value_embeddings * min(tokens, config.vocab_size))
    if config.skip_connections:  # a layer's input, and what flows back to all mirror images
        at_once += 2 * flows * (1 + config.num_hidden_layers // 2)
    kept = 2 * config.num_hidden_layers * flows
    kept += 2 * kept_layers * terms * tokens * (d + queries + 2 * keys + (matrices - 1) * width)
    return 2 * sum(sizes.values()) + momentum + momentum // 64 + kept + at_once
