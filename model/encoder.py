"""A small vision transformer whose feed-forward blocks are MatFormer-nested, and a contrastive trainer for it.

The encoder maps an image to a point on the unit sphere. All widths share patches, attention and projection, and the
FFN neurons of a narrow width are a prefix of those of a wide one, so after joint training the widths agree on what lies
close to what: `retrieval.py` measures how well. MatViT of MatFormer (Devvrit et al. 2023, arXiv 2310.07707) on the
vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929).

What is unusual for a vision transformer: as in nanogpt, norms have no gain, nothing has a bias, the FFN is ReLU squared
and output projections start at zero. The patches' mean is used instead of a class token.

Shape legend: B = images, C = channels, S = image side, T = patches, P = values of a patch, D = hidden size, N = heads,
K = head width, E = embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braniac.model.errors import ConfigError, TrainingDiverged
from braniac.model.ffn import MatFormerFFN, Matrix
from braniac.model.muon import orthogonalize
from braniac.model.optim import MOMENTUM
from braniac.model.tiers import WidthMap


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """All that decides the parameters and the function of an encoder. Raises ConfigError for values that do not fit."""

    image_size: int
    """Side of the square images, in pixels."""

    patch_size: int
    """Side of the square patches, in pixels; divides image_size."""

    num_channels: int = 1
    """Colours of a pixel."""

    hidden_size: int
    """Width of the residual stream (D)."""

    num_hidden_layers: int
    """Transformer blocks."""

    num_attention_heads: int
    """Attention heads; divides hidden_size."""

    intermediate_size: int
    """FFN neurons of the whole encoder (h)."""

    matformer_factor: int = 8
    """How many times narrower the smallest FFN is, a power of two: 8 gives the four widths h, h/2, h/4, h/8."""

    embedding_size: int
    """Dimensions of the embedding (E)."""

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"encoder.{name} is {value!r}: it must be a whole number of at least 1.")
        if self.matformer_factor & (self.matformer_factor - 1):
            raise ConfigError(f"encoder.matformer_factor is {self.matformer_factor}: it must be a power of two.")
        for whole, part in (
            ("image_size", "patch_size"),
            ("hidden_size", "num_attention_heads"),
            ("intermediate_size", "matformer_factor"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(
                    f"encoder.{whole} {getattr(self, whole)} cannot be divided by encoder.{part}: "
                    f"make it a multiple of {getattr(self, part)}."
                )

    @property
    def patches(self) -> int:
        """Patches of an image (T)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def widths(self) -> tuple[int, ...]:
        """FFN neurons of all tiers, the whole encoder first."""
        return tuple(self.intermediate_size >> tier for tier in range(self.matformer_factor.bit_length()))


