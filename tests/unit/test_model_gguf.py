"""GGUF files: read by the format's own reader, by transformers, and by llama.cpp where it is installed."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import TokenType

from braniac.model.config import ModelConfig
from braniac.model.errors import CheckpointError, ConfigError
from braniac.model.gguf_export import export_gguf
from braniac.model.gpt import GPT
from braniac.model.tiers import is_gain

PLAIN = ModelConfig(
    family="llama",
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=64,
    context=32,
    rope_theta=5000.0,
    rms_norm_eps=1e-5,
)
CONFIGS = {
    "plain": PLAIN,
    "tied": dataclasses.replace(PLAIN, tie_word_embeddings=True),
    "wide heads": dataclasses.replace(PLAIN, head_size=16),
    "nested heads": dataclasses.replace(
        PLAIN, num_attention_heads=16, num_key_value_heads=8, head_size=4, nested_heads=True
    ),
}
STRETCHED = dataclasses.replace(PLAIN, head_size=16, rope_scaling=(8.0, 1.0, 4.0, 64.0))


def random_model(config: ModelConfig, neurons: tuple[int, ...] | None = None) -> GPT:
    model, dice = GPT(config, neurons=neurons), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if is_gain(name) else 0.0, 0.1, generator=dice)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def transformers() -> Any:
    """The library, imported here because that takes seconds, and kept from the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TQDM_DISABLE", "1")
        import transformers
        import transformers.modeling_gguf_pytorch_utils

        yield transformers


def read_by_hugging_face(transformers: Any, path: Path) -> Any:
    """What `from_pretrained(gguf_file=...)` makes of a file, by the same steps; itself it insists on accelerate."""
    load = transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**load(path)["config"])).eval()
    tensors = load(path, return_tensors=True, model_to_load=model)["tensors"]
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    return model


@pytest.mark.parametrize("width", [64, 24, 8])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_transformers_computes_the_same_from_the_file(
    config: ModelConfig, width: int, transformers: Any, tmp_path: Path
) -> None:
    model = random_model(config)
    export_gguf(model, tmp_path / "m.gguf", width=width)
    theirs = read_by_hugging_face(transformers, tmp_path / "m.gguf")
    assert theirs.config.intermediate_size == width
    with torch.no_grad():
        wanted = theirs(tokens()).logits
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(model(tokens(), width), wanted, atol=1e-5, rtol=0)


def test_half_precision_keeps_vectors_in_full(transformers: Any, tmp_path: Path) -> None:
    model = random_model(PLAIN)
    export_gguf(model, tmp_path / "m.gguf", dtype="f16")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"F16"}
    theirs = read_by_hugging_face(transformers, tmp_path / "m.gguf")
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), theirs(tokens()).logits, atol=1e-2, rtol=0)


def test_every_field_that_llama_cpp_needs_is_there(tmp_path: Path) -> None:
    export_gguf(random_model(CONFIGS["nested heads"]), tmp_path / "m.gguf", width=24, name="a name")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    assert {key: value for key, value in found.items() if not key.startswith("GGUF.")} == {
        "general.architecture": "llama",
        "general.name": "a name",
        "general.file_type": 0,
        "llama.vocab_size": 256,
        "llama.context_length": 32,
        "llama.embedding_length": 48,
        "llama.block_count": 2,
        "llama.feed_forward_length": 24,
        "llama.attention.head_count": 6,
        "llama.attention.head_count_kv": 3,
        "llama.attention.key_length": 4,
        "llama.attention.value_length": 4,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 4,
        "llama.rope.freq_base": 5000.0,
    }
    shapes = {t.name: tuple(t.shape) for t in reader.tensors}  # columns first, as ggml counts
    assert shapes["blk.1.attn_q.weight"] == (48, 24)
    assert shapes["blk.1.attn_output.weight"] == (24, 48)
    assert shapes["blk.1.ffn_down.weight"] == (24, 48)


def test_token_i_is_byte_i(tmp_path: Path) -> None:
    export_gguf(random_model(PLAIN), tmp_path / "m.gguf")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    pieces, kinds = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    assert len(set(pieces)) == 256
    for byte in range(0x21, 0x7F):
        assert pieces[byte] == chr(byte)
    assert (pieces[0x0A], pieces[0x20], pieces[0xC3]) == ("Ċ", "Ġ", "Ã")  # as in GPT-2's vocabulary
    assert (pieces[255], kinds[255]) == ("<|endoftext|>", TokenType.CONTROL)
    assert set(kinds[:255]) == {TokenType.NORMAL}
    for key in ("bos", "eos"):
        assert fields[f"tokenizer.ggml.{key}_token_id"].contents() == 255
    (merge,) = fields["tokenizer.ggml.merges"].contents()
    never_in_utf8 = {pieces[0xC0], pieces[0xC1]}
    assert set(merge.split()) == never_in_utf8


