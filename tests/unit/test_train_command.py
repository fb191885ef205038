"""`braniac-node train`: what it says, what it leaves on disk, and that a stopped training is as good as a whole one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from braniac.model.config import ModelConfig
from braniac.model.decoding import generate as decode
from braniac.model.errors import CheckpointError, DataError, TrainingDiverged
from braniac.model.gpt import GPT
from braniac.model.hf import load_folder, save_folder
from braniac.model.objective import ObjectiveSettings
from braniac.model.tokenizer import FileTokenizer
from braniac.node import offline, train_command
from braniac.node.cli import main
from braniac.node.config import DataSection
from braniac.node.errors import AlreadyRunning, ConfigError, Incompatible, ResourceError
from braniac.node.lock import DirectoryLock
from braniac.node.settings_merge import load_config
from braniac.node.train_config import ModelSection, ObjectiveSection, TrainConfig
from tests.unit.texts import write_tokenizer

MODEL = (
    *("model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2"),
    *("model.intermediate_size=64", "model.context=16"),
)
TRAIN = (
    *("train.batch=2", "train.steps=6", "train.report_every_steps=2", "train.evaluate_every_steps=4"),
    *("train.save_every_steps=2", "train.check_gradients=true", "optimizer.warmup_steps=2"),
)
TEXT = "the quick brown fox jumps over the lazy dog, and 0123456789 wonders. " * 60


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text(TEXT)
    return path


def run(
    text: Path,
    out: Path,
    *sets: str,
    model: tuple[str, ...] = MODEL,
    restart: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """A training whose steps all take one second."""
    config = load_config(TrainConfig, None, {}, (*model, *TRAIN, *sets), {"data.paths": [text], "out.dir": out})
    seconds = itertools.count()
    return train_command.train(config, restart=restart, say=say, clock=lambda: float(next(seconds)))


def stop_at(step: int, *signals: int) -> Callable[[str], None]:
    """Sends this process the signals when it hears that so many steps are done."""

    def hear(line: str) -> None:
        if line.startswith(f"step {step}/"):
            for number in signals:
                signal.raise_signal(number)

    return hear


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training of six steps; whoever writes to it works on a copy."""
    out = tmp_path_factory.mktemp("trained") / "out"
    run(text, out)
    return out


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "copied")


# --- what it says and leaves -----------------------------------------------------------------------------------------


