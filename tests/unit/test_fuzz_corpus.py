"""The corpora of the fuzz targets, replayed without a fuzzer: whatever once broke a decoder never does again."""

from __future__ import annotations

import tracemalloc

import pytest

from tests.fuzz.corpus import seed_files
from tests.fuzz.corpus_files import SEED, inputs, names
from tests.fuzz.targets import every

TARGETS = every()
MEMORY_BYTES_MAX = 32 << 20  # that decoding one input may take at its peak


def test_every_target_has_a_corpus() -> None:
    assert names() == sorted(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus(name: str) -> None:
    target, taken = TARGETS[name], {}
    for path in inputs(name):
        data = path.read_bytes()
        assert len(data) <= target.bytes_max, path
        tracemalloc.start()
        try:
            taken[path.name] = target.run(data)
            assert tracemalloc.get_traced_memory()[1] < MEMORY_BYTES_MAX, path
        finally:
            tracemalloc.stop()
    assert taken[f"{SEED}0"], "the first seed shows that the target accepts what is good"


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_are_those_of_the_script(name: str) -> None:
    """If a format has changed: python -m tests.fuzz.corpus"""
    in_repository = {path.name: path.read_bytes() for path in inputs(name) if path.name.startswith(SEED)}
    assert in_repository == seed_files(name)


@pytest.mark.parametrize("name", TARGETS)
def test_cut_and_spoilt_seeds_are_refused_or_harmless(name: str) -> None:
    """What a fuzzer tries first, so that a target cannot break without anybody running one."""
    target = TARGETS[name]
    for data in seed_files(name).values():
        step = max(1, len(data) // 60)
        for position in range(0, len(data), step):
            target.run(data[:position])
            spoilt = bytearray(data)
            spoilt[position] ^= 1 << position % 8
            target.run(bytes(spoilt))


@pytest.mark.parametrize("name", TARGETS)
def test_nesting_has_an_end(name: str) -> None:
    """Deeper than Python's parsers follow; a fuzzer hardly gets there."""
    for opening in (b"[", b'{"a":'):
        TARGETS[name].run(opening * 2000)
