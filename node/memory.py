"""How much memory training may take here, which tier fits into it, and which sizes would fit where none does."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from braniac.model.config import ModelConfig
from braniac.model.trainer import TrainSettings, memory_bytes_needed
from braniac.node.errors import ConfigError, ResourceError

SHARE_OF_FREE = 0.8
"""What a node takes of the free memory where nobody tells it."""
_SHORTEST_CONTEXT = 32
_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Fit:
    """Sizes of a training that fits."""

    tier: int
    batch: int
    context: int

    def __str__(self) -> str:
        return f"batch {self.batch} with context {self.context} at tier {self.tier}"


def free_memory_bytes() -> int:
    """What this process may take: free memory, or what its control groups leave, whichever is less."""
    own = psutil.Process().memory_info().rss
    return min(psutil.virtual_memory().available, *(limit - own for limit in group_limits(_OWN_GROUPS, _GROUPS)))


def group_limits(own: Path, groups: Path) -> Iterator[int]:
    """The memory limits, in bytes, of the control groups around a process, of whose list `own` is the file."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, place = line.split(":", 2)
        if not controllers:
            top, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            top, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = top / place.strip("/")
        # In a container the place may be the host's name of it; then only the topmost group is there.
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            try:
                yield int((folder / name).read_text())
            except (OSError, ValueError):  # not there, or "max"
                continue


def memory_left_bytes(cap_mib: int) -> int | None:
    """What a cap on this process's memory leaves to the trainer; None without a cap."""
    return cap_mib * 2**20 - psutil.Process().memory_info().rss if cap_mib else None


def usable_bytes(free_bytes: int, cap_bytes: int | None, wanted: int | None) -> int:
    """How much of the free memory training may take under a cap.

    All of it if somebody insists on a tier (`wanted`), else a part: the rest is for the person whose device this is.
    """
    usable = free_bytes if wanted is not None else int(free_bytes * SHARE_OF_FREE)
    return usable if cap_bytes is None else min(usable, cap_bytes)


def fits(
    config: ModelConfig, settings: TrainSettings, tiers: Sequence[int], limit_bytes: int, *, any_context: bool = False
) -> list[Fit]:
    """For each tier the largest batch that fits, up to the wanted one.

    With `any_context`, also the longest halving of the context that fits the wanted batch at the first of the tiers.
    """
    contexts = [config.context]
    while any_context and contexts[-1] // 2 >= _SHORTEST_CONTEXT:
        contexts.append(contexts[-1] // 2)
    sizes = [(tier, config.context) for tier in tiers]
    found = [fit for tier, context in sizes if (fit := _largest(config, settings, tier, context, limit_bytes))]
    shorter = (_largest(config, settings, tiers[0], context, limit_bytes) for context in contexts[1:])
    whole = (fit for fit in shorter if fit and fit.batch == settings.batch)
    return [*found, *([fit] if (fit := next(whole, None)) else [])]


def _largest(config: ModelConfig, settings: TrainSettings, tier: int, context: int, limit_bytes: int) -> Fit | None:
    config = dataclasses.replace(config, context=context)
    fitting, beyond = 0, settings.batch + 1
    while beyond - fitting > 1:
        batch = (fitting + beyond) // 2
        needed = memory_bytes_needed(config, tier, dataclasses.replace(settings, batch=batch))
        fitting, beyond = (batch, beyond) if needed <= limit_bytes else (fitting, batch)
    return Fit(tier, fitting, context) if fitting else None


def remedy(found: Sequence[Fit]) -> str:
    """What to do where the wanted sizes do not fit and these do."""
    if not found:
        return "not even batch 1 fits at any tier, so close other programs or train a smaller model"
    return f"what fits is {', or '.join(map(str, found))}"


def check_fits(config: ModelConfig, tier: int, settings: TrainSettings, free_bytes: int) -> None:
    """Refuse a training that does not fit, with the sizes that would. Raises ResourceError."""
    if memory_bytes_needed(config, tier, settings) > free_bytes:
        others = fits(config, settings, range(tier, config.tiers), free_bytes, any_context=True)
        raise _refusal(config, tier, settings, f"{_mib(free_bytes)} are free", remedy(others))


def choose_tier(
    wanted: int | Literal["auto"],
    config: ModelConfig,
    settings: TrainSettings,
    free_bytes: int,
    left_bytes: int | None = None,
) -> int:
    """The tier to train: the wanted one, or the largest that fits. Raises ConfigError, ResourceError.

    `left_bytes` is what the owner's cap leaves, all of which may be used; of what is free only a part may, unless the
    owner insists on a tier.
    """
    if wanted != "auto" and wanted >= config.tiers:
        raise ConfigError(f"this run has no tier {wanted}: choose one from 0 to {config.tiers - 1}, or --tier auto")
    asked = None if wanted == "auto" else wanted
    limit_bytes = usable_bytes(free_bytes, left_bytes, asked)
    first = asked or 0
    tiers = range(config.tiers) if asked is None else range(asked, asked + 1)
    for tier in tiers:
        if memory_bytes_needed(config, tier, settings) <= limit_bytes:
            return tier
    capped = left_bytes == limit_bytes
    room = f"caps.memory_mib leaves {_mib(limit_bytes)}" if capped else f"{_mib(limit_bytes)} may be used"
    advice = remedy(fits(config, settings, range(first, config.tiers), limit_bytes))
    raise _refusal(config, tiers[-1], settings, room, advice + (", or raise caps.memory_mib" if capped else ""))


def _refusal(config: ModelConfig, tier: int, settings: TrainSettings, room: str, advice: str) -> ResourceError:
    wanted = Fit(tier, settings.batch, config.context)
    needed = _mib(memory_bytes_needed(config, tier, settings))
    return ResourceError(f"training {wanted} takes {needed} and {room}: {advice}")


def _mib(count: int) -> str:
    return f"{max(0, count) / 2**20:,.0f} MiB"
