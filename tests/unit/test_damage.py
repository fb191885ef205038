"""A flipped bit in every region of every file that a node relies on: noticed, and the file is named.

Generations fall back to the one before. A training text and a log are no files of that kind; checkpoints of `train`
and exported weights are as good as the medium they lie on, unless a tier manifest lists their hashes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from braniac.node import identity_file, run_file
from braniac.node.errors import ConfigError, IdentityFileError
from braniac.node.store import Store
from braniac.protocol.errors import VersionMismatch
from braniac.protocol.manifest import sign_manifest
from tests.unit.node_harness import identity, make_manifest
from tests.unit.test_store_crash import moments_of_a_node, opened, save

REGIONS = 300  # of a file; what is shorter is flipped in every byte


def flips(path: Path) -> Iterator[None]:
    """The file with one bit flipped in each region in turn, then cut, then longer; as it was at the end."""
    original = path.read_bytes()
    step = max(1, len(original) // REGIONS)
    for position in {*range(0, len(original), step), len(original) - 1}:
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        yield
    for data in (b"", original[:-1], original[: len(original) // 2], original + b"\0", bytes(len(original))):
        path.write_bytes(data)
        yield
    path.write_bytes(original)


def test_generations(tmp_path: Path) -> None:
    """Every file that only the newest generation needs: manifest, moved anchor, payload, weights, optimizer."""
    first, second = moments_of_a_node(tmp_path / "run", 2)
    root = tmp_path / "state"
    with opened(root) as store:
        save(store, first)
        before = set(root.rglob("*"))
        save(store, second)
        files = [path for path in sorted(set(root.rglob("*")) - before) if path.is_file()]
        assert len(files) == 5
    looking = Store.look(root)  # removes nothing, so that a file can be flipped again
    for path in files:
        for _ in flips(path):
            generation = looking.recover()
            assert generation is not None
            assert (generation.number, generation.content) == (1, first[0])
            [(number, reason)] = looking.skipped
            assert number == 2
            assert str(path) in reason
    generation = looking.recover()
    assert generation is not None
    assert generation.content == second[0]


def test_the_key(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    mine = identity_file.load_or_create(path)
    for _ in flips(path):
        with pytest.raises(IdentityFileError, match=str(path)):
            identity_file.load(path)
    assert identity_file.load(path).peer_id == mine.peer_id


def test_a_signed_run(tmp_path: Path) -> None:
    """Text that says the same in other bytes, such as another blank, is still the run that its founder signed."""
    path = tmp_path / "run.braniac"
    body, signature = sign_manifest(make_manifest(identity(0)), identity(0))
    run_file.write(path, body, signature, overwrite=False)
    refusals = []
    for _ in flips(path):
        try:
            assert run_file.read(path)[1] == (body, signature)
        except (ConfigError, VersionMismatch) as error:
            refusals.append(error)
    assert len(refusals) > REGIONS * 0.9
    # One bit may make it a run of another protocol version, and then that is what is said.
    assert all(isinstance(error, VersionMismatch) or str(path) in str(error) for error in refusals)
