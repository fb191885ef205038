"""Tokenizers: bytes, and Hugging Face's files, from text to windows and back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from braniac.model.config import PRESETS
from braniac.model.errors import DataError
from braniac.model.gpt import GPT
from braniac.model.hf import load_folder, save_folder, save_tiers
from braniac.model.sources import TextSource
from braniac.model.tokenizer import ByteTokenizer, FileTokenizer, is_name, sound, token_type
from tests.unit.texts import windows_hash, write_texts, write_tokenizer

TEXT = "def naïve(🐍):\n    return json.loads('<|endoftext|>')  # half \ufffd"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(file: Path) -> FileTokenizer:
    return FileTokenizer.read(file)


def test_bytes() -> None:
    tokenizer = ByteTokenizer()
    (tokens,) = tokenizer.encode(["naïve 🐍\n"])
    assert tokens.dtype == np.uint8
    assert tokenizer.decode(tokens.tolist()) == "naïve 🐍\n"
    assert tokenizer.decode([*b"a", tokenizer.separator, *b"b", 300]) == "ab"
    assert tokenizer.decode([0xC3]) == "\ufffd"
    assert tokenizer.encode([sound("\ud800")])[0].tolist() == [ord("?")]
    pieces = list(tokenizer.stream([*"é🐍".encode(), 0xC3]))
    assert pieces[:2] == ["é", "🐍"]
    assert "".join(pieces) == "é🐍\ufffd"


def test_a_file_says_how_text_becomes_tokens(file: Path, tokenizer: FileTokenizer) -> None:
    (tokens, other) = tokenizer.encode([TEXT, "x"])
    assert tokenizer.decode(tokens.tolist()) == TEXT
    assert len(tokens) < len(TEXT.encode())
    assert tokens.dtype == np.uint16
    assert (tokenizer.vocab_size, tokenizer.separator, len(other)) == (400, 0, 1)
    assert tokenizer.name == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert is_name(tokenizer.name)
    assert is_name("bytes")
    assert not is_name("sha256:1")


def test_a_text_cannot_spell_the_separator(tokenizer: FileTokenizer) -> None:
    (tokens,) = tokenizer.encode(["a<|endoftext|>b"])
    assert tokenizer.separator not in tokens
    assert tokenizer.decode([*tokens.tolist(), tokenizer.separator]) == "a<|endoftext|>b"


def test_text_comes_in_whole_characters(tokenizer: FileTokenizer) -> None:
    (tokens,) = tokenizer.encode([TEXT])
    pieces = list(tokenizer.stream([*tokens.tolist(), tokenizer.separator, 401, 50_000]))
    assert "".join(pieces) == TEXT
    assert len(pieces) > 10
    assert "🐍" in "".join(piece for piece in pieces if "\ufffd" not in piece)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{}", "is no tokenizer.json of Hugging Face"),
        (b"\xff\x00", "is no tokenizer.json"),
        (None, r"cannot be read \(No such file or directory\): check data.tokenizer"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        FileTokenizer.read(tmp_path / "t.json")


def test_a_file_too_large_or_without_an_end_of_text(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = json.loads(file.read_bytes())
    document["added_tokens"] = []
    with pytest.raises(DataError, match=r"no special token that ends a document: add one of <\|endoftext"):
        FileTokenizer(json.dumps(document).encode(), "t.json")
    monkeypatch.setattr("braniac.model.tokenizer._FILE_BYTES_MAX", 10)
    with pytest.raises(DataError, match="is larger than 10 bytes"):
        FileTokenizer.read(file)


def test_without_the_package_one_is_told_which(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"pip install 'braniac-node\[tokenizers\]'"):
        FileTokenizer.read(file)


def test_the_type_of_tokens_follows_the_vocabulary() -> None:
    sizes = (1, 256, 257, 1 << 16, (1 << 16) + 1)
    assert [token_type(size).itemsize for size in sizes] == [1, 1, 2, 2, 4]


def test_windows_of_tokens_are_the_same_in_every_process(
    file: Path, tokenizer: FileTokenizer, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    cache_dir, folder = tmp_path_factory.mktemp("cache"), tmp_path / "texts"
    write_texts(folder)
    corpus = TextSource(cache_dir, (folder,), tokenizer=tokenizer).load(400)
    (train,) = corpus.train
    assert train.dtype == np.uint16
    documents = tokenizer.decode(train.tolist())
    assert "record 39\nof two lines" in documents
    assert "half ? a pair" in documents
    program = (
        "import sys; from pathlib import Path; from braniac.model.sources import TextSource\n"
        "from braniac.model.tokenizer import FileTokenizer\n"
        "from tests.unit.texts import windows_hash\n"
        "cache, folder, file = map(Path, sys.argv[1:])\n"
        "source = TextSource(cache, (folder,), tokenizer=FileTokenizer.read(file))\n"
        "print(windows_hash(source.load(400)))"
    )
    command = [sys.executable, "-c", program, tmp_path / "another cache", folder, file]
    found = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == windows_hash(corpus)


def test_a_tokenizer_must_fit_the_model_and_be_there(
    tokenizer: FileTokenizer, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    (tmp_path / "a.txt").write_text("some text " * 99)
    cache_dir = tmp_path_factory.mktemp("cache")
    with pytest.raises(DataError, match=r"its tokenizer has 400 tokens: this model's vocabulary ends at 255"):
        TextSource(cache_dir, (tmp_path,), tokenizer=tokenizer).load(256)
    with pytest.raises(DataError, match=r"a\.txt is text, and this model's tokenizer is not here: set data\.tokenizer"):
        TextSource(cache_dir, (tmp_path,), tokenizer=None).load(400)


def test_a_checkpoint_folder_brings_its_tokenizer(file: Path, tokenizer: FileTokenizer, tmp_path: Path) -> None:
    model = GPT(dataclasses.replace(PRESETS["tiny-llama"], vocab_size=448, hidden_size=32, head_size=0), 0)
    save_folder(model, tmp_path / "whole", tokenizer=tokenizer)
    config = json.loads((tmp_path / "whole" / "config.json").read_bytes())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 0)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "whole")
    assert theirs(TEXT.replace("<|endoftext|>", ""))["input_ids"] == (
        tokenizer.encode([TEXT.replace("<|endoftext|>", "")])[0].tolist()
    )
    assert theirs.eos_token_id == 0
    save_tiers(load_folder(tmp_path / "whole")[0], tmp_path / "tiers", [2], tokenizer=tokenizer)
    assert (tmp_path / "tiers-tier2" / "tokenizer.json").read_bytes() == file.read_bytes()
