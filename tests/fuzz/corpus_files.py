"""Where the corpora lie: a folder per target. Loads nothing, because the runner only wants the names."""

from __future__ import annotations

from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
SEED = "seed-"


def names() -> list[str]:
    """Every target."""
    return sorted(path.name for path in CORPUS.iterdir())


def inputs(name: str) -> list[Path]:
    """The corpus of a target: what begins with SEED is made by corpus.py, all else was found by fuzzing."""
    return sorted((CORPUS / name).iterdir())