def test_stretched_frequencies_are_divided_as_transformers_does(transformers: Any, tmp_path: Path) -> None:
    export_gguf(random_model(STRETCHED), tmp_path / "m.gguf")
    (divisors,) = (t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "rope_freqs.weight")
    rope = dict(zip(("factor", "low_freq_factor", "high_freq_factor"), STRETCHED.rope_scaling, strict=False))
    rope |= {"rope_type": "llama3", "rope_theta": 5000.0, "original_max_position_embeddings": 64}
    config = transformers.LlamaConfig(hidden_size=48, num_attention_heads=8, head_dim=16, rope_parameters=rope)
    wanted = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq.numpy()
    plain = 5000.0 ** -(np.arange(8, dtype=np.float64) / 8)
    np.testing.assert_allclose(plain / divisors, wanted, rtol=1e-5)
    assert divisors.min() == 1.0
    assert divisors.max() == 8.0
    assert len(set(divisors.tolist())) > 2


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("config", [*CONFIGS.values(), STRETCHED], ids=[*CONFIGS.keys(), "stretched"])
def test_llama_cpp_computes_the_same(config: ModelConfig, dtype: Literal["f32", "f16"], tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp takes half an hour to compile: installed by hand")
    model, width = random_model(config), 24
    export_gguf(model, tmp_path / "m.gguf", width=width, dtype=dtype)
    in_full = llama_cpp.GGML_TYPE_F32  # of the key-value cache, which is in half precision by default
    theirs = llama_cpp.Llama(
        str(tmp_path / "m.gguf"), n_ctx=32, logits_all=True, type_k=in_full, type_v=in_full, n_threads=1, verbose=False
    )
    text = 'He said: "naïve  \t▁ 日本 don\'t, no ." Ċ\n\n🙂 '.encode()
    assert theirs.tokenize(text, add_bos=False) == list(text)
    assert theirs.detokenize(list(text)) == text
    assert (theirs.token_bos(), theirs.token_eos()) == (255, 255)
    theirs.eval(tokens()[0].tolist())
    with torch.no_grad():
        wanted = model(tokens()[:1], width)[0].numpy()
    np.testing.assert_allclose(theirs.scores[:32], wanted, rtol=0, atol=1e-5 if dtype == "f32" else 1e-2)


@pytest.mark.parametrize(
    ("config", "neurons", "width", "sentence"),
    [
        (dataclasses.replace(PLAIN, family="nanogpt"), None, None, "cannot run the nanogpt family"),
        (PLAIN, (64, 32), None, r"hold \(64, 32\) FFN neurons: choose one width"),
        (PLAIN, (64, 32), 64, "exceeds the 32 neurons"),
        (PLAIN, None, 12, "an FFN width of 12 is none of this model's"),
        (dataclasses.replace(PLAIN, vocab_size=512), None, None, "use llama.cpp's convert_hf_to_gguf.py"),
    ],
)
def test_what_has_no_form_in_llama_cpp_is_refused(
    config: ModelConfig, neurons: tuple[int, ...] | None, width: int | None, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        export_gguf(random_model(config, neurons), tmp_path / "m.gguf", width=width)
    assert not list(tmp_path.iterdir())


def test_nothing_partial_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, target = random_model(PLAIN), tmp_path / "m.gguf"
    with pytest.raises(CheckpointError, match="cannot write"):
        export_gguf(model, tmp_path / "nowhere" / "m.gguf")
    export_gguf(model, target)
    good = target.read_bytes()
    with pytest.raises(CheckpointError, match="exists"):
        export_gguf(model, target)
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[3, 3] = 1e6
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is not finite in torch.float16"):
        export_gguf(model, target, dtype="f16", overwrite=True)
    assert target.read_bytes() == good
    export_gguf(model, target, overwrite=True)
    assert target.read_bytes() != good
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    with pytest.raises(CheckpointError, match=r"pip install 'braniac-node\[gguf\]'"):
        export_gguf(model, tmp_path / "other.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
