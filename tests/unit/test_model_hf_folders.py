"""Checkpoint folders of our own kinds, and folders that do not fit, from anybody: refused, and nothing left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from braniac.model.config import ModelConfig
from braniac.model.errors import CheckpointError, ConfigError
from braniac.model.gpt import GPT
from braniac.model.hf import load_folder, load_tier, save_folder, save_tiers
from braniac.model.slicing import CheckpointWarning
from braniac.model.tiers import EMBEDDING, HEAD, is_gain

LLAMA = ModelConfig(
    family="llama",
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    vocab_size=32,
    context=16,
)
NANOGPT = dataclasses.replace(LLAMA, family="nanogpt", logit_softcap=20.0)
PLAIN = dataclasses.replace(NANOGPT, qk_norm=False, embedding_norm=False, activation="gelu", logit_softcap=0.0)
RICH = dataclasses.replace(NANOGPT, value_embeddings=1, skip_connections=True)
NESTED = dataclasses.replace(NANOGPT, num_attention_heads=16, num_key_value_heads=8, head_size=4, nested_heads=True)
UP = "model.layers.1.mlp.up_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def random_model(config: ModelConfig, neurons: tuple[int, ...] | None = None) -> GPT:
    model, dice = GPT(config, neurons=neurons), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if is_gain(name) else 0.0, 0.3, generator=dice)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(0, 32, (2, 16), generator=torch.Generator().manual_seed(1))


def assert_same(found: GPT, wanted: GPT) -> None:
    assert found.config == wanted.config
    assert (found.tier, found.neurons) == (wanted.tier, wanted.neurons)
    for (name, a), (_, b) in zip(found.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(found(tokens()), wanted(tokens()))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Llama folder; tests change copies of it."""
    path = tmp_path_factory.mktemp("good") / "m"
    save_folder(random_model(LLAMA), path)
    return path


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "m"))


def change_config(folder: Path, **changes: Any) -> None:
    """Set keys of config.json, or remove those whose new value is `...`."""
    found = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def change_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    found = {**safetensors.torch.load_file(folder / "model.safetensors"), **changes}
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    safetensors.torch.save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("config", "neurons"),
    [
        (NANOGPT, None),
        (NANOGPT, (32, 32)),
        (NANOGPT, (64, 24)),
        (PLAIN, None),
        (RICH, None),
        (RICH, (64, 24)),
        (NESTED, None),
        (NESTED, (64, 24)),
        (NESTED, (24, 24)),
        (dataclasses.replace(NANOGPT, tie_word_embeddings=True, rope_scaling=(8.0, 1.0, 4.0, 8.0)), None),
        (LLAMA, (24, 64)),
        (dataclasses.replace(NESTED, family="llama"), (24, 64)),
    ],
)
def test_models_that_are_no_stock_llama_round_trip(
    config: ModelConfig, neurons: tuple[int, ...] | None, tmp_path: Path
) -> None:
    model = random_model(config, neurons)
    save_folder(model, tmp_path / "m")
    document = json.loads((tmp_path / "m" / "config.json").read_text())
    assert document["model_type"] == f"braniac-{config.family}"
    found, held = load_folder(tmp_path / "m")
    assert (held.width, held.base) == (model.width, 64)
    assert (document["intermediate_size"], document["matformer_base_intermediate_size"]) == (model.width, 64)
    if neurons == (32, 32):
        model.tier = 1  # which these neurons are
    assert_same(found, model)


@pytest.mark.parametrize("config", [LLAMA, NANOGPT, NESTED, RICH], ids=["llama", "nanogpt", "nested", "rich"])
def test_a_narrower_width_reads_only_a_prefix(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config)
    save_folder(model, tmp_path / "m", max_shard_bytes=5000)
    for width in (8, 24, 64):
        found, held = load_folder(tmp_path / "m", width=width)
        assert found.neurons == (width, width)
        assert held.whole
        assert torch.equal(found(tokens()), model(tokens(), width))
    with pytest.raises(ConfigError, match="an FFN width of 12 is none of this model's"):
        load_folder(tmp_path / "m", width=12)
    save_folder(model, tmp_path / "slice", width=16)
    with pytest.raises(ConfigError, match="holds 16 FFN neurons"):
        load_folder(tmp_path / "slice", width=32)


