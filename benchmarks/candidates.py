"""Ingredients of modded-nanogpt that the model does not have, to be measured by ingredients.py: a model, an optimizer.

Each is as in its records (github.com/KellerJordan/modded-nanogpt), but for sizes. Shapes as in model/gpt.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braniac.model import optim
from braniac.model.attention import Attention, KVCache, rotate
from braniac.model.config import ModelConfig
from braniac.model.gpt import GPT, Block
from braniac.model.optim import Optimizer
from braniac.model.tiers import shapes_at
from braniac.model.trainer import TrainSettings

_GATE_CHANNELS = 12  # of the residual stream, which gates look at
_FIRST_MOMENTUM = 0.85


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What is different from the model as it is."""

    embedding_everywhere: bool = False
    """Each layer gets a * x + b * embedding, with learnt numbers that start at 1 and 0 (x0 and residual lambdas)."""

    unet: bool = False
    """Layer L/2 + i also gets the output of layer L/2 - 1 - i, times a learnt number that starts at 1."""

    smear: bool = False
    """Each embedding gets a share of the one before it, by a learnt gate that looks at some channels of its own."""

    head_gates: bool = False
    """What each head reads is multiplied by a learnt gate that looks at some channels of the layer's input."""

    attention_scale: float = 0.0
    """Of the products of queries and keys; 0: 1/sqrt(K)."""

    window: int = 0
    """Tokens that all layers but the last one look back to, themselves included; 0: all."""

    matrix_adam: float = 0.0
    """Learning rate of Adam for the matrices, instead of Muon; 0: Muon."""

    momentum_warmup: int = 0
    """Steps over which Muon's momentum rises from 0.85."""

    matrix_decay: float = 0.0
    """Weight decay of the matrices, in units of Muon's learning rate."""

    cautious: bool = False
    """Whether it takes only from those values that the step makes smaller anyway."""

    sqrt_cooldown: bool = False
    """The learning rates fall by 1 - sqrt of the cooldown's progress, instead of in a straight line."""


