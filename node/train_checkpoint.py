"""Checkpoints of `train`: folders OUT/step-N that a training goes on from as if it had never stopped.

Each is a checkpoint folder like any other, with `trainer.state` (safetensors: the optimizer's memory) and `train.json`
(how far, and every setting that decides what the training computes) beside the weights. The state has a suffix of its
own because whoever loads a folder may take all of its .safetensors files for weights.
A folder appears whole or not at all, so the newest one is always good.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch

from braniac.model.checkpoint_files import read_json
from braniac.model.errors import CheckpointError
from braniac.model.hf import load_folder, save_folder
from braniac.model.sources import Corpus
from braniac.model.tokenizer import BYTES, Tokenizer
from braniac.model.trainer import Trainer
from braniac.node.errors import Incompatible

STATE_NAME, PROGRESS_NAME = "trainer.state", "train.json"
_KEPT = 2
_SAMPLES = 1 << 16  # of each file of tokens
_FOLDER = re.compile(r"step-(\d{1,18})")
# The others decide how fast a step is or what it is checked for; `total_steps` is judged by `_check_same` itself.
_OPTIMIZER_KEYS = ("learning_rate", "adam_learning_rate", "weight_decay", "warmup_steps", "cooldown_fraction")
_TRAIN_KEYS = ("batch", "seed", "precision")


def folder_of(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is, or would be."""
    return out / f"step-{step}"


def newest(out: Path) -> Path | None:
    """The checkpoint of the most steps, if there is any."""
    folders = _folders(out)
    return folders[max(folders)] if folders else None


def save(
    trainer: Trainer, out: Path, tokens: int, settings: Mapping[str, object], tokenizer: Tokenizer | None = None
) -> Path:
    """Write the trainer's checkpoint, then remove all but the last two. Raises CheckpointError.

    `tokens` is what it has trained on so far, `settings` what a training that goes on from it must have too. The files
    of the tokenizer go along.
    """
    progress = {
        "step": trainer.step_count,
        "tokens": tokens,
        "train.steps": trainer.settings.total_steps,
        "settings": dict(settings),
    }
    memory = {name: tensor for name, tensor in trainer.state()[0].items() if name not in trainer.params}
    files = {STATE_NAME: safetensors.torch.save(memory), PROGRESS_NAME: json.dumps(progress, indent=2).encode()}
    target = folder_of(out, trainer.step_count)
    save_folder(trainer.model, target, tokenizer=tokenizer, beside=files, overwrite=True)
    folders = _folders(out)
    for step in sorted(folders)[:-_KEPT]:
        _remove(folders[step])
    return target


def load(trainer: Trainer, folder: Path, settings: Mapping[str, object]) -> int:
    """Put the trainer where it was when it wrote `folder`; the tokens that it had trained on.

    Raises Incompatible if its settings were others then, naming one, and CheckpointError if a file is damaged.
    """
    progress = read_json(folder / PROGRESS_NAME)
    saved = progress.get("settings")
    if not isinstance(saved, dict):
        raise CheckpointError(f"{folder / PROGRESS_NAME} lacks 'settings': {_remedy(folder)}")
    step, tokens, steps = (_count(folder, progress, key) for key in ("step", "tokens", "train.steps"))
    _check_same(folder, saved, settings)
    _check_schedule(folder, step, steps, trainer)
    weights = {name: p.detach() for name, p in load_folder(folder)[0].named_parameters()}
    weights = {name: p.to(trainer.params[name].dtype) if name in trainer.params else p for name, p in weights.items()}
    try:
        memory = safetensors.torch.load((folder / STATE_NAME).read_bytes())
    except (OSError, safetensors.SafetensorError, KeyError) as error:  # KeyError: a type that this torch does not know
        raise CheckpointError(f"{folder / STATE_NAME} cannot be read ({error}): {_remedy(folder)}") from None
    try:
        trainer.load_state(weights | memory, {"step": step})
    except CheckpointError as error:
        raise CheckpointError(f"{folder} is damaged ({str(error).removesuffix('.')}): {_remedy(folder)}") from None
    return tokens


def remove_all(out: Path) -> None:
    """Remove every checkpoint, the oldest first."""
    for _, folder in sorted(_folders(out).items()):
        _remove(folder)


def remove_leftovers(out: Path) -> None:
    """Remove what a killed process did not finish writing or removing."""
    for entry in out.glob(".step-*"):
        shutil.rmtree(entry)


def settings_of(trainer: Trainer) -> dict[str, object]:
    """What decides all that a training computes, but for its length: by key, as plain JSON values."""
    settings = dataclasses.asdict(trainer.settings)
    found = {f"model.{key}": value for key, value in trainer.config.to_dict().items()}
    found |= {f"objective.{key}": value for key, value in settings["objective"].items()}
    found |= {f"optimizer.{key}": settings[key] for key in _OPTIMIZER_KEYS}
    found |= {f"train.{key}": settings[key] for key in _TRAIN_KEYS}
    found |= {"train.tier": trainer.tier, "data.paths": _text(trainer.batches.corpus)}
    plain: dict[str, object] = json.loads(json.dumps(found))
    return plain


def _text(corpus: Corpus) -> str:
    """Tells texts apart without reading all of them, by their lengths and samples."""
    sides = corpus.train, corpus.held_out
    digest = hashlib.sha256()
    for tokens in itertools.chain(*sides):
        samples = tokens[:: max(1, len(tokens) // _SAMPLES)]
        digest.update(samples.astype(np.promote_types(samples.dtype, "<u2")).tobytes())
    corpus.release()
    train, held_out = (sum(len(tokens) for tokens in side) for side in sides)
    return f"{train} tokens to train on, {held_out} held out, digest {digest.hexdigest()[:16]}"


def _count(folder: Path, progress: Mapping[str, object], key: str) -> int:
    value = progress.get(key)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"{folder / PROGRESS_NAME} has {key} = {value!r}, no count: {_remedy(folder)}")
    return value


def _check_same(folder: Path, saved: Mapping[str, object], present: Mapping[str, object]) -> None:
    saved = {
        "train.precision": "fp32",
        "data.tokenizer": BYTES,
        **saved,
    }  # what checkpoints before there was a choice do not say
    for key in sorted(saved.keys() | present.keys()):
        then, now = saved.get(key), present.get(key)
        if then != now:
            raise Incompatible(
                f"{folder} was trained with {key} = {json.dumps(then)} and now it is {json.dumps(now)}: "
                "set it back, choose another --out, or begin anew with --restart"
            )


def _check_schedule(folder: Path, step: int, steps: int, trainer: Trainer) -> None:
    """Another length is fine as long as it would have made no difference so far."""
    present = trainer.settings
    then = dataclasses.replace(present, total_steps=steps)
    if any(then.lr_scale(past) != present.lr_scale(past) for past in range(step)):
        raise Incompatible(
            f"{folder} was trained with train.steps = {steps} and now it is {present.total_steps}, but its learning "
            "rate has begun to fall already: set it back, choose another --out, or begin anew with --restart"
        )


def _folders(out: Path) -> dict[int, Path]:
    found = {}
    for entry in out.iterdir():
        if (name := _FOLDER.fullmatch(entry.name)) and entry.is_dir() and not entry.is_symlink():
            found[int(name[1])] = entry
    return found


def _remove(folder: Path) -> None:
    # Renamed first: a folder that is removed by half must not be taken for a checkpoint.
    hidden = folder.with_name(f".{folder.name}.removed")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _remedy(folder: Path) -> str:
    return f"remove {folder} to go on from the checkpoint before it, or begin anew with --restart"