def test_progress_and_result(text: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    out = tmp_path / "deep" / "out"
    result = run(text, out, "objective.mode=joint", "train.steps=10", say=lines.append)
    assert [line.split("  loss")[0].split("  held-out")[0] for line in lines] == [
        "step  2/10", "step  4/10", "step 4", "step  6/10", "step  8/10", "step 8", "step 10/10", "step 10",
    ]  # fmt: skip
    losses = ", ".join(rf"{width}: \d\.\d{{4}}" for width in (64, 32, 16, 8))
    assert re.fullmatch(rf"step  2/10  loss {losses}  32 tokens/s  lr x1\.00", lines[0])
    assert re.fullmatch(rf"step 4  held-out loss {losses}", lines[2])
    tiers = result.pop("tiers")
    assert result == {
        "checkpoint": str(out / "step-10"), "step": 10, "steps": 10, "finished": True, "tokens": 320, "seconds": 10.0,
        "tokens_per_s": 32.0, "evaluated_at": 10,
    }  # fmt: skip
    assert [(tier["tier"], tier["width"]) for tier in tiers] == [(0, 64), (1, 32), (2, 16), (3, 8)]
    assert all(1 < tier["held_out_loss"] < 5.5 and 1 < tier["train_loss"] < 5.54 for tier in tiers)


def test_it_learns(text: Path, tmp_path: Path) -> None:
    sets = ("train.steps=40", "train.save_every_steps=0", "train.evaluate_every_steps=0", "objective.mode=sandwich")
    tiers = run(text, tmp_path, *sets)["tiers"]
    assert all(tier["held_out_loss"] < 3 for tier in tiers)
    assert names(tmp_path) == ["lock", "step-40"]


def test_the_last_two_checkpoints_are_kept_and_are_checkpoint_folders(trained: Path) -> None:
    assert names(trained) == ["lock", "step-4", "step-6"]
    assert names(trained / "step-6") == ["config.json", "model.safetensors", "train.json", "trainer.state"]
    model, held = load_folder(trained / "step-6")
    assert (model.config.intermediate_size, held.tier, held.width) == (64, 0, 64)


def test_a_tier_trained_alone_is_saved_as_what_it_is(text: Path, tmp_path: Path) -> None:
    result = run(text, tmp_path, "train.tier=2", "train.steps=1")
    assert [(tier["tier"], tier["width"]) for tier in result["tiers"]] == [(2, 16), (3, 8)]
    model, held = load_folder(tmp_path / "step-1")
    assert (model.width, held.tier, held.width, held.base) == (16, 2, 16, 64)


def test_a_width_per_layer_is_told_as_mixed(text: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    run(text, tmp_path, "objective.mode=layers", "objective.subwidth_fraction=1", say=lines.append)
    assert any(re.search(r"loss (\d+: [\d.]+, )*mixed: \d\.\d{4}  ", line) for line in lines)


def test_the_length_in_tokens(text: Path, tmp_path: Path) -> None:
    assert run(text, tmp_path, "train.steps=null", "train.tokens=65")["steps"] == 3  # of 32 tokens each
    with pytest.raises(ConfigError, match=r"train\.steps and train\.tokens are both set"):
        run(text, tmp_path, "train.tokens=65")


# --- going on --------------------------------------------------------------------------------------------------------

HARD = (  # as much state as possible: gains, a moving objective, decay, an odd place in the schedule
    *("model.family=llama", "model.num_key_value_heads=1", "objective.mode=joint", "objective.alphas=4,2,1,1"),
    *("objective.final_alphas=1,1,2,4", "objective.curriculum_steps=5", "objective.kl_weight=0.3"),
    *("optimizer.weight_decay=0.1", "optimizer.warmup_steps=5", "train.seed=3"),
)
LEAN = "train.precision=lean"
DRAWN = ("objective.mode=layers", "objective.subwidth_fraction=0.7", "train.tier=1", "train.kept_layers=1")


@pytest.mark.parametrize(
    ("sets", "number"),
    [((), signal.SIGTERM), (HARD, signal.SIGINT), (DRAWN, signal.SIGTERM), ((*HARD, LEAN), signal.SIGINT)],
    ids=["plain", "hard", "drawn", "lean"],
)
def test_a_stopped_training_ends_like_one_that_never_was(
    text: Path, tmp_path: Path, sets: tuple[str, ...], number: int
) -> None:
    whole = run(text, tmp_path / "whole", *sets)
    every = "train.report_every_steps=1"
    stopped = run(text, tmp_path / "parts", *sets, every, say=stop_at(3, number))
    assert (stopped["step"], stopped["finished"], stopped["evaluated_at"]) == (3, False, None)
    assert names(tmp_path / "parts") == ["lock", "step-2", "step-3"]
    lines: list[str] = []
    resumed = run(text, tmp_path / "parts", *sets, say=lines.append)
    assert lines[0] == f"going on from {tmp_path / 'parts' / 'step-3'}"
    assert content(tmp_path / "parts" / "step-6") == content(tmp_path / "whole" / "step-6")
    assert resumed["tokens"] == whole["tokens"] == 6 * 32
    assert resumed["tokens_per_s"] == 32.0  # of this session's three steps
    assert [tier["held_out_loss"] for tier in resumed["tiers"]] == [tier["held_out_loss"] for tier in whole["tiers"]]


def test_a_training_that_was_killed_goes_on_from_its_last_checkpoint(text: Path, trained: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(line: str) -> None:
        if line.startswith("step 5/"):
            raise Killed

    with pytest.raises(Killed):
        run(text, tmp_path, "train.report_every_steps=1", say=die)
    (tmp_path / ".step-6.abc").mkdir()  # what a kill in the middle of a save leaves
    lines: list[str] = []
    run(text, tmp_path, say=lines.append)
    assert lines[0] == f"going on from {tmp_path / 'step-4'}"
    assert names(tmp_path) == ["lock", "step-4", "step-6"]
    assert content(tmp_path / "step-6") == content(trained / "step-6")


def test_a_finished_training_is_only_evaluated_again(text: Path, trained: Path, copied: Path) -> None:
    lines: list[str] = []
    result = run(text, copied, say=lines.append)
    assert [line.split("  ")[0] for line in lines] == [f"going on from {copied / 'step-6'}", "step 6"]
    assert (result["step"], result["tokens"], result["seconds"]) == (6, 192, 0.0)
    assert content(copied / "step-6") == content(trained / "step-6")


def test_restart_begins_anew(text: Path, trained: Path, copied: Path) -> None:
    lines: list[str] = []
    run(text, copied, "train.seed=1", "train.steps=3", restart=True, say=lines.append)
    assert lines[0].startswith("step 2/3")
    assert names(copied) == ["lock", "step-2", "step-3"]


def test_a_second_signal_acts_at_once(text: Path, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background has it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            run(text, tmp_path, say=stop_at(4, signal.SIGTERM, signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, before)
    assert names(tmp_path) == ["lock", "step-2"]


def test_signals_act_as_before_when_it_is_over(text: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(text, tmp_path, "train.steps=1")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("optimizer.learning_rate=0.01", "trained with optimizer.learning_rate = 0.02 and now it is 0.01: set it back"),
        ("optimizer.cooldown_fraction=0", "optimizer.cooldown_fraction = 0.4 and now it is 0.0"),
        ("objective.mode=joint", 'objective.mode = "sampled" and now it is "joint"'),
        ("objective.alphas=1,2,3,4", "objective.alphas = [] and now it is [1.0, 2.0, 3.0, 4.0]"),
        ("model.num_hidden_layers=1", "model.num_hidden_layers = 2 and now it is 1"),
        ("train.seed=1", "train.seed = 0 and now it is 1"),
        ("train.batch=3", "train.batch = 2 and now it is 3"),
        ("train.tier=1", "train.tier = 0 and now it is 1"),
        ("train.steps=8", "train.steps = 6 and now it is 8, but its learning rate has begun to fall"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(text: Path, trained: Path, change: str, wanted: str) -> None:
    with pytest.raises(Incompatible, match=re.escape(wanted)) as caught:
        run(text, trained, change)
    assert str(caught.value).startswith(f"{trained / 'step-6'} was trained with ")
    assert names(trained) == ["lock", "step-4", "step-6"]


def test_another_text_is_refused(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("fox", "cat"))
    with pytest.raises(Incompatible, match=r'data\.paths = "3\d{3} tokens to train on, 2\d\d held out, digest'):
        run(other, trained)


def test_what_does_not_change_the_result_may_change(text: Path, trained: Path, tmp_path: Path) -> None:
    run(text, tmp_path, "train.report_every_steps=1", say=stop_at(3, signal.SIGINT))
    sets = ("train.kept_layers=1", "train.save_every_steps=5", "train.check_gradients=false")
    moved = text.with_name("moved.txt")
    moved.write_text(TEXT)
    run(moved, tmp_path, *sets)
    assert content(tmp_path / "step-6") == content(trained / "step-6")


def test_a_constant_learning_rate_lets_a_training_be_prolonged(text: Path, tmp_path: Path) -> None:
    sets = ("optimizer.cooldown_fraction=0", "train.save_every_steps=0")
    run(text, tmp_path / "whole", *sets)
    run(text, tmp_path / "parts", *sets, "train.steps=4")
    run(text, tmp_path / "parts", *sets)
    assert content(tmp_path / "parts" / "step-6") == content(tmp_path / "whole" / "step-6")


# --- bad input -------------------------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _spoil(path: Path) -> None:
    tensors = safetensors.torch.load(path.read_bytes())
    tensors[min(tensors)].view(-1)[0] = torch.nan
    path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))


def _lose_a_tensor(path: Path) -> None:
    tensors = safetensors.torch.load(path.read_bytes())
    del tensors[max(tensors)]
    path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))


def _edit(key: str, value: object) -> Callable[[Path], None]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), key: value})) and None


