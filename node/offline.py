"""What can be done with a state directory without a daemon: write text, measure the loss. A running daemon is not
disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from braniac.model.checkpoint import from_safetensors
from braniac.model.config import ModelConfig
from braniac.model.data import Batches
from braniac.model.decoding import beam_search
from braniac.model.decoding import generate as decode
from braniac.model.evaluate import held_out_loss
from braniac.model.fragments import scatter_
from braniac.model.gpt import GPT
from braniac.model.hf import load_folder
from braniac.model.speculative import speculate
from braniac.model.tiers import tier_width
from braniac.model.tokenizer import BYTES, sound
from braniac.node import bridge
from braniac.node.checkpoint import Saved, from_generation, load_parts
from braniac.node.config import DataSection
from braniac.node.errors import ConfigError, StateError
from braniac.node.run_data import run_data
from braniac.node.store import Store
from braniac.node.text import folder_tokenizer, run_tokenizer, text_source

_WINDOWS = 64  # of the held-out text


def load(state_dir: Path) -> tuple[Store, Saved, GPT]:
    """The newest whole generation's own weights. Raises StateError."""
    torch.set_num_threads(1)  # models this small only lose by being shared between threads
    store = Store.look(state_dir)
    generation = store.recover()
    if generation is None:
        raise StateError(f"{state_dir} holds no checkpoint yet: start a node there with `braniac-node join` first")
    saved = from_generation(generation)
    if saved.weights is None and saved.parts:
        return store, saved, _of_parts(store, saved)
    if saved.weights is None:
        raise StateError(f"{state_dir} holds no weights yet: wait for the node's first slot")
    tensors, metadata = from_safetensors(store.get(saved.weights))
    model = GPT(metadata.config, metadata.tier)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    return store, saved, model


def _of_parts(store: Store, saved: Saved) -> GPT:
    """The model of a node that trains lean, in its precision. Raises StateError."""
    config, fragments = bridge.model_of(saved.manifest)
    model = GPT(config, saved.tier, dtype=torch.bfloat16)
    parameters = dict(model.named_parameters())
    for fragment, weights in load_parts(store, saved, fragments):
        scatter_(parameters, fragment, weights)
    return model


def load_anchors(store: Store, saved: Saved) -> GPT:
    """The same model with the weights that the swarm agreed on. Raises StateError."""
    config, fragments = bridge.model_of(saved.manifest)
    model = GPT(config, saved.tier)
    parameters = dict(model.named_parameters())
    for index in saved.manifest.held(saved.tier):
        if index not in saved.anchors:
            raise StateError("the node has not joined completely yet: wait until it trains")
        anchor = bridge.anchor_from_bytes(store.get(saved.anchors[index].digest), fragments[index].size)
        scatter_(parameters, fragments[index], bridge.to_weights(anchor))
    return model


def generate(
    state_dir: Path,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int | None,
    tier: int | None,
    data: DataSection,
    folder: Path | None = None,
    draft_tier: int | None = None,
    beams: int = 1,
) -> Iterator[str]:
    """Yield pieces of text that continue `prompt`, by the model in `folder` if one is given.

    `data` may name the tokenizer, where neither the state directory nor the folder has it.
    With `draft_tier`, that slice of the model drafts and the model decides: the same distribution of texts. With
    `beams`, the likeliest text that a beam search finds. Raises StateError, ConfigError, ModelError.
    """
    if beams > 1 and draft_tier is not None:
        raise ConfigError("--beams and --draft-tier exclude each other: give one of them")
    if folder is None:
        _, saved, model = load(state_dir)
        tokenizer = run_tokenizer(saved.manifest, data, state_dir)
    else:
        model = load_folder(folder)[0]
        tokenizer = folder_tokenizer(folder, model.config, data)
    if tokenizer is None:
        raise ConfigError(f"the tokenizer of {folder or state_dir} is not here: set data.tokenizer to its file")
    width = None if tier is None else _width(model.config, tier, model.width)
    context = tokenizer.encode([sound(prompt)])[0].tolist()
    if beams > 1:
        best = beam_search(model, context, tokens, beams=beams, width=width)[0]
        yield tokenizer.decode(list(best.tokens))
        return
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    if draft_tier is None:
        written = decode(model, context, tokens, generator=generator, temperature=temperature, top_k=top_k, width=width)
    else:
        draft_width = _width(model.config, draft_tier, model.width)
        written, _ = speculate(
            model, context, tokens,
            draft_width=draft_width, generator=generator, temperature=temperature, top_k=top_k, width=width,
        )  # fmt: skip
    yield from tokenizer.stream(written)


def evaluate(state_dir: Path, *, data: DataSection, tiers: tuple[int, ...] | None) -> dict[str, Any]:
    """Held-out loss per tier in nats per token, of the node's own weights and of the anchors. Raises as `generate`."""
    store, saved, own = load(state_dir)
    agreed = load_anchors(store, saved)
    config = own.config
    wanted = tuple(range(saved.tier, config.tiers)) if tiers is None else tiers
    widths = {tier: _width(config, tier, own.width) for tier in wanted}
    windows = _windows(config, saved, data, state_dir)
    return {
        "run_id": saved.manifest.run_id.hex(),
        "step": saved.step,
        "tokens": saved.totals.tokens,
        "unit": "nats/byte" if run_data(saved.manifest).tokenizer == BYTES else "nats/token",
        "agreed": {str(tier): held_out_loss(agreed, windows, width) for tier, width in widths.items()},
        "own": {str(tier): held_out_loss(own, windows, width) for tier, width in widths.items()},
    }


def initial_loss(state_dir: Path, *, data: DataSection, tier: int) -> float:
    """Held-out loss of the run's untrained model at `tier`, nats per token. Raises as `generate`."""
    _, saved, own = load(state_dir)
    config = own.config
    own.init_weights(saved.manifest.seed)
    return held_out_loss(own, _windows(config, saved, data, state_dir), _width(config, tier, own.width))


def _windows(
    config: ModelConfig, saved: Saved, data: DataSection, state_dir: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    corpus = text_source(data, run_tokenizer(saved.manifest, data, state_dir)).load(config.vocab_size)
    return Batches(corpus, saved.manifest.seed, b"evaluation", config.context, 1).held_out(_WINDOWS)


def _width(config: ModelConfig, tier: int | None, held: int) -> int:
    if tier is None:
        return held
    if tier >= config.tiers or tier_width(config, tier) > held:
        raise ConfigError(f"this checkpoint does not hold tier {tier}: choose a smaller one, with a higher number")
    return tier_width(config, tier)
