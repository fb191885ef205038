"""Which text a command reads, and with which tokenizer: from settings, a run's manifest, a checkpoint's folder."""

from __future__ import annotations

from pathlib import Path

from braniac.model.config import ModelConfig
from braniac.model.sources import TextSource
from braniac.model.tokenizer import BYTES, FILE_NAME, ByteTokenizer, FileTokenizer, Tokenizer
from braniac.node.config import DataSection
from braniac.node.errors import ConfigError
from braniac.node.files import Files, write_whole
from braniac.node.hub import HubStream
from braniac.node.run_data import run_data
from braniac.protocol.manifest import Manifest


def text_source(data: DataSection, tokenizer: Tokenizer | None) -> TextSource:
    """The text that the settings name."""
    return TextSource(
        data.cache_dir,
        data.files,
        tuple(HubStream(name, data.hub_tokens) for name in data.hub),
        tokenizer,
        data.bad_shards,
    )


def default_text() -> TextSource:
    """What a node reads if nobody says otherwise."""
    return text_source(DataSection(), ByteTokenizer())


def given_tokenizer(data: DataSection) -> Tokenizer:
    """The one that the settings name, else bytes. Raises DataError."""
    return ByteTokenizer() if data.tokenizer is None else FileTokenizer.read(data.tokenizer)


def folder_tokenizer(folder: Path, model: ModelConfig, data: DataSection) -> Tokenizer | None:
    """The one that the settings name or that lies beside a checkpoint; None if there is none. Raises DataError."""
    if data.tokenizer is None and (folder / FILE_NAME).is_file():
        return FileTokenizer.read(folder / FILE_NAME)
    if data.tokenizer is None and model.vocab_size != ByteTokenizer.vocab_size:
        return None
    return given_tokenizer(data)


def run_tokenizer(manifest: Manifest, data: DataSection, state_dir: Path) -> Tokenizer | None:
    """A run's own: from the settings or kept from before; None if it is not here. Raises ConfigError, DataError."""
    wanted = run_data(manifest).tokenizer
    if wanted == BYTES:
        if data.tokenizer is not None:
            raise ConfigError("this run reads text as bytes: drop data.tokenizer")
        return ByteTokenizer()
    path = state_dir / FILE_NAME if data.tokenizer is None else data.tokenizer
    if data.tokenizer is None and not path.is_file():
        return None
    tokenizer = FileTokenizer.read(path)
    if tokenizer.name != wanted:
        raise ConfigError(f"{path} is not the tokenizer of this run ({wanted}): ask its founder for the file")
    return tokenizer


def keep_tokenizer(state_dir: Path, tokenizer: Tokenizer | None) -> None:
    """Leave a run's tokenizer in the state directory, for later starts and `generate`. Raises OSError."""
    data = tokenizer.files.get(FILE_NAME) if tokenizer is not None else None
    path = state_dir / FILE_NAME
    if data is not None and not (path.is_file() and path.read_bytes() == data):
        write_whole(Files(), path, memoryview(data))
