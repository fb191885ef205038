"""The shape of a model: one frozen dataclass, strict because it also arrives from strangers, and two presets."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping

from braniac.model.errors import ConfigError

# Upper bounds keep a hostile manifest from asking for absurd tables before anybody counts its parameters.
_INTEGER_BOUNDS = {
    "hidden_size": (2, 1 << 16),
    "num_hidden_layers": (1, 1 << 10),
    "num_attention_heads": (1, 1 << 10),
    "intermediate_size": (1, 1 << 20),
    "vocab_size": (2, 1 << 16),
    "context": (1, 1 << 20),
    "matformer_factor": (1, 1 << 6),
}
_FLOAT_BOUNDS = {"logit_softcap": (1.0, 1e3), "rope_theta": (1.0, 1e9)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """All that decides the parameters and the function of a model. Raises ConfigError for values that do not fit."""

    hidden_size: int
    """Width of the residual stream (D)."""

    num_hidden_layers: int
    """Transformer blocks."""

    num_attention_heads: int
    """Attention heads; each is hidden_size / num_attention_heads wide, which must be an even number."""

    intermediate_size: int
    """FFN neurons of the whole model (h), the width of tier 0."""

    vocab_size: int = 256
    """Distinct tokens; 256 for bytes."""

    context: int
    """Training window, in tokens; also the longest input of the model."""

    matformer_factor: int = 8
    """How many times narrower the smallest tier's FFN is, a power of two: 8 gives the four widths h, h/2, h/4, h/8."""

    logit_softcap: float = 15.0
    """Logits are squeezed into (-softcap, softcap) by a tanh."""

    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGER_BOUNDS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"model.{name} is {value!r}: it must be a whole number from {low} to {high}.")
        for name, (minimum, maximum) in _FLOAT_BOUNDS.items():
            value = getattr(self, name)
            if type(value) is not float or not minimum <= value <= maximum:  # NaN fails the comparison too
                raise ConfigError(f"model.{name} is {value!r}: it must be a number from {minimum:g} to {maximum:g}.")
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"model.hidden_size {self.hidden_size} cannot be split over {self.num_attention_heads} heads: "
                "make it a multiple of model.num_attention_heads."
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"model.hidden_size / model.num_attention_heads is {self.head_dim}: rotary positions need it even."
            )
        if self.matformer_factor & (self.matformer_factor - 1):
            raise ConfigError(f"model.matformer_factor is {self.matformer_factor}: it must be a power of two.")
        if self.intermediate_size % self.matformer_factor:
            raise ConfigError(
                f"model.intermediate_size {self.intermediate_size} cannot be halved down to tier {self.tiers - 1}: "
                f"make it a multiple of model.matformer_factor ({self.matformer_factor})."
            )

    @property
    def tiers(self) -> int:
        """How many tiers there are (T); tier 0 is the whole model, tier T-1 the smallest."""
        return int(math.log2(self.matformer_factor)) + 1

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def to_dict(self) -> dict[str, int | float]:
        """All fields by name, ready for JSON."""
        return dataclasses.asdict(self)

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
        # JSON writers may drop the point of 15.0; nothing else is converted.
        plain = {k: float(v) if k in _FLOAT_BOUNDS and type(v) is int else v for k, v in values.items()}
        return cls(**plain)  # type: ignore[arg-type]  # __post_init__ checks every type


PRESETS = {
    # 0.46M parameters: learns the look of Python source within a minute on one core.
    "tiny": ModelConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, context=128
    ),
    # 10.8M parameters: a night on a few laptops.
    "small": ModelConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536, context=256
    ),
}
