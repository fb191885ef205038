"""A llama-family model as one GGUF file, for llama.cpp and what builds on it.

What is unusual:
* llama.cpp rotates neighbouring pairs of a head's elements, Hugging Face and this package its two halves. So the rows
  of q_proj and k_proj are interleaved, as llama.cpp's own converter does.
* Llama 3's stretched frequencies become a tensor of divisors, `rope_freqs`.
* Bytes as tokens become a byte-level BPE vocabulary (GPT-2's printable stand-in for each byte) without merges, so that
  token i is row i of the embedding and any text becomes exactly its UTF-8 bytes. llama.cpp demands a list of merges:
  the one it gets is of two bytes that no UTF-8 text contains. Token 255, which separates documents, is begin and end.
Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from braniac.model.attention import rotary_angles
from braniac.model.checkpoint_files import scratch_beside, sync_directory
from braniac.model.config import ModelConfig
from braniac.model.errors import CheckpointError, ConfigError
from braniac.model.gpt import GPT
from braniac.model.hf import on_disk
from braniac.model.tiers import EMBEDDING, FINAL_NORM, HEAD, heads_at, is_gain, is_input_major, layer_of, shapes_at
from braniac.model.tokenizer import SEPARATOR, ByteTokenizer

if TYPE_CHECKING:
    import gguf

FileType = Literal["f32", "f16"]
"""How matrices are stored; vectors are float32 in both."""

_TYPES: dict[FileType, torch.dtype] = {"f32": torch.float32, "f16": torch.float16}
_NAMES = {EMBEDDING: "token_embd.weight", FINAL_NORM: "output_norm.weight", HEAD: "output.weight"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def export_gguf(
    model: GPT,
    target: Path,
    *,
    width: int | None = None,
    dtype: FileType = "f32",
    name: str = "braniac",
    overwrite: bool = False,
) -> None:
    """Write the first `width` FFN neurons of each layer, or all that the model holds, as the file `target`.

    The file appears complete or not at all; one tensor at a time is held beside the model. Raises ConfigError for a
    model that llama.cpp has no form for (nanogpt, widths that differ between layers, tokens that are not bytes) or a
    width that it has not; CheckpointError if `target` exists, cannot be written, or the weights are not finite, or if
    the gguf package is not installed.
    """
    widths = model.held_widths(width)
    _check_kind(model.config, widths)
    if not overwrite and target.exists():
        raise CheckpointError(f"{target} exists: choose another name, or ask for it to be overwritten.")
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "the gguf package is missing: install it with pip install 'braniac-node[gguf]'."
        ) from error
    with scratch_beside(target) as scratch:
        writer = gguf.GGUFWriter(scratch / "new", "llama")
        try:
            writer.add_name(name)
            writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "f32" else gguf.LlamaFileType.MOSTLY_F16)
            _add_shape(writer, model.config, widths[0])
            _add_byte_tokenizer(writer, gguf.TokenType.NORMAL, gguf.TokenType.CONTROL)
            _write_tensors(writer, _plan(model, widths, _TYPES[dtype]))
        finally:
            writer.close()
        with (scratch / "new").open("rb") as file:
            os.fsync(file.fileno())
        (scratch / "new").replace(target)
        sync_directory(target.parent)


def _check_kind(config: ModelConfig, widths: Sequence[int]) -> None:
    if config.family != "llama":
        raise ConfigError(f"llama.cpp cannot run the {config.family} family: only llama models can become GGUF files.")
    if len(set(widths)) > 1:
        raise ConfigError(f"the layers hold {tuple(widths)} FFN neurons: choose one width for all of them.")
    if config.vocab_size != ByteTokenizer.vocab_size:
        raise ConfigError(
            f"only the byte tokenizer (vocab_size {ByteTokenizer.vocab_size}) is known here, not one of "
            f"{config.vocab_size} tokens: save a Hugging Face folder and use llama.cpp's convert_hf_to_gguf.py."
        )


def _add_shape(writer: gguf.GGUFWriter, config: ModelConfig, width: int) -> None:
    kv_heads = heads_at(config, width)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(width)
    writer.add_head_count(kv_heads * (config.num_attention_heads // config.kv_heads))
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)


def _add_byte_tokenizer(writer: gguf.GGUFWriter, normal: int, control: int) -> None:
    tokens = [_stand_in(byte) for byte in range(ByteTokenizer.vocab_size)]
    unseen = f"{tokens[0xC0]} {tokens[0xC1]}"
    types = [normal] * len(tokens)
    tokens[SEPARATOR], types[SEPARATOR] = "<|endoftext|>", control
    writer.add_tokenizer_model("gpt2")
    # How words are split cannot matter without merges; but this kind of splitting is the one under which llama.cpp does
    # not also remove spaces before punctuation when it turns tokens into text.
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([unseen])
    writer.add_bos_token_id(SEPARATOR)
    writer.add_eos_token_id(SEPARATOR)
    writer.add_add_bos_token(False)


def _stand_in(byte: int) -> str:
    """The printable character that GPT-2's byte-level BPE writes for a byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in visible else chr(0x100 + sum(other not in visible for other in range(byte)))


@dataclasses.dataclass(frozen=True, slots=True)
class _Planned:
    """A tensor to be: the header of a GGUF file precedes all data, and not all data fit beside the model."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


def _plan(model: GPT, widths: Sequence[int], dtype: torch.dtype) -> dict[str, _Planned]:
    """Every tensor by its GGUF name, row-major."""
    config, plan = model.config, dict[str, _Planned]()
    if config.rope_scaling:
        divisors = functools.partial(_divisors, config)
        plan["rope_freqs.weight"] = _Planned((config.head_dim // 2,), torch.float32, divisors)
    for name, shape in shapes_at(config, widths).items():
        stored_as = torch.float32 if is_gain(name) else dtype
        make = functools.partial(_rows, model, name, shape[0], stored_as)
        plan[_renamed(name)] = _Planned(shape[::-1] if is_input_major(name) else shape, stored_as, make)
    return plan


def _rows(model: GPT, name: str, rows: int, dtype: torch.dtype) -> Tensor:
    tensor = on_disk(model, name, rows, dtype)
    return _interleaved(tensor, model.config.head_dim) if ".q_proj." in name or ".k_proj." in name else tensor


def _renamed(name: str) -> str:
    layer = layer_of(name)
    if layer is None:
        return _NAMES[name]
    inner = name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight")
    return f"blk.{layer}.{_LAYER_NAMES[inner]}.weight"


def _interleaved(rows_RD: Tensor, head_dim: int) -> Tensor:
    """The rows of each head in the order 0, K/2, 1, K/2 + 1, ...: halves become neighbouring pairs."""
    return rows_RD.reshape(-1, 2, head_dim // 2, rows_RD.shape[1]).transpose(1, 2).reshape(rows_RD.shape)


def _divisors(config: ModelConfig) -> Tensor:
    """What Llama 3's rule divides each frequency by, float32 [K/2]; the angles of position 1 are the frequencies."""
    plain, stretched = (
        rotary_angles(dataclasses.replace(config, context=2, rope_scaling=s))[1] for s in ((), config.rope_scaling)
    )
    return plain / stretched


def _write_tensors(writer: gguf.GGUFWriter, plan: Mapping[str, _Planned]) -> None:
    for name, tensor in plan.items():
        kind = np.dtype(np.float32 if tensor.dtype == torch.float32 else np.float16)
        writer.add_tensor_info(name, tensor.shape, kind, math.prod(tensor.shape) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in plan.values():
        writer.write_tensor_data(tensor.make().numpy())
