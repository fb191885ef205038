"""Errors of the model side, drawn as a tree. This file imports no torch, so the command line can name them cheaply.

* ModelError
  x ConfigError        a model configuration that cannot be built, or a tier or fragment count that does not fit it
  x DataError          training text that is missing, too short, unreadable or malformed
  x CheckpointError    saved tensors that are not what the configuration says they must be
  x TrainingDiverged   a loss or a gradient that is not finite; the weights were left as they were

Every message is one sentence that names the cause and what would remedy it.
"""

from __future__ import annotations


class ModelError(Exception):
    """Root of everything `braniac.model` raises on purpose."""


class ConfigError(ModelError):
    """A model configuration that cannot be built."""


class DataError(ModelError):
    """Training text that cannot be used."""


class CheckpointError(ModelError):
    """Saved tensors that do not fit their configuration."""


class TrainingDiverged(ModelError):
    """A loss or gradient that is not finite."""
