"""Every decoder by name."""

from __future__ import annotations

import importlib

from tests.fuzz.target import Target

_MODULES = ("protocol_targets", "model_targets", "node_targets")


def find(name: str) -> Target:
    """One target, loading no more than it takes: what model/ and node/ stand on takes seconds."""
    for module in _MODULES:
        targets: dict[str, Target] = importlib.import_module(f"tests.fuzz.{module}").TARGETS
        if name in targets:
            return targets[name]
    raise KeyError(name)


def every() -> dict[str, Target]:
    """All targets."""
    return {n: t for module in _MODULES for n, t in importlib.import_module(f"tests.fuzz.{module}").TARGETS.items()}
