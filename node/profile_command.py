"""`braniac-node profile`: how long a forward pass takes on this machine, as a table and as a picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from braniac.model.config import PRESETS
from braniac.model.gpt import GPT
from braniac.model.hf import load_folder
from braniac.model.profile import LengthSummary, Profile, measure
from braniac.model.tiers import tier_widths
from braniac.node.commands import table_text
from braniac.node.errors import ConfigError, NodeError


def profile_model(
    *,
    preset: str,
    folder: Path | None,
    widths: Sequence[int] | None,
    lengths: Sequence[int] | None,
    batch: int,
    decode: bool,
    threads: int,
    rounds: int,
) -> Profile:
    """Time a checkpoint, or a preset with its initial weights. Raises ConfigError, CheckpointError."""
    torch.set_num_threads(threads)
    if folder is not None:
        model, _ = load_folder(folder)
    elif preset in PRESETS:
        model = GPT(PRESETS[preset])
        model.init_weights(seed=0)
    else:
        raise ConfigError(f"there is no preset {preset!r}: choose one of {', '.join(PRESETS)}, or give --folder")
    context = model.config.context
    asked = tuple(lengths) if lengths else tuple(context // part for part in (4, 2, 1) if context >= part)
    if decode and not lengths:
        asked = tuple(length - 1 for length in asked if length > 1)
    held = tuple(width for width in tier_widths(model.config) if width <= model.width)
    chosen = tuple(widths) if widths else held
    return measure(model, chosen, asked, clock=time.perf_counter, batch=batch, decode=decode, rounds=rounds)


def profile_text(profile: Profile) -> str:
    """One table per sequence length, all layers together, then the knee; last the layers one by one."""
    what = "one token after {}" if profile.decode else "{} tokens"
    blocks = []
    for summary in profile.lengths:
        rows = [_summary_row(summary, width, max(summary.ffn_s)) for width in sorted(summary.ffn_s, reverse=True)]
        header = ["WIDTH", "TOTAL ms", "ATTENTION", "FFN", "OUTSIDE", "FFN SHARE", "SPEEDUP"]
        blocks.append(
            f"{what.format(summary.length)}, batch {profile.batch}\n{table_text(header, rows)}\n{knee_text(summary)}"
        )
    rows = [
        [str(t.layer), str(t.width), str(t.length), f"{t.attention_s * 1e3:.3f}", f"{t.ffn_s * 1e3:.3f}"]
        for t in profile.layers
    ]
    blocks.append(table_text(["LAYER", "WIDTH", "LENGTH", "ATTENTION ms", "FFN ms"], rows))
    return "\n\n".join(blocks)


def knee_text(summary: LengthSummary) -> str:
    """The knee in a sentence."""
    if summary.knee is None:
        return "no knee: even the whole FFN costs less than everything else"
    return f"knee at {summary.knee} neurons: below it, attention, embedding and head cost more than the FFN"


def _summary_row(summary: LengthSummary, width: int, widest: int) -> list[str]:
    parts = (summary.attention_s[width], summary.ffn_s[width], summary.outside_s)
    total_s = summary.total_s(width)
    shown = [f"{seconds * 1e3:.3f}" for seconds in (total_s, *parts)]
    return [str(width), *shown, f"{summary.ffn_s[width] / total_s:.0%}", f"{summary.total_s(widest) / total_s:.2f}x"]


def profile_json(profile: Profile) -> dict[str, Any]:
    """All that was measured, seconds."""
    return asdict(profile)


def draw(profile: Profile, target: Path) -> None:
    """Write a PNG: per sequence length, what attention, FFN and the rest cost at each width. Raises NodeError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise NodeError("drawing needs matplotlib: pip install 'braniac-node[plots]'") from None
    figure = Figure(figsize=(4.5 * len(profile.lengths), 4), layout="constrained")
    for number, summary in enumerate(profile.lengths):
        axes = figure.add_subplot(1, len(profile.lengths), number + 1)
        widths = sorted(summary.ffn_s)
        parts = {
            "outside the layers": [summary.outside_s * 1e3] * len(widths),
            "attention": [summary.attention_s[width] * 1e3 for width in widths],
            "FFN": [summary.ffn_s[width] * 1e3 for width in widths],
        }
        axes.stackplot(widths, list(parts.values()), labels=list(parts))
        if summary.knee is not None:
            axes.axvline(summary.knee, color="black", linestyle="--", label=f"knee at {summary.knee}")
        axes.set_title(f"one token after {summary.length}" if profile.decode else f"{summary.length} tokens")
        axes.set_xlabel("FFN width, neurons")
        axes.set_ylabel(f"forward pass, ms, batch {profile.batch}")
        axes.legend(loc="upper left")
    try:
        figure.savefig(target, format="png", dpi=120)
    except OSError as error:
        raise NodeError(f"cannot write {target} ({error.strerror}): choose another --png") from None
