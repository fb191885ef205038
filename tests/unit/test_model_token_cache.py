"""The cache of tokens: the same bytes whoever made it, never half there, made again when damaged, small in memory."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from braniac.model.documents import PIECE_CHARACTERS, cut
from braniac.model.errors import DataError
from braniac.model.file_facts import FileFacts
from braniac.model.sources import FileText, TextSource
from braniac.model.token_cache import TokenCache
from braniac.model.tokenizer import ByteTokenizer
from tests.unit.texts import windows_hash, write_texts

ENTRY_FILES = ("entry.json", "held_out.tokens", "train.tokens")


@pytest.fixture
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_texts(tmp_path / "texts")
    return tmp_path / "texts"


def entries(cache_dir: Path) -> list[Path]:
    return sorted(path for path in cache_dir.iterdir() if path.is_dir())


class Counting(ByteTokenizer):
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.batches = 0

    def encode(self, texts):  # type: ignore[no-untyped-def]
        self.batches += 1
        return super().encode(texts)


def test_text_is_tokenised_once(folder: Path, cache_dir: Path) -> None:
    tokenizer = Counting()
    first = windows_hash(TextSource(cache_dir, (folder,), tokenizer=tokenizer).load(256))
    batches = tokenizer.batches
    assert batches > 0
    again = {windows_hash(TextSource(cache_dir, (folder,), tokenizer=tokenizer).load(256)) for _ in range(2)}
    assert again == {first}
    assert tokenizer.batches == batches
    (entry,) = entries(cache_dir)
    assert sorted(path.name for path in entry.iterdir()) == list(ENTRY_FILES)


def test_other_content_another_split_and_another_tokenizer_are_other_entries(folder: Path, cache_dir: Path) -> None:
    class Other(ByteTokenizer):
        name = "sha256:" + "0" * 64

    text = folder / "latin.txt"
    TextSource(cache_dir, (text,)).load(256)
    TextSource(cache_dir, (text,), tokenizer=Other()).load(256)
    TextSource(cache_dir, (folder,)).load(256)
    assert len(entries(cache_dir)) == 3
    text.rename(folder / "renamed.txt")
    TextSource(cache_dir, (folder / "renamed.txt",)).load(256)
    assert len(entries(cache_dir)) == 3  # the name decides nothing
    (folder / "renamed.txt").write_text("something else\n" * 99)
    TextSource(cache_dir, (folder / "renamed.txt",)).load(256)
    assert len(entries(cache_dir)) == 4


@pytest.mark.parametrize("name", ENTRY_FILES)
@pytest.mark.parametrize("damage", ["flipped", "shorter", "longer", "gone"])
def test_a_damaged_entry_is_made_again(folder: Path, cache_dir: Path, name: str, damage: str) -> None:
    def read() -> str:
        return windows_hash(TextSource(cache_dir, (folder,)).load(256))

    before, (entry,) = read(), entries(cache_dir)
    file = entry / name
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        flipped = bytes([whole[0] ^ 1]) + whole[1:]
        file.write_bytes({"flipped": flipped, "shorter": whole[:-1], "longer": whole + b"\0"}[damage])
    assert read() == before
    assert json.loads((entry / "entry.json").read_bytes())
    assert file.read_bytes() == whole


def test_every_process_reads_the_same_also_without_the_cache(folder: Path, tmp_path: Path, cache_dir: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from braniac.model.sources import TextSource\n"
        "from tests.unit.texts import windows_hash\n"
        "print(windows_hash(TextSource(Path(sys.argv[1]), (Path(sys.argv[2]),)).load(256)))"
    )
    mine = windows_hash(TextSource(cache_dir, (folder,)).load(256))
    for place in (cache_dir, tmp_path / "another cache"):
        command = [sys.executable, "-c", program, place, folder]
        root = Path(__file__).parents[2]
        found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=60)
        assert found.stdout.strip() == mine


def test_what_killed_processes_left_goes_and_what_others_make_stays(folder: Path, cache_dir: Path) -> None:
    dead, alive = cache_dir / ".making-dead", cache_dir / ".making-alive"
    for scratch in (dead, alive):
        scratch.mkdir()
        (scratch / "train.tokens").write_bytes(b"half")
    descriptor = os.open(alive, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    TextSource(cache_dir, (folder,)).load(256)
    assert not dead.exists()
    assert alive.exists()
    os.close(descriptor)


def test_an_entry_is_never_half_there(folder: Path, cache_dir: Path) -> None:
    class Failing(ByteTokenizer):
        def encode(self, texts):  # type: ignore[no-untyped-def]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TextSource(cache_dir, (folder,), tokenizer=Failing()).load(256)
    assert entries(cache_dir) == []
    with pytest.raises(DataError, match="was not read to its end"):
        TextSource(cache_dir, (folder,)).load(256, lambda: False)
    assert entries(cache_dir) == []


def test_a_faster_process_wins(folder: Path, cache_dir: Path) -> None:
    class Overtaken(ByteTokenizer):
        def encode(self, texts):  # type: ignore[no-untyped-def]
            TextSource(cache_dir, (folder,)).load(256)
            return super().encode(texts)

    corpus = TextSource(cache_dir, (folder,), tokenizer=Overtaken()).load(256)
    assert windows_hash(corpus) == windows_hash(TextSource(cache_dir, (folder,)).load(256))
    assert len(entries(cache_dir)) == 1


def test_text_that_changes_while_it_is_read_is_refused(folder: Path, cache_dir: Path) -> None:
    class Writing(ByteTokenizer):
        def encode(self, texts):  # type: ignore[no-untyped-def]
            (folder / "latin.txt").write_text("changed")
            return super().encode(texts)

    with pytest.raises(DataError, match=r"latin\.txt changed while it was read"):
        TextSource(cache_dir, (folder / "latin.txt",), tokenizer=Writing()).load(256)
    assert entries(cache_dir) == []


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"cannot be kept in .*file/cache \(Not a directory\): .* data\.cache_dir"):
        TextSource(tmp_path / "file" / "cache", (folder,)).load(256)


def test_memory_does_not_grow_with_the_text(tmp_path: Path, cache_dir: Path) -> None:
    def peak_bytes(megabytes: int) -> int:
        path = tmp_path / f"{megabytes}.txt"
        path.write_bytes(b"The quick brown fox jumps over the lazy dog.\n" * (megabytes * (1 << 20) // 45))
        tracemalloc.start()
        try:
            TextSource(cache_dir, (path,)).load(256)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak_bytes(4), peak_bytes(32)
    assert large < small + (1 << 20)
    assert large < 8 << 20


def test_tails_longer_than_a_block_are_moved_whole(tmp_path: Path, cache_dir: Path) -> None:
    text = "".join(f"{i}\n" for i in range(1_000_000))
    (tmp_path / "long.txt").write_text(text)
    (tmp_path / "short.txt").write_text("x" * 31)
    corpus = TextSource(cache_dir, (tmp_path / "long.txt", tmp_path / "short.txt")).load(256)
    whole, cut_at = text.encode() + b"\xff", len(text) + 1 - (len(text) + 1) // 16
    assert corpus.train[0].tobytes() == whole[:cut_at] + b"x" * 30
    assert corpus.held_out[0].tobytes() == whole[cut_at:] + b"x\xff"


def test_only_so_many_tokens_are_taken(cache_dir: Path) -> None:
    class Endless:
        name, tokens_max = "numbers", 3200

        def identity(self, facts: FileFacts) -> str:
            return "numbers"

        def documents(self) -> Iterator[str]:
            yield from (f"{number:06}" for number in range(1 << 60))

    corpus = TextSource(cache_dir, streams=(Endless(),)).load(256)
    assert (len(corpus.train[0]), len(corpus.held_out[0])) == (3000, 200)
    assert corpus.train[0][:14].tobytes() == b"000000\xff000001\xff"


def test_a_cache_answers_for_several_texts_in_their_order(tmp_path: Path, cache_dir: Path) -> None:
    texts = []
    for name, side in (("a", "train"), ("b", "held_out"), ("c", "train")):
        (tmp_path / name).write_text(name * 3)
        texts.append(FileText(tmp_path / name, side))  # type: ignore[arg-type]
    entry = TokenCache(cache_dir, FileFacts(cache_dir), lambda: True).open(texts, ByteTokenizer(), 16)
    assert entry.train.tokens.tobytes() == b"aaa\xffccc\xff"
    assert entry.held_out.tokens.tobytes() == b"bbb\xff"
    assert entry.train.tokens.dtype == np.uint8


@pytest.mark.parametrize("block", [1, 1000, 1 << 16, 1 << 30])
def test_pieces_depend_on_the_text_alone(block: int) -> None:
    lines = "".join(f"{i} " * (i % 50) + "\n" for i in range(4000))
    text = lines + "x" * (3 * PIECE_CHARACTERS) + lines
    pieces = list(cut(text[at : at + block] for at in range(0, len(text), block)))
    assert "".join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece) for piece, _ in pieces) <= PIECE_CHARACTERS
    assert pieces == list(cut([text]))
    assert pieces[0][0].endswith("\n")


def test_a_line_of_jsonl_has_a_limit(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("braniac.model.documents._LINE_BYTES_MAX", 100)
    (tmp_path / "a.jsonl").write_text('{"text": "short"}\n{"text": "' + "x" * 100 + '"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 2 is longer than 100 bytes"):
        TextSource(cache_dir, (tmp_path / "a.jsonl",)).load(256)
