"""Datasets as streams of documents. Nothing is downloaded: the `datasets` package reads folders made here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from braniac.model.errors import DataError
from braniac.model.sources import Corpus
from braniac.model.tokenizer import ByteTokenizer
from braniac.node.config import NodeConfig
from braniac.node.errors import ConfigError
from braniac.node.hub import HubStream, is_hub_name
from braniac.node.settings_merge import load_config
from braniac.node.text import text_source
from tests.unit.texts import windows_hash


@pytest.fixture
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "dataset"
    folder.mkdir()
    for part in range(2):
        records = ({"text": f"part {part}, document {i} 🐍", "id": i} for i in range(200))
        (folder / f"train-{part}.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "test.jsonl").write_text(json.dumps({"text": "held back " * 50}))
    return folder


def load(cache_dir: Path, *names: object, hub_tokens: int = 100_000) -> Corpus:
    sets = [f"data.cache_dir={cache_dir}", f"data.hub_tokens={hub_tokens}"]
    data = load_config(NodeConfig, None, {}, sets, {"data.paths": [str(name) for name in names]}).data
    return text_source(data, ByteTokenizer()).load(256)


def test_a_dataset_is_read_like_any_text(dataset: Path, cache_dir: Path) -> None:
    corpus = load(cache_dir, f"hf://{dataset}")
    everything = corpus.train[0].tobytes() + corpus.held_out[0].tobytes()
    documents = everything.removesuffix(b"\xff").split(b"\xff")
    assert documents == [f"part {part}, document {i} 🐍".encode() for part in range(2) for i in range(200)]
    assert len(corpus.held_out[0]) == len(everything) // 16
    assert load(cache_dir, f"hf://{dataset}:test").train[0][:9].tobytes() == b"held back"


def test_it_is_streamed_once_and_up_to_its_bound(
    dataset: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = load(cache_dir, f"hf://{dataset}", hub_tokens=1600)
    assert (len(short.train[0]), len(short.held_out[0])) == (1500, 100)
    first, elsewhere = windows_hash(short), windows_hash(load(tmp_path / "cache", f"hf://{dataset}", hub_tokens=1600))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert windows_hash(load(cache_dir, f"hf://{dataset}", hub_tokens=1600)) == first == elsewhere
    with pytest.raises(
        DataError, match=r"needs the datasets package: install it with pip install 'braniac-node\[hf\]'"
    ):
        load(cache_dir, f"hf://{dataset}", hub_tokens=1601)
    (dataset / "test.jsonl").write_text(json.dumps({"text": "another"}))
    with pytest.raises(DataError, match="needs the datasets package"):  # the folder is not what it was
        load(cache_dir, f"hf://{dataset}", hub_tokens=1600)


def test_datasets_stand_beside_files(dataset: Path, cache_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("my own words\n" * 20)
    corpus = load(cache_dir, tmp_path / "own.txt", f"hf://{dataset}")
    assert corpus.train[0].tobytes().startswith(b"my own words\n")
    assert b"part 0, document 0" in corpus.train[0].tobytes()
    assert corpus.name.endswith(f"own.txt, hf://{dataset}")


def test_what_cannot_be_streamed_is_named(dataset: Path, cache_dir: Path, tmp_path: Path) -> None:
    (dataset / "train-0.jsonl").write_text('{"words": "x", "id": 1}\n')
    (dataset / "train-1.jsonl").unlink()
    with pytest.raises(DataError, match=r'lacks "text": its columns are words, id'):
        load(cache_dir, f"hf://{dataset}")
    with pytest.raises(DataError, match=r"hf://.*:nosuch cannot be streamed \(.*\): check its name and the network"):
        load(cache_dir, f"hf://{dataset}:nosuch")
    with pytest.raises(DataError, match="holds no files: give a folder with a dataset"):
        load(cache_dir, f"hf://{tmp_path / 'nowhere'}")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf://wikitext", ("wikitext", None, None, None)),
        ("hf://HuggingFaceFW/fineweb", ("HuggingFaceFW/fineweb", None, None, None)),
        ("hf://HuggingFaceFW/fineweb/sample-10BT", ("HuggingFaceFW/fineweb", "sample-10BT", None, None)),
        ("hf://a/b/c:train@v1.2", ("a/b", "c", "train", "v1.2")),
        ("hf:///srv/some/folder:test", ("/srv/some/folder", None, "test", None)),
    ],
)
def test_what_a_name_means(name: str, parts: tuple[str | None, ...]) -> None:
    assert tuple(HubStream(name, 1).parts().values()) == parts
    assert is_hub_name(name)


@pytest.mark.parametrize("name", ["hf://", "hf://a/b/c/d", "hf://a b", "hf://a:b:c", "hf://a@"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a dataset written as hf://NAME\[/CONFIG\]"):
        load_config(NodeConfig, None, {}, [f"data.paths={name}"], {})
    assert not is_hub_name(f"./{name}")
