"""Hugging Face checkpoint folders: loading any dense Llama, or what is written here; saving whole models and slices.

What is written is a stock `LlamaForCausalLM` wherever the model is one (see hf_config.py): whole, a tier, or any other
one width. A folder appears complete or not at all, and only one shard or tensor at a time is held beside the model.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from braniac.model.checkpoint_files import CONFIG_NAME, read_json
from braniac.model.config import ModelConfig
from braniac.model.errors import CheckpointError, ConfigError
from braniac.model.gpt import GPT
from braniac.model.hf_config import from_config_json, to_config_json
from braniac.model.hf_weights import INDEX_NAME, WEIGHTS_NAME, Stored, check_tensors, find_tensors, read_tensor
from braniac.model.slicing import MAX_TIER, Slice, infer
from braniac.model.tier_folders import COMMON_FILES, Strategy, resolve, tier_folder, write_folder, write_manifest
from braniac.model.tier_manifest import read_manifest
from braniac.model.tiers import EMBEDDING, HEAD, check_width, is_input_major, shapes_at, tier_width, tier_widths
from braniac.model.tokenizer import Tokenizer

_TOKEN_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_folder(path: Path, *, width: int | None = None, context: int | None = None) -> tuple[GPT, Slice]:
    """The model in a folder, in float32, and what part of a whole model its files hold.

    `width` reads only that many FFN neurons of each layer; `context` shortens the longest input. What a manifest in the
    folder lists is checked against its hashes. Raises CheckpointError naming the file, the key and what is expected;
    ConfigError for a width that the model has not.
    """
    manifest = read_manifest(path)
    base = None if manifest is None else resolve(path, 0, "auto").held.base
    return _load(path, base, width, context)


def load_tier(path: Path, tier: int, strategy: Strategy = "auto", *, context: int | None = None) -> tuple[GPT, Slice]:
    """A tier of the checkpoint `path`, from the folder that `tier_folders.resolve` chooses; errors as in `load_folder`.

    Of a universal checkpoint only the tier's neurons are read. The second result is what the files hold.
    """
    found = resolve(path, tier, strategy)
    return _load(found.folder, found.held.base, found.width, context)


def save_folder(
    model: GPT,
    target: Path,
    *,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 1 << 30,
    source: Path | None = None,
    tokenizer: Tokenizer | None = None,
    beside: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the first `width` FFN neurons of each layer, or all that the model holds, as a folder of their own.

    `source` is the folder the model came from: its token ids and tokenizer files go along; so do those of `tokenizer`.
    `beside` are further files, by name, that appear with the others or not at all. Raises ConfigError for a width that
    the model has not or that Hugging Face cannot express; CheckpointError for weights that are not finite in `dtype`
    (float32, bfloat16 or float16) and for a target that exists or cannot be written.
    """
    assert dtype in _DTYPES, f"{dtype} is none of {_DTYPES}"
    widths = model.held_widths(width)
    document = {**to_config_json(model.config, widths), "dtype": str(dtype).removeprefix("torch.")}
    files: dict[str, Callable[[], bytes]] = {
        name: functools.partial(bytes, data) for name, data in (beside or {}).items()
    }
    if tokenizer is not None and tokenizer.files:
        document |= {"bos_token_id": tokenizer.separator, "eos_token_id": tokenizer.separator}
        files |= {name: functools.partial(bytes, data) for name, data in tokenizer.files.items()}
    if source is not None:
        carried = read_json(source / CONFIG_NAME)
        document |= {key: carried[key] for key in _TOKEN_KEYS if key in carried}
        files |= {name: (source / name).read_bytes for name in COMMON_FILES if (source / name).is_file()}
    files[CONFIG_NAME] = functools.partial(_json, document)
    files |= _weight_files(model, widths, dtype, max_shard_bytes)
    write_folder(target, _Files(files), overwrite=overwrite)


