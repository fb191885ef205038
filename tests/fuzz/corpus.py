"""Writes the seeds of all targets: python -m tests.fuzz.corpus

Only seeds are replaced. What fuzzing has found lies beside them under names of its own, and stays.
"""

from __future__ import annotations

from tests.fuzz.corpus_files import CORPUS, SEED
from tests.fuzz.targets import every


def seed_files(name: str) -> dict[str, bytes]:
    """The seeds of a target by file name."""
    return {f"{SEED}{number}": data for number, data in enumerate(every()[name].seeds())}


def main() -> None:
    for name in every():
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{SEED}*"):
            old.unlink()
        for file, data in seed_files(name).items():
            (folder / file).write_bytes(data)


if __name__ == "__main__":
    main()