def test_shards_keep_to_their_size_and_the_index_adds_up(tmp_path: Path) -> None:
    model = random_model(LLAMA)
    save_folder(model, tmp_path / "m", max_shard_bytes=5000)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = [safetensors.torch.load_file(file) for file in sorted((tmp_path / "m").glob("*.safetensors"))]
    sizes = [sum(t.numel() * 4 for t in shard.values()) for shard in shards]
    assert len(shards) > 3
    assert max(sizes) <= 5000
    assert sum(sizes) == index["metadata"]["total_size"] == sum(p.numel() * 4 for p in model.parameters())
    assert sorted(index["weight_map"]) == sorted(name for shard in shards for name in shard)
    assert_same(load_folder(tmp_path / "m")[0], model)


def test_the_context_can_be_shortened_but_not_stretched(folder: Path) -> None:
    model, _ = load_folder(folder, context=8)
    assert model.config == dataclasses.replace(LLAMA, context=8)
    with pytest.raises(CheckpointError, match="max_position_embeddings 16: ask for a context of at most that, not 17"):
        load_folder(folder, context=17)


def test_a_dense_folder_gets_the_tiers_that_its_width_allows(tmp_path: Path) -> None:
    for width, factor in ((64, 8), (68, 4), (70, 2), (71, 1)):
        config = dataclasses.replace(LLAMA, intermediate_size=width, matformer_factor=factor)
        save_folder(random_model(config), tmp_path / str(width))
        change_config(
            tmp_path / str(width), matformer_factor=..., matformer_tier=..., matformer_base_intermediate_size=...
        )
        assert load_folder(tmp_path / str(width))[0].config == config


