"""What can be set about training on one device, without a swarm, and the model and the settings that it amounts to.

Every key of `model` and `objective` is a field of `ModelConfig` and `ObjectiveSettings`, which also judge its value;
`optimizer` and `train` share out `TrainSettings`. Defaults are those classes' own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from braniac.model.config import PRESETS, Activation, Device, ModelConfig, Precision
from braniac.model.objective import Mode, ObjectiveSettings
from braniac.model.trainer import TrainSettings, default_precision
from braniac.node.config import DataSection, Preset, Root, Section, UserPath
from braniac.node.errors import ConfigError

_TRAIN, _OBJECTIVE = TrainSettings(), ObjectiveSettings()
_STEPS = 1000


class ModelSection(Section):
    """The model: a preset and whatever should be different about it, or a checkpoint to start from."""

    preset: Preset = "tiny"
    """Where to start from: tiny has half a million parameters, small 11 to 13 million, nano-124m and nano-1b what they
    say; -llama ones are stock Llama."""
    folder: UserPath | None = None
    """Checkpoint folder to start from, weights and all; of the keys below only `context` can then be set."""
    family: Literal["nanogpt", "llama"] | None = None
    """nanogpt or llama; this and all below: not set means the preset's."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    num_hidden_layers: int | None = None
    """Transformer blocks."""
    num_attention_heads: int | None = None
    """Attention heads."""
    num_key_value_heads: int | None = None
    """Key-value heads, each shared by a group of attention heads; 0: as many as attention heads."""
    head_size: int | None = None
    """Width of an attention head; 0: hidden_size / num_attention_heads."""
    intermediate_size: int | None = None
    """FFN neurons of the widest tier."""
    vocab_size: int | None = None
    """Distinct tokens: 256 for text that is read as bytes; at least as many as `data.tokenizer` or .bin shards have."""
    context: int | None = None
    """Tokens in a training window."""
    matformer_factor: int | None = None
    """How many times narrower the smallest tier's FFN is, a power of two; 1: a dense model."""
    logit_softcap: float | None = None
    """nanogpt: bound of the logits; 0: none."""
    qk_norm: bool | None = None
    """nanogpt: whether queries and keys are normalised."""
    embedding_norm: bool | None = None
    """nanogpt: whether embeddings are normalised."""
    activation: Activation | None = None
    """nanogpt: what a neuron says, relu2 (ReLU squared) or gelu."""
    zero_outputs: bool | None = None
    """Whether output projections and head start at zero."""
    value_embeddings: int | None = None
    """nanogpt: tables of what each token adds to the values of attention, each for two layers."""
    skip_connections: bool | None = None
    """nanogpt: whether each layer of the second half also gets the input of its mirror image in the first."""
    rope_theta: float | None = None
    """Base of the rotary position frequencies."""
    rope_scaling: tuple[float, ...] = ()
    """Llama 3's four numbers: factor, low and high frequency factor, original context; empty: the preset's."""
    rms_norm_eps: float | None = None
    """llama: added to the mean square in every norm."""
    tie_word_embeddings: bool | None = None
    """Whether the head is the embedding matrix once more."""
    nested_heads: bool | None = None
    """Whether narrower tiers also use fewer attention heads."""

    @model_validator(mode="after")
    def _folder_knows_best(self) -> ModelSection:
        if self.folder is not None and (odd := sorted(self._changes().keys() - {"context"})):
            raise ConfigError(f"model.{odd[0]} and model.folder are both set: drop one, the folder has its own sizes")
        return self

    def _changes(self) -> dict[str, Any]:
        values = self.model_dump(exclude={"preset", "folder"})
        return {key: value for key, value in values.items() if value not in (None, ())}

    def build(self) -> ModelConfig:
        """The configuration of a new model. Raises the model's ConfigError for values that do not fit each other."""
        return dataclasses.replace(PRESETS[self.preset], **self._changes())


class ObjectiveSection(Section):
    """Which widths each step trains."""

    mode: Mode = _OBJECTIVE.mode
    """fixed: the whole tier; sampled: one width per step; sandwich: widest, narrowest and some between; joint: all
    tiers in each step; layers: a width per layer."""
    subwidth_fraction: float = _OBJECTIVE.subwidth_fraction
    """sampled, layers: share of the steps that train less than the whole tier."""
    sandwich_random: int = _OBJECTIVE.sandwich_random
    """sandwich: random tiers between the widest and the narrowest in each step."""
    mixed_maps: int = _OBJECTIVE.mixed_maps
    """joint, sandwich: random width maps in each step besides, each between two neighbouring tiers."""
    mixed_weight: float = _OBJECTIVE.mixed_weight
    """joint, sandwich: weight of each of those maps, in units of a tier's mean weight."""
    alphas: tuple[float, ...] = _OBJECTIVE.alphas
    """joint: weight of each tier's loss, the widest first; empty: all alike."""
    final_alphas: tuple[float, ...] = _OBJECTIVE.final_alphas
    """joint: weights at the end of the curriculum; empty: `alphas` throughout."""
    curriculum_steps: int = _OBJECTIVE.curriculum_steps
    """joint: steps over which the weights move from `alphas` to `final_alphas`."""
    kl_weight: float = _OBJECTIVE.kl_weight
    """joint, sandwich: how strongly narrower widths are pulled towards the distribution of the widest."""