class BidirectionalAttention(nn.Module):
    """Multi-head self-attention in which every patch sees every other."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = Matrix(hidden_size, hidden_size)
        self.k_proj = Matrix(hidden_size, hidden_size)
        self.v_proj = Matrix(hidden_size, hidden_size)
        self.o_proj = Matrix(hidden_size, hidden_size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        q_BNTK, k_BNTK, v_BNTK = (
            projection(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        y_BNTK = F.scaled_dot_product_attention(q_BNTK, k_BNTK, v_BNTK)
        out: Tensor = self.o_proj(y_BNTK.transpose(1, 2).flatten(2))
        return out


class EncoderBlock(nn.Module):
    """One transformer layer: attention and FFN, each on a normalised copy, each added to the residual stream."""

    def __init__(self, config: EncoderConfig, neurons: int) -> None:
        super().__init__()
        self.self_attn = BidirectionalAttention(config.hidden_size, config.num_attention_heads)
        self.mlp = MatFormerFFN(config.hidden_size, neurons)

    def forward(self, x_BTD: Tensor, width: int) -> Tensor:
        """[B, T, D] -> [B, T, D]"""
        x_BTD = x_BTD + self.self_attn(_rms_norm(x_BTD))
        x_BTD = x_BTD + self.mlp(_rms_norm(x_BTD), width)
        return x_BTD


class Encoder(nn.Module):
    """Images to unit vectors. All zero until `init_weights` or until weights are loaded into it."""

    def __init__(self, config: EncoderConfig, *, neurons: Sequence[int] | None = None) -> None:
        """`neurons` holds one FFN width per layer; all of them if not given."""
        super().__init__()
        self.config = config
        whole = (config.intermediate_size,) * config.num_hidden_layers
        self.neurons = whole if neurons is None else tuple(neurons)
        d = config.hidden_size
        self.embed_patches = Matrix(d, config.num_channels * config.patch_size**2)
        self.embed_positions = Matrix(config.patches, d)
        self.layers = nn.ModuleList(EncoderBlock(config, count) for count in self.neurons)
        self.embedding_proj = Matrix(config.embedding_size, d)

    def init_weights(self, seed: int) -> None:
        """First weights, decided by configuration, held widths and seed alone."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in self.named_parameters():
                if ".o_proj." in name or ".down_proj." in name:
                    p.zero_()
                else:
                    p.normal_(std=p.shape[1] ** -0.5, generator=generator)

    def layer_widths(self, width: WidthMap) -> tuple[int, ...]:
        """One checked width per layer. Raises ConfigError for a width, or a number of them, that does not fit."""
        if width is None:
            return self.neurons
        widths = (width,) * len(self.neurons) if isinstance(width, int) else tuple(width)
        if len(widths) != len(self.neurons):
            raise ConfigError(
                f"the width map has {len(widths)} widths: give one for each of {len(self.neurons)} layers."
            )
        smallest = self.config.widths[-1]
        for layer, (asked, held) in enumerate(zip(widths, self.neurons, strict=True)):
            if not smallest <= asked <= held:
                raise ConfigError(f"FFN width {asked} in layer {layer}: choose one from {smallest} to {held}.")
        return widths

    def forward(self, images_BCSS: Tensor, width: WidthMap = None) -> Tensor:
        """[B, C, S, S] -> [B, E] of length one, using the first `width` FFN neurons of each layer (None: all held)."""
        c = self.config
        expected = (c.num_channels, c.image_size, c.image_size)
        assert images_BCSS.shape[1:] == expected, f"images of {tuple(images_BCSS.shape[1:])} instead of {expected}"
        widths = self.layer_widths(width)
        patches_BTP = F.unfold(images_BCSS, kernel_size=c.patch_size, stride=c.patch_size).mT
        x_BTD = self.embed_patches(patches_BTP) + self.embed_positions.weight
        for block, neurons in zip(self.layers, widths, strict=True):
            x_BTD = block(x_BTD, neurons)
        pooled_BD = _rms_norm(x_BTD).mean(1)
        return F.normalize(self.embedding_proj(pooled_BD), dim=-1)

    def extract(self, width: WidthMap) -> Encoder:
        """A copy that holds only the first `width` FFN neurons of each layer and computes what they compute here."""
        part = Encoder(self.config, neurons=self.layer_widths(width))
        with torch.no_grad():
            for copy, original in zip(part.parameters(), self.parameters(), strict=True):
                copy.copy_(original[: len(copy)])
        return part


def contrastive_loss(first_BE: Tensor, second_BE: Tensor, temperature: float = 0.1) -> Tensor:
    """Symmetric InfoNCE, in nats: row i of either side shall find row i of the other among all B (Radford et al. 2021,
    arXiv 2103.00020, with a fixed temperature)."""
    logits_BB = first_BE @ second_BE.T / temperature
    targets_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, targets_B) + F.cross_entropy(logits_BB.T, targets_B)) / 2


def train_encoder(
    encoder: Encoder,
    pairs: Callable[[int], tuple[Tensor, Tensor]],
    widths: Sequence[WidthMap],
    *,
    steps: int,
    learning_rate: float = 0.05,
) -> list[float]:
    """Train all `widths` at once, in place, and return the loss of each step: the mean over the widths, in nats.

    `pairs(step)` gives two batches [B, C, S, S] whose rows i show the same thing. No term compares two widths: each
    width only tells its own embeddings apart, and shared weights alone make them agree. One width is plain training.
    The optimizer is Muon (see `optim.py`), its learning rate falls linearly to zero.
    Raises TrainingDiverged, with the weights as before the step, if the loss is not finite.
    """
    momenta = [torch.zeros_like(p) for p in encoder.parameters()]
    losses = []
    for step in range(steps):
        both = torch.cat(pairs(step))
        encoder.zero_grad()
        total = 0.0
        for width in widths:
            # One backward pass per width keeps the activations of one width in memory, not of all.
            loss = contrastive_loss(*encoder(both, width).chunk(2)) / len(widths)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.item()
        if not math.isfinite(total):
            raise TrainingDiverged(f"the loss is {total} at step {step}: lower the learning rate or check the images.")
        _muon_step(encoder, momenta, learning_rate * (1 - step / steps))
        losses.append(total)
    return losses


@torch.no_grad()
def _muon_step(encoder: Encoder, momenta: Sequence[Tensor], learning_rate: float) -> None:
    # Rows beyond all widths have zero gradients and zero momenta, which stay zero when orthogonalised: they rest.
    for p, momentum in zip(encoder.parameters(), momenta, strict=True):
        assert p.grad is not None
        momentum.lerp_(p.grad, 1 - MOMENTUM)
        p.add_(orthogonalize(p.grad.lerp(momentum, MOMENTUM)[None])[0], alpha=-learning_rate)


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))
