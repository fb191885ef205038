"""All methods by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from functools import partial

from braniac.model.sources import Corpus
from outer.braniac import Braniac
from outer.demo import DeMo, DisTrO
from outer.dense import AllReduce, DiLoCo
from outer.muloco import MuLoCo
from outer.noloco import NoLoCo
from outer.sparseloco import SparseLoCo
from outer.streaming import StreamingDiLoCo
from outer.swarm import Plan, Swarm

Method = Callable[[Plan, Corpus], Swarm]

METHODS: dict[str, Method] = {
    "ddp": AllReduce,
    "averaging": partial(DiLoCo, rate=1.0, momentum=0.0),
    "diloco": DiLoCo,
    "streaming_diloco": StreamingDiLoCo,
    "muloco": MuLoCo,
    "sparseloco": SparseLoCo,
    "demo": DeMo,
    "distro": DisTrO,
    "noloco": NoLoCo,
    "braniac": Braniac,
}

FAILING = {"diloco_torchft": partial(DiLoCo, all_or_nothing=True)}
"""What differs only when peers drop out."""


def chosen(names: str, known: Sequence[str]) -> list[str]:
    """Methods named in a comma-separated list. Raises ValueError for one that is not known."""
    found = [name.strip() for name in names.split(",")]
    for name in found:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}."
            raise ValueError(f"there is no method {name!r}: {hint}")
    return found