def test_derived_and_repeated_tensors_of_older_writers_are_passed_over(folder: Path, tmp_path: Path) -> None:
    change_tensors(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert_same(load_folder(folder)[0], random_model(LLAMA))
    tied = random_model(dataclasses.replace(LLAMA, tie_word_embeddings=True))
    save_folder(tied, tmp_path / "tied")
    change_tensors(tmp_path / "tied", {HEAD: tied.get_parameter(EMBEDDING).detach().clone()})
    assert_same(load_folder(tmp_path / "tied")[0], tied)
    change_tensors(tmp_path / "tied", {HEAD: torch.zeros(32, 16)})
    with pytest.raises(CheckpointError, match=r"holds a 'lm_head.weight' that is not 'model.embed_tokens.weight'"):
        load_folder(tmp_path / "tied")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "mistral"}, "has model_type 'mistral': one of llama, braniac-nanogpt, braniac-llama"),
        ({"model_type": ...}, "has model_type None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only .'LlamaForCausalLM'. can be run"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu': only 'silu'"),
        ({"attention_bias": True}, "has attention_bias True: only False"),
        ({"mlp_bias": True}, "has mlp_bias True: only False"),
        ({"quantization_config": {"bits": 4}}, "has quantization_config {'bits': 4}: only None"),
        ({"partial_rotary_factor": 0.5}, "has partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "has rope_type 'yarn': only default and llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "has rope_type 'linear'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks 'low_freq_factor'"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "has rope_theta 10000.0: rope_param"),
        ({"rope_parameters": {"mrope_section": [1]}}, "'mrope_section' is none of the keys"),
        ({"rope_scaling": {"factor": 2.0}, "rope_parameters": {"factor": 3.0}}, "rope_parameters says otherwise"),
        ({"rope_scaling": [1]}, r"has rope_scaling \[1\]: an object is expected"),
        ({"rope_theta": 10**400}, "cannot be used: .*rope_theta"),
        ({"hidden_size": ...}, "lacks 'hidden_size'"),
        ({"hidden_size": "16"}, "has hidden_size '16': a positive whole number"),
        ({"num_hidden_layers": 3}, r"lacks the tensor 'model.layers.2.self_attn.q_proj.weight' of shape \(16, 16\)"),
        ({"num_hidden_layers": 1}, r"holds 'model.layers.1.*', which its config.json leaves no place for"),
        ({"num_attention_heads": 3}, "cannot be used: model.num_attention_heads 3 cannot be grouped over 2"),
        ({"num_key_value_heads": 4}, r"'model.layers.0.self_attn.k_proj.weight' of shape \(8, 16\).* needs \(16, 16\)"),
        ({"intermediate_size": 32}, "has intermediate_size 32 but the tensors hold 64 neurons"),
        ({"matformer_factor": 3}, "cannot be used: model.matformer_factor is 3"),
        (
            {"matformer_tier": 1, "matformer_base_intermediate_size": 128, "matformer_factor": 1},
            "an FFN width of 64 is none",
        ),
        ({"vocab_size": 1 << 30}, "cannot be used: model.vocab_size"),
        ({"tie_word_embeddings": True}, "holds a 'lm_head.weight' that is not"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(changes: dict[str, Any], sentence: str, folder: Path) -> None:
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_folder(folder)
    assert str(folder) in str(caught.value) or "config.json has" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"a": 1, "a": 2}', '{"a": "' + "x" * (1 << 20) + '"}'])
def test_a_config_that_is_no_json_object_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json "):
        load_folder(folder)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({HEAD: None}, "lacks the tensor 'lm_head.weight'"),
        ({UP: None}, f"lacks the tensor '{UP}'"),
        ({"evil": torch.zeros(1)}, "holds 'evil', which"),
        ({UP: torch.zeros(32, 16)}, r"of shape \(32, 16\): config.json needs \(64, 16\)"),
        ({DOWN: torch.zeros(64, 16)}, r"of shape \(64, 16\): config.json needs \(16, 64\)"),
        ({DOWN: torch.zeros(4)}, r"of shape \(4,\): config.json needs \(16, 64\)"),
        ({HEAD: torch.full((32, 16), torch.nan)}, "holds 'lm_head.weight' with values that are not finite"),
        ({HEAD: torch.full((32, 16), torch.inf)}, "not finite"),
        ({HEAD: torch.zeros(32, 16, dtype=torch.int8)}, "holds 'lm_head.weight' as I8: one of F32, BF16, F16"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    changes: dict[str, torch.Tensor | None], sentence: str, folder: Path
) -> None:
    change_tensors(folder, changes)
    with pytest.raises(CheckpointError, match=sentence):
        load_folder(folder)


def test_layers_of_different_widths_must_be_announced(tmp_path: Path) -> None:
    save_folder(random_model(NANOGPT, (64, 24)), tmp_path / "m")
    for wrong in ([64, 64], [64], [24, 24], "64", [64, True]):
        change_config(tmp_path / "m", matformer_layer_widths=wrong)
        with pytest.raises(CheckpointError, match=r"matformer_layer_widths|config\.json needs"):
            load_folder(tmp_path / "m")
    change_config(tmp_path / "m", matformer_layer_widths=...)
    with pytest.raises(CheckpointError, match="lacks 'matformer_layer_widths'"):
        load_folder(tmp_path / "m")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_never_opened(name: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match=f"{name} is a pickle"):
        load_folder(folder)
    torch.save({"a": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="no valid safetensors file"):
        load_folder(folder)


def test_missing_and_cut_files_are_refused(folder: Path, tmp_path: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    for cut in (0, 7, 100, len(data) - 1):
        (folder / "model.safetensors").write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match="no valid safetensors file"):
            load_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        load_folder(folder)
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_folder(tmp_path / "nowhere")


def _to_first_shard(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda index: index["weight_map"].update({UP: name})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_to_first_shard("../m/model-00001-of-00002.safetensors"), "only .safetensors files of its own folder"),
        (_to_first_shard("/etc/x.safetensors"), "only .safetensors files of its own folder"),
        (_to_first_shard("..\\x.safetensors"), "only .safetensors files of its own folder"),
        (_to_first_shard("x" * 5000 + ".safetensors"), "only .safetensors files of its own folder"),
        (_to_first_shard("\ud800.safetensors"), "only .safetensors files of its own folder"),
        (_to_first_shard("pytorch_model.bin"), "'pytorch_model.bin', a pickle"),
        (_to_first_shard("model-00003-of-00002.safetensors"), "which is missing"),
        (_to_first_shard("model-00001-of-00002.safetensors"), f"lacks '{UP}', which"),
        (lambda index: index["weight_map"].update({"evil": "model-00001-of-00002.safetensors"}), "lacks 'evil'"),
        (lambda index: index["weight_map"].pop(UP), f"holds '{UP}', which .* does not list"),
        (lambda index: index.pop("weight_map"), "has no 'weight_map'"),
        (lambda index: index.update(weight_map={}), "has no 'weight_map'"),
        (lambda index: index.update(weight_map={"a": 1}), "has no 'weight_map'"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Any]], None], sentence: str, tmp_path: Path
) -> None:
    save_folder(random_model(LLAMA), tmp_path / "m", max_shard_bytes=18_000)
    file = tmp_path / "m" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    assert set(index["weight_map"].values()) == {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    change(index)
    file.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=sentence):
        load_folder(tmp_path / "m")


