"""`braniac-node convert`: sort the neurons of a dense checkpoint by importance, so that narrow widths are of use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from braniac.model.convert import Kind, orderings, reorder_
from braniac.model.data import Batches
from braniac.model.evaluate import held_out_loss
from braniac.model.hf import load_folder, save_folder
from braniac.model.tiers import tier_widths
from braniac.node.commands import table_text
from braniac.node.config import DataSection
from braniac.node.errors import ConfigError
from braniac.node.text import folder_tokenizer, text_source

_WINDOWS = 128  # of text, to sort by and to measure on
_LONGEST_WINDOW = 512  # of them, in tokens: more text is worth more than longer text
_SEED = 0


def convert(source: Path, target: Path, *, ordering: Kind, data: DataSection) -> dict[str, Any]:
    """Write the model of folder `source` with its neurons sorted to `target`; its loss at every tier, as for JSON.

    The order comes from the training part of the text, the losses from the rest. Raises ModelError, NodeError.
    """
    if os.path.lexists(target):  # now, lest it fail after minutes
        raise ConfigError(f"{target} exists: choose another OUT")
    model, held = load_folder(source)
    if not held.whole:
        raise ConfigError(f"{source} holds {held.width} of {held.base} FFN neurons: sort the whole model instead")
    config = model.config
    corpus = text_source(data, folder_tokenizer(source, config, data)).load(config.vocab_size)
    batches = Batches(corpus, _SEED, b"calibration", min(config.context, _LONGEST_WINDOW), _WINDOWS)
    windows, widths = batches.held_out(_WINDOWS), tier_widths(config)
    before = [held_out_loss(model, windows, width) for width in widths]
    reorder_(model, orderings(model, ordering, batches.batch(0), _SEED))
    after = [held_out_loss(model, windows, width) for width in widths]
    save_folder(model, target, source=source)
    return {
        "written": str(target),
        "ordering": ordering,
        "widths": list(widths),
        "loss_before": before,
        "loss_after": after,
    }


def convert_text(result: Mapping[str, Any]) -> str:
    """A table of the losses in nats per token."""
    rows = [
        [str(width), f"{before:.4f}", f"{after:.4f}"]
        for width, before, after in zip(result["widths"], result["loss_before"], result["loss_after"], strict=True)
    ]
    return f"{result['written']}, sorted by {result['ordering']}\n{table_text(['WIDTH', 'LOSS BEFORE', 'AFTER'], rows)}"
