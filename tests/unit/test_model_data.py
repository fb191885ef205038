"""Text sources, the held-out split, and batches as a pure function of seed, peer and step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from braniac.model.data import Batches
from braniac.model.errors import DataError
from braniac.model.sources import Corpus, TextSource
from braniac.model.tokenizer import SEPARATOR, ByteTokenizer
from tests.unit.texts import windows_hash, write_shard, write_texts


def corpus_of(*lengths: int) -> Corpus:
    arrays = tuple(np.arange(n, dtype=np.uint16) for n in lengths)
    return Corpus("numbers", arrays, arrays)


Load = Callable[..., Corpus]


@pytest.fixture
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def load(cache_dir: Path) -> Load:
    """Reads paths as a model of 256 tokens does, unless told otherwise."""

    def load(*paths: Path, vocab_size: int = 256) -> Corpus:
        return TextSource(cache_dir, paths).load(vocab_size)

    return load


def test_a_batch_is_a_pure_function_of_seed_peer_and_step() -> None:
    def draw(seed: int, peer: bytes, step: int) -> torch.Tensor:
        return Batches(corpus_of(5000), seed, peer, context=16, batch=4).batch(step)[0]

    batches = Batches(corpus_of(5000), 1, b"a", context=16, batch=4)
    for earlier in range(5):
        batches.batch(earlier)
    assert torch.equal(batches.batch(5)[0], draw(1, b"a", 5))
    others = [draw(2, b"a", 5), draw(1, b"b", 5), draw(1, b"a", 6)]
    assert not any(torch.equal(other, draw(1, b"a", 5)) for other in others)


def test_targets_are_the_tokens_shifted_by_one() -> None:
    tokens, targets = Batches(corpus_of(100), 0, b"", context=10, batch=3).batch(0)
    assert tokens.shape == targets.shape == (3, 10)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, tokens + 1)


def test_windows_reach_every_place_of_every_array_and_span_none() -> None:
    batches = Batches(corpus_of(8, 3, 12), 0, b"", context=4, batch=4)
    drawn = {tuple(row) for step in range(60) for row in batches.batch(step)[0].tolist()}
    assert drawn == {tuple(range(i, i + 4)) for i in range(8)}  # 4 places in the first, 8 in the last


def test_held_out_windows_are_evenly_spaced_and_the_same_for_all_peers() -> None:
    one, two = (Batches(corpus_of(1000), seed, peer, 10, 2).held_out(5) for seed, peer in ((0, b"a"), (9, b"b")))
    assert one[0][:, 0].tolist() == [0, 198, 396, 594, 792]
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


def test_too_little_text_is_refused_with_both_numbers() -> None:
    with pytest.raises(DataError, match=r"numbers holds 32 tokens .* at least 33 \(4 windows of 8\)"):
        Batches(corpus_of(32), 0, b"", context=8, batch=4)
    Batches(corpus_of(33), 0, b"", context=8, batch=4).batch(0)
    with pytest.raises(DataError, match="holds 0 tokens"):
        Batches(corpus_of(), 0, b"", context=8, batch=4)


def test_too_little_held_out_text_is_refused() -> None:
    batches = Batches(Corpus("x", (np.zeros(100, np.uint8),), (np.zeros(8, np.uint8),)), 0, b"", 8, 1)
    with pytest.raises(DataError, match="x leaves 8 tokens held out: evaluation needs one window of 9"):
        batches.held_out(4)


def test_the_standard_library_is_there_and_split(load: Load) -> None:
    corpus = load()
    (train,), (held_out,) = corpus.train, corpus.held_out
    assert len(train) > 3_000_000
    assert 0.02 < len(held_out) / len(train) < 0.15
    assert b"import" in train[:100_000].tobytes()


def test_folders_are_split_by_the_hash_of_the_relative_path(tmp_path: Path, load: Load) -> None:
    for i in range(100):
        path = tmp_path / f"sub{i % 3}" / f"{i}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"<{i}>")
    (tmp_path / "picture.png").write_bytes(b"no text")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "a.txt").write_text("hidden")
    corpus = load(tmp_path)
    expected = {str(i) for i in range(100) if hashlib.sha256(f"sub{i % 3}/{i}.txt".encode()).digest()[0] % 16 == 0}
    found = ByteTokenizer().decode(corpus.held_out[0].tolist()).strip("<>").split("><")
    assert set(found) == expected
    assert len(ByteTokenizer().decode(corpus.train[0].tolist()).split("><")) == 100 - len(expected)


def test_a_single_file_gives_its_last_sixteenth(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "book.anything"
    path.write_bytes(bytes(range(32, 127)) * 16)
    corpus = load(path)
    assert len(corpus.train[0]) + len(corpus.held_out[0]) == 95 * 16 + 1
    assert len(corpus.held_out[0]) == 95
    assert corpus.held_out[0][-1] == SEPARATOR


def test_text_that_is_not_utf8_cannot_forge_a_separator(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"a\xffb" * 100)
    corpus = load(path)
    everything = np.concatenate((*corpus.train, *corpus.held_out))
    assert (everything == SEPARATOR).sum() == 1


def test_jsonl_lines_are_documents(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"line {i}", "id": i}) + "\n\n" for i in range(4)))
    corpus = load(path)
    everything = np.concatenate((*corpus.train, *corpus.held_out)).tobytes()
    assert everything == b"line 0\xffline 1\xffline 2\xffline 3\xff"


@pytest.mark.parametrize(("line", "sentence"), [("{", "line 2 is not JSON"), ("[1]", 'line 2 lacks "text"')])
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, sentence: str, load: Load) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=sentence):
        load(path)


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path, load: Load) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no readable text files"):
        load(tmp_path)


# --- what a peer reads stays what it reads ---------------------------------------------------------------------------

GOLDEN = {
    "folder": "a9d4904f4a2d75d4",
    "file": "baedf6a411169c61",
    "jsonl": "7698dadfde9cac5b",
    "files": "888f1076121a7191",
    "shards": "a4855245b4e430b1",
    "mixed": "a44739b455c3daeb",
    "tails": "925ff387981ce070",
}


@pytest.mark.parametrize("case", GOLDEN)
def test_the_windows_of_a_peer_never_change(case: str, tmp_path: Path, load: Load) -> None:
    folder, a, b = tmp_path / "folder", tmp_path / "a.bin", tmp_path / "b.bin"
    write_texts(folder)
    write_shard(a, [i * i % 251 for i in range(300)])
    write_shard(b, [i * 7 % 256 for i in range(100)])
    paths = {
        "folder": (folder,),
        "file": (folder / "latin.txt",),
        "jsonl": (folder / "records.jsonl",),
        "files": (folder / "part0" / "33.txt", folder / "records.jsonl", folder / "empty.txt"),
        "shards": (a, b),
        "mixed": (a, folder, b),
        "tails": (b, folder / "latin.txt"),
    }
    assert windows_hash(load(*paths[case])) == GOLDEN[case]
