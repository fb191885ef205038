"""How a checkpoint's weights are sliced: `matformer_tier` and `matformer_base_intermediate_size` of a config.json.

Both keys describe the tensors in the file, never the tier that somebody trained at or asked for: a whole checkpoint
that was trained as tier 1 holds all neurons and says tier 0; a tier-1 file says tier 1 whatever it was loaded for.

    width = FFN neurons of the tensors themselves
    base  = the config's own base, else the manifest's, else width << the checkpoint's own tier, else width
    tier  = log2(base / width) if that is a whole number, else 0

Tier 0 is thus not the same as "whole": 768 of 1024 neurons are a slice of no tier. Ask `Slice.whole`.
The rule is psyche-elastic's, without its two errors: a base guessed from the command line, and an explicit tier that is
believed against the ratio of the widths.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from braniac.model.errors import CheckpointError

WIDTH_KEY = "intermediate_size"
TIER_KEY = "matformer_tier"
BASE_KEY = "matformer_base_intermediate_size"

MAX_WIDTH = 1 << 20
MAX_TIER = 20
_FOLDER_NAME = re.compile(r".+-tier([0-9]|1[0-9]|20)")


class CheckpointWarning(UserWarning):
    """A checkpoint that can be used although something it says about itself is wrong."""


@dataclass(frozen=True, slots=True)
class Slice:
    """What part of a model's FFN a checkpoint holds: its first `width` of `base` neurons."""

    tier: int
    """log2(base / width), or 0 if that is no whole number."""
    width: int
    base: int

    @property
    def whole(self) -> bool:
        """Whether every neuron is there, so that any tier can be sliced from it."""
        return self.width == self.base


def annotate(
    config: Mapping[str, object],
    *,
    width: int,
    manifest_base: int | None = None,
    folder_name: str | None = None,
) -> dict[str, object]:
    """The config.json to write beside tensors with `width` FFN neurons, given the one they were loaded with.

    `manifest_base` is the base that a tier manifest states; `folder_name` is that of the folder the tensors came from,
    not of the one they go to. A config of more neurons than `width` is taken for that of the model they were sliced
    from, if it or the manifest states the base. Raises CheckpointError if base, config and tensors contradict.
    """
    _check(width, "the width of the tensors")
    source = _positive(config, WIDTH_KEY)
    stated = _stated_base(config, manifest_base)
    sliced_from_source = source is not None and stated is not None and width < source <= stated
    if source is not None and source != width and not sliced_from_source:
        raise CheckpointError(
            f"config.json has {WIDTH_KEY} {source} but the tensors hold {width} neurons: "
            f"set it to {width}, or state in {BASE_KEY} the size that they were sliced from."
        )
    base = stated if stated is not None else _claimed_base(config, width, folder_name)
    if base < width:
        raise CheckpointError(
            f"config.json or its manifest has {BASE_KEY} {base} but the tensors hold {width} neurons: "
            f"make it {width} or more."
        )
    return {**config, WIDTH_KEY: width, TIER_KEY: tier_of(base, width), BASE_KEY: base}


def infer(
    config: Mapping[str, object],
    *,
    width: int | None = None,
    manifest_base: int | None = None,
    folder_name: str | None = None,
) -> Slice:
    """What the tensors beside this config.json hold; `width` is the tensors' own width where that is known.

    The ratio of the widths beats an explicit tier that contradicts it, with a CheckpointWarning; a base that is smaller
    than the width is dropped, with another. Raises CheckpointError if the width is unknown or not the config's, or if a
    key is no number in range.
    """
    source = _positive(config, WIDTH_KEY)
    if width is None:
        width = source
    if width is None:
        raise CheckpointError(f"config.json lacks {WIDTH_KEY!r}: set it to the number of FFN neurons in the tensors.")
    _check(width, "the width of the tensors")
    if source is not None and source != width:
        raise CheckpointError(
            f"config.json has {WIDTH_KEY} {source} but the tensors hold {width} neurons: "
            "use the config.json that was saved with them."
        )
    explicit = _explicit_tier(config)
    base = _stated_base(config, manifest_base)
    if base is None:
        base = _claimed_base(config, width, folder_name)
    elif base < width:
        _warn(f"{BASE_KEY} is {base} but the tensors hold {width} neurons: they are taken for a whole model.")
        base = width
    tier = tier_of(base, width)
    if explicit is not None and explicit != tier:
        _warn(f"config.json has {TIER_KEY} {explicit} but {width} of {base} neurons are tier {tier}, which is used.")
    return Slice(tier, width, base)


def tier_of(base: int, width: int) -> int:
    """The tier that the first `width` of `base` neurons are, 0 where they are all of them or no tier at all."""
    ratio, rest = divmod(base, width)
    return ratio.bit_length() - 1 if rest == 0 and ratio & (ratio - 1) == 0 else 0


def _stated_base(config: Mapping[str, object], manifest_base: int | None) -> int | None:
    """The base that the config states, else the manifest's, else None."""
    own = _positive(config, BASE_KEY)
    if manifest_base is not None:
        _check(manifest_base, f"the manifest's {BASE_KEY}")
        if own is not None and own != manifest_base:
            _warn(f"config.json has {BASE_KEY} {own}, which is used, but the manifest has {manifest_base}.")
    return own if own is not None else manifest_base


def _claimed_base(config: Mapping[str, object], width: int, folder_name: str | None) -> int:
    """The base that follows from the tier the checkpoint gives itself: in its config, else in its folder's name."""
    tier = _explicit_tier(config)
    if tier is None and folder_name is not None:
        match = _FOLDER_NAME.fullmatch(folder_name)
        tier = int(match[1]) if match else None
    base = width << (tier or 0)
    _check(base, f"the base of tier {tier} with {width} neurons")
    return base


def _explicit_tier(config: Mapping[str, object]) -> int | None:
    value = config.get(TIER_KEY)
    if value is None:
        return None
    if type(value) is not int or not 0 <= value <= MAX_TIER:
        raise CheckpointError(
            f"config.json has {TIER_KEY} {value!r}: it must be a whole number from 0 to {MAX_TIER}, or absent."
        )
    return value


def _positive(config: Mapping[str, object], key: str) -> int | None:
    value = config.get(key)
    return None if value is None else _check(value, f"config.json's {key}")


def _check(value: object, what: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_WIDTH:
        raise CheckpointError(f"{what} is {value!r}: it must be a whole number from 1 to {MAX_WIDTH}.")
    return value


def _warn(message: str) -> None:
    warnings.warn(message, CheckpointWarning, stacklevel=3)
