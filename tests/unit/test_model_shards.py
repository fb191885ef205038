"""Token shards: mapped in place, checked to the byte, refused or left out."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from braniac.model.data import Batches
from braniac.model.errors import DataError
from braniac.model.file_facts import FileFacts
from braniac.model.shards import HEADER_BYTES, Shard, map_tokens, read_shard
from braniac.model.sources import BadShards, Corpus, TextSource
from tests.unit.texts import write_shard

PAGE = mmap.PAGESIZE


@pytest.fixture
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def load(cache_dir: Path, *paths: Path, vocab_size: int = 256, bad_shards: BadShards = "refuse") -> Corpus:
    return TextSource(cache_dir, paths, bad_shards=bad_shards).load(vocab_size)


def resident_pages(path: Path) -> int:
    """How many pages of a file this process has mapped and touched, by the kernel."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024 // PAGE
    return found


def test_shards_are_mapped_and_never_joined(tmp_path: Path, cache_dir: Path) -> None:
    write_shard(tmp_path / "a.bin", list(range(32)))
    write_shard(tmp_path / "b.bin", list(range(1000, 1064)))
    corpus = load(cache_dir, tmp_path / "a.bin", tmp_path / "b.bin", vocab_size=50304)
    assert [len(tokens) for tokens in corpus.train] == [30, 60]
    assert corpus.held_out[1].tolist() == [1060, 1061, 1062, 1063]
    tokens, _ = Batches(corpus, 0, b"", context=8, batch=4).batch(0)
    assert tokens.shape == (4, 8)


def test_tokens_of_four_bytes_are_read_too(tmp_path: Path, cache_dir: Path) -> None:
    write_shard(tmp_path / "a.bin", [100_000 + i for i in range(32)], magic=20240801, version=7)
    assert load(cache_dir, tmp_path / "a.bin", vocab_size=128_256).train[0].tolist() == [100_000 + i for i in range(30)]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells which pages are resident")
def test_a_window_reads_its_own_pages_and_gives_them_back(tmp_path: Path) -> None:
    path = tmp_path / "big.bin"
    write_shard(path, [7] * (2000 * PAGE // 2))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # so that nothing of it is at hand
    mapping = read_shard(path).map()
    assert int(mapping.tokens[1000 * PAGE // 2 : 1000 * PAGE // 2 + 100].sum()) == 700
    assert 1 <= resident_pages(path) <= 2
    mapping.release()
    assert resident_pages(path) == 0
    assert int(mapping.tokens[-1]) == 7


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"magic": 5}, r"a\.bin begins at byte 0 with magic 5 and version 1 where 20240520 and 1 or 20240801 and 7"),
        ({"version": 2}, r"with magic 20240520 and version 2"),
        ({"extra": 1}, r"ends at byte 1030, and by the 4 tokens of its header \(byte 8\) at byte 1032: make it again"),
        ({"extra": -9}, r"and by the -6 tokens of its header"),
    ],
)
def test_a_bad_shard_header_is_named(tmp_path: Path, cache_dir: Path, change: dict[str, int], sentence: str) -> None:
    write_shard(tmp_path / "a.bin", [1, 2, 3], **change)
    with pytest.raises(DataError, match=sentence):
        load(cache_dir, tmp_path / "a.bin")


def test_truncated_odd_and_empty_shards(tmp_path: Path, cache_dir: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"short")
    with pytest.raises(DataError, match="ends at byte 5, inside the header of 1024 bytes"):
        load(cache_dir, path)
    write_shard(path, [1, 2, 3])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="ends at byte 1029, in the middle of a token of 2 bytes"):
        load(cache_dir, path)
    write_shard(path, [])
    assert load(cache_dir, path).train == ()


def test_a_token_beyond_the_vocabulary_is_named_with_its_byte(tmp_path: Path, cache_dir: Path) -> None:
    path, far = tmp_path / "a.bin", (1 << 19) + 5  # in the second block
    write_shard(path, [255] * far + [300, 999])
    with pytest.raises(
        DataError,
        match=rf"a\.bin holds token 300 at byte {1024 + 2 * far}, and .* ends at 255: .* data\.bad_shards=skip\.$",
    ):
        load(cache_dir, path)
    assert len(load(cache_dir, path, vocab_size=1000).train) == 1


def test_bad_shards_are_left_out_if_that_is_wanted(tmp_path: Path, cache_dir: Path) -> None:
    for name, tokens in (("a", [1, 300]), ("b", [7] * 64), ("c", [2])):
        write_shard(tmp_path / f"{name}.bin", tokens, extra=int(name == "c"))
    corpus = load(cache_dir, tmp_path, bad_shards="skip")
    assert [tokens.tolist() for tokens in corpus.train] == [[7] * 60]
    first, second = corpus.skipped
    assert "a.bin holds token 300 at byte 1026" in first
    assert "c.bin ends at byte 1026" in second
    with pytest.raises(DataError, match=r"holds no shard that can be used: .*c\.bin ends at byte 1026"):
        load(cache_dir, tmp_path / "c.bin", bad_shards="skip")


def test_tokens_are_looked_at_once_for_each_version_of_a_file(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks, real = [], Shard.largest

    def largest(shard: Shard) -> int:
        looks.append(shard.path.name)
        return real(shard)

    monkeypatch.setattr(Shard, "largest", largest)
    path = tmp_path / "a.bin"
    write_shard(path, [1, 2, 3] * 20)
    for _ in range(3):
        load(cache_dir, path)
    assert looks == ["a.bin"]
    write_shard(path, [300, 2, 3] * 20)
    with pytest.raises(DataError, match="holds token 300 at byte 1024"):
        load(cache_dir, path)
    assert len(looks) == 2


def test_what_is_remembered_of_files_survives_damage_and_other_writers(tmp_path: Path, cache_dir: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    first, second = FileFacts(cache_dir), FileFacts(cache_dir)
    assert first.ask(one, "size", lambda: 11) == 11
    assert second.ask(two, "size", lambda: 22) == 22
    first.save()
    second.save()
    again = FileFacts(cache_dir)
    assert [again.ask(path, "size", lambda: 0) for path in (one, two)] == [11, 22]
    one.write_bytes(b"longer")
    assert again.ask(one, "size", lambda: 6) == 6
    two.unlink()
    again.save()
    assert str(two) not in (cache_dir / "files.json").read_text()
    for damage in (b"{", b"[]", b'{"format": 1, "files": {"x": {}}}'):
        (cache_dir / "files.json").write_bytes(damage)
        assert FileFacts(cache_dir).ask(one, "size", lambda: 1) == 1


def test_a_file_that_is_too_short_is_not_mapped(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(10))
    with pytest.raises(ValueError, match="greater than file size"):
        map_tokens(tmp_path / "a", np.dtype("u1"), 11)


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, [1, 2, 3])
    shard = read_shard(path)
    path.write_bytes(path.read_bytes()[: HEADER_BYTES + 2])
    with pytest.raises(DataError, match="ends at byte 1026 although it was longer before"):
        shard.largest()