@pytest.mark.parametrize(
    ("name", "damage", "wanted"),
    [
        ("trainer.state", Path.unlink, "trainer.state cannot be read"),
        ("trainer.state", _truncate, "trainer.state cannot be read"),
        ("trainer.state", _spoil, "holds values that are not finite"),
        ("trainer.state", _lose_a_tensor, "lacks tensor 'optimizer."),
        ("model.safetensors", Path.unlink, "step-6"),
        ("model.safetensors", _truncate, "model.safetensors"),
        ("model.safetensors", _spoil, "not finite"),
        ("model.safetensors", _lose_a_tensor, "lacks the tensor 'model.layers.1"),
        ("config.json", Path.unlink, "config.json"),
        ("train.json", Path.unlink, "train.json is missing"),
        ("train.json", _truncate, "train.json is no JSON"),
        ("train.json", _edit("step", -1), "train.json has step = -1, no count"),
        ("train.json", _edit("tokens", "many"), "train.json has tokens = 'many'"),
        ("train.json", _edit("settings", None), "train.json lacks 'settings'"),
    ],
)
def test_a_damaged_checkpoint_is_named(
    text: Path, copied: Path, name: str, damage: Callable[[Path], None], wanted: str
) -> None:
    damage(copied / "step-6" / name)
    left = content(copied / "step-6")
    with pytest.raises(CheckpointError, match=re.escape(wanted)) as caught:
        run(text, copied)
    assert str(copied / "step-6") in str(caught.value)
    assert content(copied / "step-6") == left


