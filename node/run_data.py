"""What a run's manifest says about training, beyond what the protocol enforces: its `data`, read by every node.

A manifest comes from a stranger. A recipe that this version does not know in full is refused rather than followed in
part: a node that ignored a key would train otherwise than its run asks, and nobody would notice.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError

from braniac.model.tokenizer import BYTES, is_name
from braniac.model.trainer import TrainSettings
from braniac.node.config import Section
from braniac.node.errors import Incompatible
from braniac.node.settings_merge import expected_text
from braniac.protocol.manifest import Manifest

_DEFAULTS = TrainSettings()


def _tokenizer_name(text: str) -> str:
    if not is_name(text):
        raise ValueError("'bytes' or the SHA-256 of a tokenizer's file")
    return text


def _printable(text: str) -> str:
    if not text.isprintable():  # it is shown on strangers' terminals, which obey control characters
        raise ValueError("one line of printable characters")
    return text


Text = Annotated[str, Field(min_length=1, max_length=300), AfterValidator(_printable)]
"""A line for people."""


class OptimizerSpec(Section):
    """The inner optimizer of every node that does not set its own learning rate."""

    learning_rate: float = Field(default=_DEFAULTS.learning_rate, gt=0, le=10)
    """Muon's."""
    adam_learning_rate: float = Field(default=_DEFAULTS.adam_learning_rate, gt=0, le=10)
    """Adam's, for embedding and head."""
    warmup_steps: int = Field(default=_DEFAULTS.warmup_steps, ge=0, le=1_000_000)
    """Steps over which both rise from zero, on every node and after every start."""
    weight_decay: float = Field(default=_DEFAULTS.weight_decay, ge=0, le=1)
    """Each step shrinks the weights by learning rate times this."""


class RunData(Section):
    """The manifest's `data`."""

    tokenizer: Annotated[str, AfterValidator(_tokenizer_name)] = BYTES
    """`bytes`, or `sha256:` and the hash of the tokenizer.json with which everybody reads text."""
    text: Text | None = None
    """What the founder asks people to train on."""
    optimizer: OptimizerSpec = OptimizerSpec()

    def to_data(self) -> dict[str, Any]:
        """As it stands in a manifest: all of it, because the defaults of another version may be others."""
        return self.model_dump(exclude_none=True)


def run_data(manifest: Manifest) -> RunData:
    """The recipe of a run. Raises Incompatible for one that this version does not understand."""
    try:
        return RunData.model_validate(manifest.data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part)[:40] for part in first["loc"][:4])
        what = "is unknown to" if first["type"] == "extra_forbidden" else f"is not {expected_text(first)[:80]} for"
        raise Incompatible(
            f"the run's recipe cannot be followed: {key!r} {what} this version of braniac-node: install the founder's"
        ) from None