def test_shards_that_repeat_a_tensor_or_stand_beside_a_whole_file_are_refused(tmp_path: Path) -> None:
    model, path = random_model(LLAMA), tmp_path / "m"
    save_folder(model, path, max_shard_bytes=18_000)
    first, second = (path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    honest = second.read_bytes()
    repeated = {EMBEDDING: safetensors.torch.load_file(first)[EMBEDDING], **safetensors.torch.load_file(second)}
    safetensors.torch.save_file(repeated, second)
    with pytest.raises(CheckpointError, match=f"holds '{EMBEDDING}', as does"):
        load_folder(path)
    second.write_bytes(honest)
    shutil.copy(first, path / "model.safetensors")
    with pytest.raises(CheckpointError, match="remove one of them"):
        load_folder(path)


def test_nothing_is_left_behind_where_saving_fails(tmp_path: Path) -> None:
    model, target = random_model(LLAMA), tmp_path / "m"
    with pytest.raises(ConfigError, match="an FFN width of 12 is none"):
        save_folder(model, target, width=12)
    with pytest.raises(ConfigError, match="exceeds the 32 neurons"):
        save_folder(random_model(LLAMA, (64, 32)), target, width=64)
    with torch.no_grad():
        model.get_parameter(HEAD)[3, 3] = 1e6
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' is not finite in torch.float16"):
        save_folder(model, target, dtype=torch.float16)
    with torch.no_grad():
        model.get_parameter(HEAD)[3, 3] = torch.nan
    for failing in (save_folder, lambda *where: save_tiers(*where, [1])):
        with pytest.raises(CheckpointError, match="is not finite"):
            failing(model, target)
    with pytest.raises(CheckpointError, match="is missing"):
        save_folder(random_model(LLAMA), target, source=tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())
    save_folder(random_model(LLAMA), target)
    with pytest.raises(CheckpointError, match="exists"):
        save_folder(model, target)
    with pytest.raises(CheckpointError, match="is not finite"):
        save_folder(model, target, overwrite=True)
    assert_same(load_folder(target)[0], random_model(LLAMA))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_tiers_are_never_left_beside_weights_they_were_not_cut_from(tmp_path: Path) -> None:
    model = random_model(LLAMA)
    save_tiers(model, tmp_path / "m", [1, 2])
    with pytest.raises(CheckpointError, match="m exists: choose another name, or ask for it to be overwritten"):
        save_tiers(model, tmp_path / "m", [1, 2])
    with pytest.raises(CheckpointError, match=r"m-tier2 exists: .* or remove it or export that tier too"):
        save_tiers(model, tmp_path / "m", [1], overwrite=True)
    with torch.no_grad():
        model.get_parameter(HEAD).mul_(2)
    save_tiers(model, tmp_path / "m", [1, 2], overwrite=True)
    for tier in range(3):
        assert torch.equal(load_tier(tmp_path / "m", tier)[0](tokens()), model(tokens(), 64 >> tier))
    with pytest.raises(ConfigError, match="tiers are cut from a whole one"):
        save_tiers(random_model(LLAMA, (32, 32)), tmp_path / "n", [1])


def test_what_a_manifest_lists_is_checked(tmp_path: Path) -> None:
    save_tiers(random_model(LLAMA), tmp_path / "m", [1])
    change_tensors(tmp_path / "m", {HEAD: torch.zeros(32, 16)})
    with pytest.raises(CheckpointError, match="has SHA-256"):
        load_folder(tmp_path / "m")
    change_tensors(tmp_path / "m-tier1", {HEAD: torch.zeros(32, 16)})
    with pytest.raises(CheckpointError, match="has SHA-256"):
        load_tier(tmp_path / "m", 1)


def test_a_slice_without_metadata_is_known_by_its_folder(tmp_path: Path) -> None:
    model = random_model(NESTED)
    save_tiers(model, tmp_path / "m", [2])
    change_config(tmp_path / "m-tier2", matformer_tier=..., matformer_base_intermediate_size=...)
    found, held = load_folder(tmp_path / "m-tier2")
    assert (held.tier, held.base) == (2, 64)
    assert torch.equal(found(tokens()), model(tokens(), 16))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(10**310, 10**311) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@given(data=st.data())
def test_no_config_does_more_than_raise(
    data: st.DataObject, good: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    honest = json.loads((good / "config.json").read_text())
    ropes = st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor", "low_freq_factor"]), JSON, max_size=3)
    keys = st.sampled_from([*honest, "rope_parameters", "matformer_layer_widths", "nested_heads", "logit_softcap"])
    changes = data.draw(st.dictionaries(keys, JSON | ropes | st.just("braniac-llama"), min_size=1, max_size=3))
    folder = tmp_path_factory.mktemp("wild")
    (folder / "model.safetensors").symlink_to(good / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**honest, **changes}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)  # about tiers and bases that contradict the weights
        with contextlib.suppress(CheckpointError):
            model, _ = load_folder(folder)
            assert model.neurons == (64, 64)
