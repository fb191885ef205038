"""Hugging Face's own software reads what we write, and we read what it writes, with equal weights and logits."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from braniac.model.config import ModelConfig
from braniac.model.errors import ConfigError
from braniac.model.gpt import GPT
from braniac.model.hf import load_folder, load_tier, save_folder, save_tiers
from braniac.model.tier_manifest import read_manifest
from braniac.model.tiers import is_gain

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one head each": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 16},
    "stretched": {"rope_parameters": LLAMA3, "max_position_embeddings": 64},
    "other theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}},
    "untidy width": {"intermediate_size": 68, "rms_norm_eps": 1e-5},
}
OURS = ModelConfig(
    family="llama",
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=64,
    context=32,
)
NESTED = dataclasses.replace(OURS, num_attention_heads=16, num_key_value_heads=8, head_size=4, nested_heads=True)
CONFIGS = {"plain": OURS, "tied": dataclasses.replace(OURS, tie_word_embeddings=True), "nested heads": NESTED}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@pytest.fixture(scope="module")
def transformers() -> Any:
    """The library, imported here because that takes seconds, and kept from the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import transformers

        transformers.utils.logging.disable_progress_bar()
        yield transformers


def tokens(length: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(1))


def stock(transformers: Any, **changes: Any) -> Any:
    """A small random LlamaForCausalLM."""
    settings = {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes})).eval()
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if is_gain(name) else 0.0, 0.1, generator=dice)
    return model


def random_model(config: ModelConfig) -> GPT:
    model, dice = GPT(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if is_gain(name) else 0.0, 0.1, generator=dice)
    return model


def read_by_hugging_face(transformers: Any, path: Path) -> Any:
    """What from_pretrained makes of a folder, provided that it fits without a gap."""
    model, report = transformers.LlamaForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@torch.no_grad()
def assert_same_logits(ours: GPT, theirs: Any, width: int | None = None) -> None:
    found, wanted = ours(tokens(), width), theirs(tokens()).logits
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("variant", "sharded"), [*((variant, False) for variant in VARIANTS), ("grouped", True), ("tied", True)]
)
def test_a_dense_llama_loads_unchanged_and_survives_a_round_trip(
    variant: str, sharded: bool, transformers: Any, tmp_path: Path
) -> None:
    theirs = stock(transformers, **VARIANTS[variant])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if sharded else "5GB")
    assert (tmp_path / "theirs" / "model.safetensors").exists() == (not sharded)
    ours, held = load_folder(tmp_path / "theirs")
    assert (held.tier, held.whole) == (0, True)
    assert_same_logits(ours, theirs)

    save_folder(ours, tmp_path / "ours", max_shard_bytes=20_000 if sharded else 1 << 30)
    assert (tmp_path / "ours" / "model.safetensors").exists() == (not sharded)
    again = read_by_hugging_face(transformers, tmp_path / "ours")
    before, after = theirs.state_dict(), again.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, theirs(tokens()).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_becomes_float32_exactly(dtype: torch.dtype, transformers: Any, tmp_path: Path) -> None:
    theirs = stock(transformers).to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, _ = load_folder(tmp_path / "theirs")
    assert all(torch.equal(p, theirs.state_dict()[name].float()) for name, p in ours.named_parameters() if p.dim() == 1)
    save_folder(ours, tmp_path / "ours", dtype=dtype)
    again = read_by_hugging_face(transformers, tmp_path / "ours")
    assert again.dtype == dtype
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in again.state_dict().items())
    # Not theirs.float(): that would leave the rotary frequencies as coarse as the weights.
    assert_same_logits(ours, transformers.LlamaForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32))


@each_config
@pytest.mark.parametrize("width", [8, 24, 40, 56])
def test_any_width_is_a_stock_llama(config: ModelConfig, width: int, transformers: Any, tmp_path: Path) -> None:
    model, path = random_model(config), tmp_path / "m"
    heads = 2 * width // 8 if config.nested_heads else config.num_attention_heads
    if config.hidden_size % heads:
        with pytest.raises(ConfigError, match=f"at {width} FFN neurons this model has {heads} attention heads"):
            save_folder(model, path, width=width)
        assert not list(tmp_path.iterdir())
        return
    save_folder(model, path, width=width)
    theirs = read_by_hugging_face(transformers, path)
    assert (theirs.config.intermediate_size, theirs.config.num_attention_heads) == (width, heads)
    assert_same_logits(model, theirs, width)
    again, held = load_folder(path)
    assert (again.config, again.neurons) == (config, (width, width))
    assert (held.width, held.base) == (width, 64)
    assert torch.equal(again(tokens()), model(tokens(), width))


@each_config
def test_all_tiers_are_written_with_a_manifest(config: ModelConfig, transformers: Any, tmp_path: Path) -> None:
    model = random_model(config)
    save_tiers(model, tmp_path / "m", [1, 2, 3])
    manifest = read_manifest(tmp_path / "m")
    assert manifest is not None
    assert sorted(manifest.tiers) == [0, 1, 2, 3]
    for tier in range(4):
        width, name = 64 >> tier, f"m-tier{tier}" if tier else "m"
        theirs = read_by_hugging_face(transformers, tmp_path / name)
        assert (theirs.config.matformer_tier, theirs.config.matformer_base_intermediate_size) == (tier, 64)
        assert_same_logits(model, theirs, width)
        for strategy in ("auto", "universal") if tier else ("auto", "universal", "sliced"):
            ours, held = load_tier(tmp_path / "m", tier, strategy)
            assert (ours.tier, ours.neurons) == (tier, (width, width))
            assert held.tier == (tier if strategy == "auto" else 0)
            assert torch.equal(ours(tokens()), model(tokens(), width))


def test_texts_end_where_ours_do(transformers: Any, tmp_path: Path) -> None:
    save_folder(random_model(OURS), tmp_path / "bytes")
    ends = read_by_hugging_face(transformers, tmp_path / "bytes").generation_config
    assert (ends.bos_token_id, ends.eos_token_id) == (255, 255)

    stock(transformers, bos_token_id=3, eos_token_id=[4, 5]).save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    ours, _ = load_folder(tmp_path / "theirs")
    save_tiers(ours, tmp_path / "ours", [1], source=tmp_path / "theirs")
    ends = read_by_hugging_face(transformers, tmp_path / "ours-tier1").generation_config
    assert (ends.bos_token_id, ends.eos_token_id) == (3, [4, 5])
    assert (tmp_path / "ours-tier1" / "tokenizer.json").read_text() == "{}"
