"""The shape of a model: one frozen dataclass, strict because it also arrives from strangers, and a few presets.

Two families share it. `nanogpt` follows modded-nanogpt: norms without gain; QK-norm, ReLU squared and a logit soft-cap,
each of which can be switched off; value embeddings and skip connections, which can be switched on (what each is worth:
docs/LOG.md). `llama` computes what Hugging Face's `LlamaForCausalLM` does (norms with gain, SwiGLU, grouped queries):
each of its tiers is a stock model for anybody else's software. Field names are Hugging Face's where it has one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Literal, get_args

from braniac.model.errors import ConfigError

FAMILIES = ("nanogpt", "llama")

Precision = Literal["fp32", "lean"]
"""How a model is trained: everything in float32, or in a fraction of the memory (see lean.py)."""

Device = Literal["auto", "cpu", "cuda"]
"""Where a model is trained: auto takes a GPU if torch sees one."""

Activation = Literal["relu2", "gelu"]
"""What a neuron of the nanogpt family says: the square of what is positive of its input, or its GELU."""

# Upper bounds keep a hostile manifest from asking for absurd tables before anybody counts its parameters.
_INTEGER_BOUNDS = {
    "hidden_size": (2, 1 << 16),
    "num_hidden_layers": (1, 1 << 10),
    "num_attention_heads": (1, 1 << 10),
    "num_key_value_heads": (0, 1 << 10),
    "head_size": (0, 1 << 10),
    "intermediate_size": (1, 1 << 20),
    "vocab_size": (2, 1 << 18),
    "context": (1, 1 << 20),
    "matformer_factor": (1, 1 << 6),
    "value_embeddings": (0, 1 << 9),
}
_FLOAT_BOUNDS = {"logit_softcap": (0.0, 1e3), "rope_theta": (1.0, 1e9), "rms_norm_eps": (1e-12, 1e-2)}
_FLAGS = ("qk_norm", "embedding_norm", "zero_outputs", "skip_connections", "tie_word_embeddings", "nested_heads")
NANOGPT_SWITCHES = ("qk_norm", "embedding_norm", "activation", "value_embeddings", "skip_connections")
"""Fields that change what a nanogpt model computes; `LlamaForCausalLM` has no place for any of them."""
_TILE_SIDE = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """All that decides the parameters and the function of a model. Raises ConfigError for values that do not fit."""

    hidden_size: int
    """Width of the residual stream (D)."""

    num_hidden_layers: int
    """Transformer blocks."""

    num_attention_heads: int
    """Attention heads, which ask."""

    num_key_value_heads: int = 0
    """Heads that are asked: each answers an equal group of the attention heads. 0: one for each of them."""

    head_size: int = 0
    """Width of a head, an even number. 0: hidden_size / num_attention_heads."""

    intermediate_size: int
    """FFN neurons of the whole model (h), the width of tier 0."""

    vocab_size: int = 256
    """Distinct tokens; 256 for bytes."""

    context: int
    """Training window, in tokens; also the longest input of the model."""

    matformer_factor: int = 8
    """How many times narrower the smallest tier's FFN is, a power of two: 8 gives the four widths h, h/2, h/4, h/8."""

    family: str = "nanogpt"
    """nanogpt or llama."""

    logit_softcap: float = 15.0
    """nanogpt: logits are squeezed into (-softcap, softcap) by a tanh; 0: they are not. llama does not."""

    qk_norm: bool = True
    """nanogpt: whether queries and keys are RMS-normalised. llama does not."""

    embedding_norm: bool = True
    """nanogpt: whether embeddings are RMS-normalised. llama does not."""

    activation: Activation = "relu2"
    """nanogpt: what a neuron says, relu2 or gelu. llama: SwiGLU."""

    zero_outputs: bool = True
    """Whether output projections and head start at zero, and not at random."""

    value_embeddings: int = 0
    """nanogpt: tables of what each token adds to the values of attention. As many first layers have one each, and as
    many last layers the same ones again, in the same order: 0 1 ... 0 1."""

    skip_connections: bool = False
    """nanogpt: whether each layer of the second half also gets the input of its mirror image in the first half."""

    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""

    rope_scaling: tuple[float, ...] = ()
    """Llama 3's stretch of the frequencies: factor, low and high frequency factor, original context. Empty: none."""

    rms_norm_eps: float = 1e-6
    """llama: added to the mean square before its root is taken. nanogpt uses the smallest that float32 knows."""

    tie_word_embeddings: bool = False
    """Whether the head is the embedding matrix once more."""

    nested_heads: bool = False
    """Whether narrower widths also use fewer heads: a prefix of the key-value heads and of those that ask them."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(f"model.family is {self.family!r}: it must be one of {', '.join(FAMILIES)}.")
        for name in _FLAGS:
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"model.{name} is {getattr(self, name)!r}: it must be true or false.")
        for name, (low, high) in _INTEGER_BOUNDS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"model.{name} is {value!r}: it must be a whole number from {low} to {high}.")
        for name, (minimum, maximum) in _FLOAT_BOUNDS.items():
            value = getattr(self, name)
            if type(value) is not float or not minimum <= value <= maximum:  # NaN fails the comparison too
                raise ConfigError(f"model.{name} is {value!r}: it must be a number from {minimum:g} to {maximum:g}.")
        self._check_rope_scaling()
        self._check_heads()
        self._check_ingredients()
        if self.matformer_factor & (self.matformer_factor - 1):
            raise ConfigError(f"model.matformer_factor is {self.matformer_factor}: it must be a power of two.")
        if self.intermediate_size % self.matformer_factor:
            raise ConfigError(
                f"model.intermediate_size {self.intermediate_size} cannot be halved down to tier {self.tiers - 1}: "
                f"make it a multiple of model.matformer_factor ({self.matformer_factor})."
            )

    def _check_rope_scaling(self) -> None:
        values = self.rope_scaling
        plain = isinstance(values, tuple) and all(type(value) is float and 0 < value < 1e9 for value in values)
        if not plain or len(values) not in (0, 4):
            raise ConfigError(
                f"model.rope_scaling is {values!r}: it must be empty or four positive numbers "
                "(factor, low and high frequency factor, original context)."
            )
        if values and values[2] <= values[1]:
            raise ConfigError(f"model.rope_scaling is {values!r}: its third number must be larger than its second.")

    def _check_heads(self) -> None:
        if not self.head_size and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.hidden_size {self.hidden_size} cannot be split over {self.num_attention_heads} heads: "
                "make it a multiple of model.num_attention_heads."
            )
        if self.head_dim % 2:
            name = "head_size" if self.head_size else "hidden_size / model.num_attention_heads"
            raise ConfigError(f"model.{name} is {self.head_dim}: rotary positions need it even.")
        if self.num_attention_heads % self.kv_heads:
            raise ConfigError(
                f"model.num_attention_heads {self.num_attention_heads} cannot be grouped over {self.kv_heads} "
                "key-value heads: make it a multiple of model.num_key_value_heads."
            )
        if self.nested_heads and self.kv_heads % self.matformer_factor:
            raise ConfigError(
                f"model.nested_heads needs key-value heads that halve down to the smallest tier: "
                f"make their number ({self.kv_heads}) a multiple of model.matformer_factor ({self.matformer_factor})."
            )

    def _check_ingredients(self) -> None:
        if self.activation not in (known := get_args(Activation)):
            raise ConfigError(f"model.activation is {self.activation!r}: it must be one of {', '.join(known)}.")
        if 0 < self.logit_softcap < 1:
            raise ConfigError(f"model.logit_softcap is {self.logit_softcap:g}: it must be 0 (none), or at least 1.")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if self.family != "nanogpt" and field.name in NANOGPT_SWITCHES and value != field.default:
                raise ConfigError(
                    f"model.{field.name} is {value!r}: only the nanogpt family can have it so, leave it out."
                )
        pairs = self.num_hidden_layers // 2
        if self.value_embeddings > pairs or (self.skip_connections and not pairs):
            raise ConfigError(
                f"model.value_embeddings is {self.value_embeddings}, model.skip_connections {self.skip_connections}: "
                f"each takes two layers, and there are {self.num_hidden_layers}, so choose at most {pairs} tables."
            )
        if self.value_embeddings and self.nested_heads:
            raise ConfigError(
                "model.value_embeddings cannot be had with model.nested_heads, because layers that share a table would "
                "have to nest their heads in one order: choose one of the two."
            )

    @property
    def tiers(self) -> int:
        """How many tiers there are (T); tier 0 is the whole model, tier T-1 the smallest."""
        return int(math.log2(self.matformer_factor)) + 1

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_size or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        """Key-value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def gated(self) -> bool:
        """Whether the FFN is SwiGLU (three matrices) and not of one activation (two)."""
        return self.family == "llama"

    @property
    def softcap(self) -> float | None:
        """What logits are squeezed by; None if they are not."""
        return (self.logit_softcap or None) if self.family == "nanogpt" else None

    @property
    def normalises_heads(self) -> bool:
        """Whether there is QK-norm."""
        return self.family == "nanogpt" and self.qk_norm

    @property
    def normalises_embedding(self) -> bool:
        """Whether embeddings are RMS-normalised."""
        return self.family == "nanogpt" and self.embedding_norm

    @property
    def width_step(self) -> int:
        """What every FFN width in use must be a multiple of: a tile, or the largest power of two in the smallest."""
        smallest = self.intermediate_size // self.matformer_factor
        return min(_TILE_SIDE, smallest & -smallest)

    def to_dict(self) -> dict[str, int | float | str | bool | list[float]]:
        """All fields by name, ready for JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> ModelConfig:
        """Inverse of `to_dict`; refuses unknown keys, missing keys and wrong types with ConfigError."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                close = difflib.get_close_matches(str(key), fields, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(fields)}."
                raise ConfigError(f"the model configuration has no key {key!r}: {hint}")
        missing = [
            name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values
        ]
        if missing:
            raise ConfigError(f"the model configuration lacks {', '.join(missing)}: add the missing keys.")
        # JSON writers may drop the point of 15.0, and know no tuples; nothing else is converted.
        plain = {k: _as_float(v) if k in _FLOAT_BOUNDS else v for k, v in values.items()}
        if isinstance(scaling := plain.get("rope_scaling"), list):
            plain["rope_scaling"] = tuple(_as_float(v) for v in scaling)
        return cls(**plain)  # type: ignore[arg-type]  # __post_init__ checks every type


def _as_float(value: object) -> object:
    """A whole number as a float, where one can hold it; a larger one is out of every bound as it is."""
    return float(value) if type(value) is int and abs(value) < 1 << 53 else value


PRESETS = {
    # 0.46M parameters: learns the look of Python source within a minute on one core.
    "tiny": ModelConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, context=128
    ),
    # 10.8M parameters: a night on a few laptops.
    "small": ModelConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, context=256
    ),
    # GPT-2 small's shape with modded-nanogpt's untied head: 124M parameters without it, 162M with it.
    "nano-124m": ModelConfig(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        vocab_size=50304,
        context=1024,
    ),
    # 1.01 billion parameters; its tiers hold 1011M, 743M, 609M and 542M. For `precision: lean`.
    "nano-1b": ModelConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        intermediate_size=8192,
        vocab_size=50304,
        context=1024,
    ),
}
PRESETS |= {
    # The same sizes as what everybody's software can load: 0.56M and 13.2M parameters.
    "tiny-llama": dataclasses.replace(PRESETS["tiny"], family="llama", num_attention_heads=4, num_key_value_heads=2),
    "small-llama": dataclasses.replace(PRESETS["small"], family="llama", num_key_value_heads=2),
}
