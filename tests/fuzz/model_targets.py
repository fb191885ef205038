"""Targets for what model/ reads: weights, checkpoint folders, their configurations and manifests, training text.

GGUF is only written, so there is no decoder to be fuzzed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from braniac.model.checkpoint import from_safetensors, to_safetensors
from braniac.model.checkpoint_files import CONFIG_NAME
from braniac.model.config import ModelConfig
from braniac.model.errors import CheckpointError, ConfigError, DataError
from braniac.model.gpt import GPT
from braniac.model.hf import load_folder, save_folder
from braniac.model.hf_weights import WEIGHTS_NAME
from braniac.model.shards import HEADER_BYTES
from braniac.model.slicing import CheckpointWarning
from braniac.model.sources import TextSource
from braniac.model.tier_manifest import MANIFEST_NAME, Manifest, locate, read_manifest
from braniac.model.tiers import parameter_shapes
from tests.fuzz.files import file_of, folder
from tests.fuzz.target import Target

torch.set_num_threads(1)

CONFIG = ModelConfig(
    hidden_size=2, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=2, context=2
)
TIER = 1


def some_tensors() -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=dice) for name, shape in parameter_shapes(CONFIG, TIER).items()}


def weights(data: bytes) -> bool:
    """Weights as one peer or program hands them to another."""
    try:
        tensors, metadata = from_safetensors(data)
    except CheckpointError:
        return False
    again, same = from_safetensors(to_safetensors(tensors, metadata.config, metadata.tier, metadata.extra))
    assert same == metadata
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    return True


def weights_seeds() -> Iterable[bytes]:
    for extra in ({"run": "abc"}, {}):
        data = to_safetensors(some_tensors(), CONFIG, TIER, extra)
        # safetensors writes metadata in any order; a seed has one.
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps(json.loads(data[8:end]), sort_keys=True).encode()
        yield len(header).to_bytes(8, "little") + header + data[end:]


def folder_weights(data: bytes) -> bool:
    """model.safetensors beside a good config.json."""
    return _loads(WEIGHTS_NAME, data)


def folder_config(data: bytes) -> bool:
    """config.json beside good weights."""
    return _loads(CONFIG_NAME, data)


def saved(name: str) -> Path:
    """A whole llama as a folder."""
    place = folder() / name
    if not place.exists():
        model = GPT(dataclasses.replace(CONFIG, family="llama"))
        model.init_weights(0)
        save_folder(model, place)
    return place


def _loads(name: str, data: bytes) -> bool:
    place = saved(f"with {name}")
    (place / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        try:
            model, held = load_folder(place)
        except (CheckpointError, ConfigError):
            return False
    assert held.width <= held.base
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    return True


def folder_seeds(name: str) -> Iterable[bytes]:
    yield (saved("seed") / name).read_bytes()


def tier_manifest(data: bytes) -> bool:
    """matformer_manifest.json. What was read is written and read back unchanged."""
    place = folder() / "universal"
    place.mkdir(exist_ok=True)
    (place / MANIFEST_NAME).write_bytes(data)
    try:
        found = read_manifest(place)
    except CheckpointError:
        return False
    assert found is not None
    for name in found.sha256:
        with contextlib.suppress(CheckpointError):
            path = locate(place, name)
            assert path is None or path.resolve().is_relative_to(place.resolve().parent)
    (place / MANIFEST_NAME).write_bytes(found.encode())
    assert read_manifest(place) == found
    return True


def tier_manifest_seeds() -> Iterable[bytes]:
    hashes = dict.fromkeys(("tokenizer.json", "config.json", "model.safetensors"), "0" * 64)
    first = ("config.json", "model.safetensors")
    beside = tuple(f"../X-tier1/{name}" for name in first)
    yield Manifest(64, ("tokenizer.json",), {0: first}, hashes).encode()
    yield Manifest(64, (), {0: first, 1: beside}, dict.fromkeys((*first, *beside), "a" * 64)).encode()


def text(data: bytes) -> bool:
    """Training text: the first byte chooses plain text, .jsonl or a token shard."""
    suffix = SUFFIXES[data[0] % len(SUFFIXES)] if data else SUFFIXES[0]
    cache = folder() / "tokens"
    shutil.rmtree(cache, ignore_errors=True)  # what it knows of this file's last version may be as new
    try:
        corpus = TextSource(cache, (file_of(f"text{suffix}", data[1:]),)).load(256)
    except DataError:
        return False
    held = [*corpus.train, *corpus.held_out]
    assert sum(map(len, held)) <= 3 * len(data) + 1  # a byte that is no UTF-8 becomes three, a text ends in one
    assert all(int(tokens.max()) < 256 for tokens in held if len(tokens))
    return any(len(tokens) for tokens in held)


SUFFIXES = (".txt", ".jsonl", ".bin")


def text_seeds() -> Iterable[bytes]:
    header = np.zeros(HEADER_BYTES // 4, "<i4")
    header[:3] = (20240520, 1, 5)
    yield b"\0" + "plain tëxt\n".encode() * 3
    yield b"\1" + b'{"text": "a document"}\n{"text": "another", "id": 3}\n'
    yield b"\2" + header.tobytes() + np.arange(5, dtype="<u2").tobytes()


TARGETS = {
    "weights": Target(weights, weights_seeds, 8192),
    "folder_weights": Target(folder_weights, functools.partial(folder_seeds, WEIGHTS_NAME), 8192),
    "folder_config": Target(folder_config, functools.partial(folder_seeds, CONFIG_NAME)),
    "tier_manifest": Target(tier_manifest, tier_manifest_seeds),
    "text": Target(text, text_seeds, 2048),
}