class OptimizerSection(Section):
    """How far a step goes."""

    learning_rate: float = Field(default=_TRAIN.learning_rate, gt=0, le=10)
    """Muon's, for the matrices inside the blocks."""
    adam_learning_rate: float = Field(default=_TRAIN.adam_learning_rate, gt=0, le=10)
    """Adam's, for the embedding, the head and the gains of norms."""
    weight_decay: float = Field(default=_TRAIN.weight_decay, ge=0, le=10)
    """Each step shrinks the weights by learning rate times this."""
    warmup_steps: int = Field(default=_TRAIN.warmup_steps, ge=0)
    """Steps over which the learning rates rise from zero."""
    cooldown_fraction: float = Field(default=_TRAIN.cooldown_fraction, ge=0, le=1)
    """Last share of the training over which the learning rates fall to zero; 0: they stay."""


class TrainSection(Section):
    """What to train, how long, and how often to look."""

    tier: int = Field(default=0, ge=0)
    """How much of the model to train: 0 is all, each further tier halves the FFN."""
    steps: int | None = Field(default=None, ge=1)
    """Steps of the whole training; not set: `tokens` decides, else 1000."""
    tokens: int | None = Field(default=None, ge=1)
    """Length of the training in tokens, rounded up to whole steps."""
    batch: int = Field(default=_TRAIN.batch, ge=1, le=4096)
    """Windows per step."""
    precision: Precision | None = None
    """fp32, or lean: bfloat16 weights and a fraction of the memory; not set: lean from 100 million parameters on."""
    seed: int = Field(default=_TRAIN.seed, ge=0, lt=1 << 63)
    """Decides the first weights, the order of the text and all random choices."""
    device: Device = "auto"
    """cpu, cuda, or auto for a GPU if torch sees one."""
    threads: int | None = Field(default=None, ge=1, le=256)
    """CPU threads; not set: torch's own choice."""
    kept_layers: int | None = Field(default=None, ge=0)
    """Of so many last layers keep all that the backward pass needs, and compute the others twice: memory for time; not
    set: all of them in fp32, none in lean."""
    check_gradients: bool = _TRAIN.check_gradients
    """Assert in every step that no gradient leaked beyond the width in use."""
    report_every_steps: int = Field(default=10, ge=1)
    """Steps between two lines of progress."""
    evaluate_every_steps: int = Field(default=200, ge=0)
    """Steps between two evaluations on held-out text; 0: only at the end."""
    save_every_steps: int = Field(default=100, ge=0)
    """Steps between two checkpoints; 0: only at the end, or when stopped."""


class OutSection(Section):
    """Where the result goes."""

    dir: UserPath = Path("trained")
    """Folder for the checkpoints, each a folder step-N; the last two are kept."""


class TrainConfig(Root):
    """Everything that can be set about training on one device."""

    ENVIRONMENT_PREFIX: ClassVar[str] = "BRANIAC_TRAIN__"
    SHOWN_BY: ClassVar[str] = "braniac-node train --show-config"

    model: ModelSection = ModelSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    data: DataSection = Field(default_factory=DataSection)
    out: OutSection = OutSection()

    def steps(self, model: ModelConfig) -> int:
        """Steps of the whole training. Raises ConfigError if its length is given twice."""
        if self.train.tokens is None:
            return self.train.steps or _STEPS
        if self.train.steps is not None:
            raise ConfigError("train.steps and train.tokens are both set: choose one of them")
        return -(-self.train.tokens // (self.train.batch * model.context))

    def settings(self, model: ModelConfig) -> TrainSettings:
        """How the trainer is to train. Raises ConfigError, the model's too."""
        train = self.train
        return TrainSettings(
            **self.optimizer.model_dump(),
            batch=train.batch,
            precision=train.precision or default_precision(model),
            device=train.device,
            total_steps=self.steps(model),
            objective=ObjectiveSettings(**self.objective.model_dump()),
            kept_layers=train.kept_layers,
            seed=train.seed,
            check_gradients=train.check_gradients,
        )