class CandidateGPT(GPT):
    """A nanogpt with candidates."""

    def __init__(self, config: ModelConfig, candidate: Candidate, seed: int) -> None:
        """With its first weights; those that candidates add change nothing yet, but for U-net's."""
        super().__init__(config)
        self.init_weights(seed)
        layers = config.num_hidden_layers
        self.candidate = candidate
        self.mixes = nn.Parameter(torch.tensor([[1.0, 0.0]] * layers))
        self.skip_weights = nn.Parameter(torch.ones(layers))
        self.smear_gate = nn.Parameter(torch.zeros(_GATE_CHANNELS))
        self.smear_size = nn.Parameter(torch.zeros(()))
        self._inputs: list[Tensor] = []
        for number, block in enumerate(self.model.layers):
            assert isinstance(block, Block)
            attention = _Attention(config, number, candidate)
            attention.load_state_dict(block.self_attn.state_dict(), strict=False)
            block.self_attn = attention
            block.register_forward_pre_hook(functools.partial(self._enter, number))

    def _enter(self, number: int, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a layer is called with, before and after the candidates' part."""
        x_BTD, *others = arguments
        if number == 0:
            self._inputs.clear()
            if self.candidate.smear:
                gate_BT = self.smear_size * torch.sigmoid(x_BTD[:, 1:, :_GATE_CHANNELS] @ self.smear_gate)
                x_BTD = torch.cat((x_BTD[:, :1], x_BTD[:, 1:] + gate_BT[..., None] * x_BTD[:, :-1]), dim=1)
        if self.candidate.unet and number > len(self.mixes) // 2:
            # The output of layer L/2 - 1 - i is the input of the layer after it.
            x_BTD = x_BTD + self.skip_weights[number] * self._inputs[len(self.mixes) - number]
        elif self.candidate.unet and number == len(self.mixes) // 2:
            x_BTD = x_BTD + self.skip_weights[number] * x_BTD
        self._inputs.append(x_BTD)
        if self.candidate.embedding_everywhere:
            keep, add = self.mixes[number]
            x_BTD = keep * x_BTD + add * self._inputs[0]
        return (x_BTD, *others)


class _Attention(Attention):
    def __init__(self, config: ModelConfig, layer: int, candidate: Candidate) -> None:
        super().__init__(config, layer, config.kv_heads)
        self.scale = candidate.attention_scale or self.head_dim**-0.5
        self.gate = nn.Parameter(torch.zeros(config.num_attention_heads, _GATE_CHANNELS))
        self.gated = candidate.head_gates
        self.mask_TS = None
        if candidate.window and layer < config.num_hidden_layers - 1:
            past_TS = torch.arange(config.context)[:, None] - torch.arange(config.context)
            self.mask_TS = (past_TS >= 0) & (past_TS < candidate.window)

    def forward(self, x_BTD: Tensor, *arguments: Any) -> Tensor:
        self._gates_BTN = 2 * torch.sigmoid(x_BTD[..., :_GATE_CHANNELS] @ self.gate.mT)
        return super().forward(x_BTD, *arguments)

    def mix(
        self, q_BTI: Tensor, k_BTJ: Tensor, v_BTJ: Tensor, cos_TK: Tensor, sin_TK: Tensor, cache: KVCache | None = None
    ) -> Tensor:
        assert cache is None, "candidates are not made to decode"
        q_BNTK, k_BNTK, v_BNTK = (self._heads(projected) for projected in (q_BTI, k_BTJ, v_BTJ))
        q_BNTK, k_BNTK = (F.rms_norm(x, (self.head_dim,)) for x in (q_BNTK, k_BNTK))
        q_BNTK, k_BNTK = rotate(q_BNTK, cos_TK, sin_TK), rotate(k_BNTK, cos_TK, sin_TK)
        y_BNTK = F.scaled_dot_product_attention(
            q_BNTK, k_BNTK, v_BNTK, self.mask_TS, is_causal=self.mask_TS is None, scale=self.scale
        )
        y_BTNK = y_BNTK.transpose(1, 2)
        return (y_BTNK * self._gates_BTN[..., None] if self.gated else y_BTNK).flatten(2)


class CandidateOptimizer(Optimizer):
    """Moves a model with candidates; what they added to it by Adam, without decay."""

    def __init__(self, model: GPT, settings: TrainSettings, candidate: Candidate) -> None:
        named = dict(model.named_parameters())
        known = {name: named.pop(name) for name in shapes_at(model.config, model.neurons)}
        super().__init__(
            known,
            model.config,
            learning_rate=settings.learning_rate,
            adam_learning_rate=settings.adam_learning_rate,
            weight_decay=settings.weight_decay,
        )
        self.candidate = candidate
        self.added = named
        self.slow = self.matrices if candidate.matrix_adam else {}
        self.matrices = {} if candidate.matrix_adam else self.matrices
        for moments in (self.first, self.second):
            moments |= {name: torch.zeros_like(p.detach()) for name, p in (self.added | self.slow).items()}

    def _muon_step(self, lr: float, widths: Any) -> None:
        warmup, momentum = self.candidate.momentum_warmup, optim.MOMENTUM
        if warmup:
            share = min(1.0, int(self.steps) / warmup)
            optim.MOMENTUM = _FIRST_MOMENTUM + (momentum - _FIRST_MOMENTUM) * share
        before = {name: p.detach().clone() for name, p in self.matrices.items() if self.candidate.matrix_decay}
        super()._muon_step(lr, widths)
        optim.MOMENTUM = momentum
        for name, old in before.items():
            taken = old * ((self.matrices[name] - old) * old <= 0) if self.candidate.cautious else old
            self.matrices[name].sub_(taken, alpha=lr * self.candidate.matrix_decay)

    def _adam_step(self, lr: float) -> None:
        tables, decay = self.tables, self.weight_decay
        super()._adam_step(lr)
        self.tables, self.weight_decay = {name: p for name, p in self.added.items() if p.grad is not None}, 0.0
        super()._adam_step(lr)
        self.tables = self.slow
        super()._adam_step(lr / self.adam_learning_rate * self.candidate.matrix_adam)
        self.tables, self.weight_decay = tables, decay