def save_tiers(
    model: GPT,
    target: Path,
    tiers: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 1 << 30,
    source: Path | None = None,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> None:
    """Write a whole model as `target`, the tiers as TARGET-tier{t} beside it, and the manifest that binds them.

    Raises like `save_folder`, before anything is written if a folder is in the way: one of a tier that is not among
    `tiers` is too, since it would be taken for a slice of the new weights. A tier that fails leaves no manifest.
    """
    config = model.config
    if set(model.neurons) != {config.intermediate_size}:
        raise ConfigError(f"the model holds {model.neurons} FFN neurons: tiers are cut from a whole one.")
    widths = {tier: tier_width(config, tier) for tier in sorted({0, *tiers}, reverse=True)}
    for tier in range(MAX_TIER + 1):
        folder = tier_folder(target, tier)
        if folder.exists() and not (overwrite and tier in widths):
            advice = "ask for it to be overwritten" if tier in widths else "remove it or export that tier too"
            raise CheckpointError(f"{folder} exists: choose another name, or {advice}.")
    # The universal folder comes last: until then, what is there keeps its manifest, whose hashes refuse the new tiers.
    for tier, width in widths.items():
        save_folder(
            model,
            tier_folder(target, tier),
            width=width,
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            source=source,
            tokenizer=tokenizer,
            overwrite=overwrite,
        )
    write_manifest(target, list(widths))


def _load(path: Path, base: int | None, width: int | None, context: int | None) -> tuple[GPT, Slice]:
    file = path / CONFIG_NAME
    found, stored = read_json(file), find_tensors(path)
    neurons = [s.shape[0] for name, s in stored.items() if name.endswith(".mlp.up_proj.weight") and s.shape]
    # Without any up_proj the config's own width will do: the check of names comes next and misses them all.
    held = infer(found, width=max(neurons, default=None), manifest_base=base, folder_name=path.resolve().name)
    config, widths = from_config_json(found, file, held, context)
    head = stored.pop(HEAD, None) if config.tie_word_embeddings else None
    check_tensors(path, stored, shapes_at(config, widths))
    if width is not None:
        check_width(config, width)
        if width > min(widths):
            raise ConfigError(f"{path} holds {min(widths)} FFN neurons: choose a width of at most that, not {width}.")
        widths = (width,) * config.num_hidden_layers
    model = _empty_model(config, widths)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(read_tensor(stored[name], p.shape[0]))
    if head is not None:
        _check_tied(model, head)
    return model, held


def _empty_model(config: ModelConfig, widths: tuple[int, ...]) -> GPT:
    """A tier, if these are one's widths; otherwise a model with just these."""
    tiers = {(width,) * config.num_hidden_layers: tier for tier, width in enumerate(tier_widths(config))}
    return GPT(config, tiers[widths]) if widths in tiers else GPT(config, neurons=widths)


def _check_tied(model: GPT, head: Stored) -> None:
    """Some tied checkpoints hold their one matrix twice."""
    embedding = model.get_parameter(EMBEDDING)
    if head.shape != tuple(embedding.shape) or not torch.equal(read_tensor(head, head.shape[0]).float(), embedding):
        raise CheckpointError(
            f"{head.file} holds a {HEAD!r} that is not {EMBEDDING!r}: set tie_word_embeddings to false in config.json."
        )


class _Files(Mapping[str, bytes]):
    """Files by name, each made only when it is asked for, so that no two shards are in memory."""

    def __init__(self, makers: Mapping[str, Callable[[], bytes]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> bytes:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _weight_files(
    model: GPT, widths: Sequence[int], dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, Callable[[], bytes]]:
    """One weight file, or shards of at most so many bytes of tensors (or one tensor) and their index."""
    shards: list[dict[str, int]] = [{}]
    sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes_at(model.config, widths).items()}
    for name, size in sizes.items():
        if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1][name] = size
    rows = {name: shape[0] for name, shape in shapes_at(model.config, widths).items()}
    if len(shards) == 1:
        return {WEIGHTS_NAME: functools.partial(_safetensors, model, rows, dtype)}
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    return {
        INDEX_NAME: functools.partial(_json, index),
        **{
            name: functools.partial(_safetensors, model, {tensor: rows[tensor] for tensor in shard}, dtype)
            for name, shard in zip(names, shards, strict=True)
        },
    }


def _safetensors(model: GPT, rows: Mapping[str, int], dtype: torch.dtype) -> bytes:
    tensors = {name: on_disk(model, name, count, dtype) for name, count in rows.items()}
    return safetensors.torch.save(tensors, {"format": "pt"})


def on_disk(model: GPT, name: str, rows: int, dtype: torch.dtype) -> Tensor:
    """The first `rows` rows of a parameter, in Hugging Face's orientation. Raises CheckpointError if not finite."""
    held = model.get_parameter(name).detach()[:rows]
    tensor = (held.mT if is_input_major(name) else held).to(dtype).contiguous()
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name!r} is not finite in {dtype}: nothing was saved, go back to a good checkpoint.")
    return tensor


def _json(document: Mapping[str, object]) -> bytes:
    return json.dumps(document, indent=2, sort_keys=True).encode() + b"\n"