def test_a_loss_that_is_not_finite_ends_it_and_spares_the_checkpoint(
    text: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "step-4" / "model.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["model.layers.0.self_attn.v_proj.weight"].fill_(3e38)  # finite, but their sums are not
    path.write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    shutil.rmtree(copied / "step-6")
    left = content(copied / "step-4")
    with pytest.raises(TrainingDiverged, match=r"not finite at step 4 .*; .*step-4 is as it was$"):
        run(text, copied)
    assert names(copied) == ["lock", "step-4"]
    assert content(copied / "step-4") == left
    capsys.readouterr()
    assert main(["train", "--out", str(copied), "--data", str(text), *arguments(*MODEL, *TRAIN)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[-1].startswith("braniac-node: the loss or its gradient is not finite at step 4")


def test_nothing_is_made_for_a_text_that_cannot_be_used(text: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("x" * 100)  # long enough to train on, but not to hold a window out
    for path, wanted in ((short, "evaluation needs one window"), (tmp_path / "none.txt", "does not exist")):
        with pytest.raises(DataError, match=wanted):
            run(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_trainings_do_not_share_a_folder(text: Path, tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path)
    with pytest.raises(AlreadyRunning, match="choose another --out"):
        run(text, tmp_path)
    lock.release()
    run(text, tmp_path, "train.steps=1")


def test_a_folder_that_cannot_be_made(text: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot write checkpoints to .*fox.txt.*: choose another --out"):
        run(text, text / "out")


def test_too_little_memory_is_said_before_it_is_taken(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_command, "free_memory_bytes", lambda: 1 << 20)
    with pytest.raises(
        ResourceError, match=r"training batch \d+ with context 128 at tier 0 takes \d+ MiB and 1 MiB are"
    ):
        run(text, tmp_path, model=("model.preset=tiny",))


# --- what text is read with ------------------------------------------------------------------------------------------


def test_a_tokenizer_goes_with_the_model(text: Path, tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "tokenizer.json")
    sets = (f"data.tokenizer={file}", "model.vocab_size=448")
    run(text, tmp_path / "out", *sets)
    folder = tmp_path / "out" / "step-6"
    assert (folder / "tokenizer.json").read_bytes() == file.read_bytes()
    with pytest.raises(Incompatible, match=r"was trained with data\.paths = "):  # the same text, other tokens
        run(text, tmp_path / "out", "model.vocab_size=448")
    wanted = {"tokens": 9, "temperature": 0.8, "top_k": 20, "seed": 1, "tier": None, "data": DataSection()}
    pieces = list(offline.generate(tmp_path, "the quick", folder=folder, **wanted))  # type: ignore[arg-type]
    model, tokenizer = load_folder(folder)[0], FileTokenizer.read(file)
    dice, prompt = torch.Generator().manual_seed(1), tokenizer.encode(["the quick"])[0].tolist()
    tokens = list(decode(model, prompt, 9, generator=dice, temperature=0.8, top_k=20))
    assert "".join(pieces) == "".join(tokenizer.stream(tokens))
    started = run(text, tmp_path / "more", f"model.folder={folder}", "train.steps=1", model=())
    assert (Path(started["checkpoint"]) / "tokenizer.json").read_bytes() == file.read_bytes()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"the tokenizer of .*step-6 is not here: set data\.tokenizer to its file"):
        list(offline.generate(tmp_path, "x", folder=folder, **wanted))  # type: ignore[arg-type]


def test_a_tokenizer_larger_than_the_model_is_refused(text: Path, tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="its tokenizer has 400 tokens: this model's vocabulary ends at 255"):
        run(text, tmp_path / "out", f"data.tokenizer={file}")


def test_a_shard_that_is_left_out_is_said(text: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.bin").write_bytes(b"odd")
    lines: list[str] = []
    sets = (f"data.paths={text},{tmp_path / 'bad.bin'}", "data.bad_shards=skip", "train.steps=1", *MODEL, *TRAIN[:1])
    config = load_config(TrainConfig, None, {}, sets, {"out.dir": tmp_path / "skipped"})
    train_command.train(config, restart=False, say=lines.append, clock=lambda: 0.0)
    assert any(line.startswith("left out a shard: ") and "bad.bin ends at byte 3" in line for line in lines)


# --- starting from a checkpoint --------------------------------------------------------------------------------------


def test_a_training_can_start_from_a_checkpoint(text: Path, trained: Path, tmp_path: Path) -> None:
    sets = (f"model.folder={trained / 'step-6'}", "model.context=8", "train.tier=1", "train.steps=1")
    run(text, tmp_path, *sets, "optimizer.learning_rate=1e-12", "optimizer.adam_learning_rate=1e-12", model=())
    started, _ = load_folder(tmp_path / "step-1")
    origin, _ = load_folder(trained / "step-6")
    assert (started.config.context, started.width) == (8, 32)
    for name, p in started.named_parameters():
        torch.testing.assert_close(p, origin.get_parameter(name)[: len(p)], rtol=0, atol=1e-9)
    with pytest.raises(Incompatible, match=r'model\.folder = ".*step-6" and now it is ".*step-4"'):
        run(text, tmp_path, f"model.folder={trained / 'step-4'}", *sets[1:], model=())


def test_a_dense_llama_can_become_a_matformer(text: Path, tmp_path: Path) -> None:
    dense = GPT(
        ModelConfig(
            family="llama", hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
            context=16, matformer_factor=1,
        )
    )  # fmt: skip
    dense.init_weights(3)
    save_folder(dense, tmp_path / "dense")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    stock = {key: value for key, value in config.items() if "matformer" not in key}
    (tmp_path / "dense" / "config.json").write_text(json.dumps(stock))
    result = run(text, tmp_path / "out", f"model.folder={tmp_path / 'dense'}", "train.steps=1", model=())
    assert [tier["width"] for tier in result["tiers"]] == [48, 24, 12, 6]


def test_a_checkpoint_has_its_own_sizes(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.hidden_size and model\.folder are both set: drop one"):
        run(text, tmp_path, f"model.folder={tmp_path}", model=("model.hidden_size=32",))


# --- settings and the command line -----------------------------------------------------------------------------------


def arguments(*sets: str) -> list[str]:
    return [argument for text in sets for argument in ("--set", text)]


def test_every_field_of_model_and_objective_can_be_set() -> None:
    model = {field.name for field in dataclasses.fields(ModelConfig)}
    assert set(ModelSection.model_fields) == model | {"preset", "folder"}
    assert set(ObjectiveSection.model_fields) == {field.name for field in dataclasses.fields(ObjectiveSettings)}
    changed = {"family": "llama", "rope_scaling": (8.0, 1.0, 4.0, 64.0), "tie_word_embeddings": True, "context": 64}
    built = ModelSection.model_validate({"preset": "small", **changed}).build()
    assert {key: getattr(built, key) for key in changed} == changed
    assert (built.hidden_size, built.intermediate_size) == (384, 1536)


def test_show_config_prints_a_file_that_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ("objective.alphas=1,1,1,1", "objective.alphas.0=2.0", "model.tie_word_embeddings=true", "train.tokens=99")
    assert main(["train", "--show-config", "--out", "~/there", *arguments(*sets)]) == 0
    file = tmp_path / "train.toml"
    file.write_text(capsys.readouterr().out)
    config = load_config(TrainConfig, file, {"BRANIAC_TRAIN__train__batch": "3"}, ["objective.alphas.3=0.5"], {})
    assert config.objective.alphas == (2.0, 1.0, 1.0, 0.5)
    assert (config.model.tie_word_embeddings, config.train.tokens, config.train.batch) == (True, 99, 3)
    assert config.out.dir == Path.home() / "there"


@pytest.mark.parametrize(
    ("mistake", "wanted"),
    [
        ("optimiser.learning_rate=1", "did you mean 'optimizer.learning_rate'?"),
        ("optimizer.lr=1", "unknown setting 'optimizer.lr' (from --set)"),
        ("network.peers=x", "`braniac-node train --show-config` lists all there are"),
        ("optimizer.learning_rate=fast", 'optimizer.learning_rate = "fast" (from --set) cannot be used'),
        ("objective.mode=all", "expected 'fixed', 'sampled', 'sandwich', 'joint' or 'layers'"),
        ("objective.alphas.0=2", "objective.alphas has 0 items, counted from 0: set the whole list first"),
        ("objective.alphas=1,2", "objective.alphas has 2 weights: give one for each of the 4 tiers held"),
        ("objective.kl_weight=-1", "objective.kl_weight is -1.0: it must be at least 0"),
        ("model.hidden_size=33", "model.hidden_size 33 cannot be split over 2 heads"),
        ("model.preset=huge", "model.preset"),
        ("train.tier=4", "tier 4 does not exist in this model: choose one from 0 (whole) to 3"),
    ],
)
def test_a_mistake_ends_in_a_sentence(
    text: Path, tmp_path: Path, mistake: str, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--out", str(tmp_path / "out"), "--data", str(text), *arguments(mistake)]) == 2
    shown = capsys.readouterr()
    assert wanted in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""
    assert not (tmp_path / "out").exists()


def test_the_command_for_people_and_for_programs(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--out", str(tmp_path), "--data", str(text), *arguments(*MODEL, *TRAIN)]
    assert main(command) == 0
    shown = capsys.readouterr()
    table = shown.out.splitlines()
    assert table[0] == "TIER  WIDTH  PARAMETERS  TRAIN LOSS  HELD-OUT LOSS"
    assert re.fullmatch(r"3     8      25,600      [\d.-]+ +\d\.\d{4}", table[4])
    assert re.fullmatch(r"6 of 6 steps, 192 tokens, [\d,]+ tokens/s, losses in nats per token", table[5])
    assert table[6:] == [f"checkpoint {tmp_path / 'step-6'}"]
    assert shown.err.startswith("step 2/6  loss ")
    assert main([*command, "--restart", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["step"], result["finished"], len(result["tiers"])) == (6, True, 4)
    assert main([*command, "--set", "train.seed=1"]) == 5
    assert "train.seed = 0 and now it is 1" in capsys.readouterr().err
