"""Runs as their founder describes them: what a description amounts to, and the sentence that each mistake gets."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from braniac.model.config import PRESETS, ModelConfig
from braniac.model.errors import DataError
from braniac.model.tokenizer import FileTokenizer
from braniac.model.trainer import TrainSettings
from braniac.node import bridge, run_file
from braniac.node.cli import main
from braniac.node.config import TrainSection
from braniac.node.errors import ConfigError, Incompatible
from braniac.node.founding import RECIPES, TURNS, train_settings
from braniac.node.identity_file import load
from braniac.node.run_data import run_data
from braniac.node.run_example import EXAMPLE
from braniac.node.run_spec import manifest_of, parse_spec, read_spec
from braniac.protocol.codec import CodecRules
from braniac.protocol.errors import VersionMismatch
from braniac.protocol.identity import Identity
from braniac.protocol.manifest import Manifest, MergeRules, open_manifest, sign_manifest
from tests.unit.node_harness import CONFIG, EPOCH_S, identity
from tests.unit.texts import write_tokenizer

MINIMAL = {"name": "mine", "model": {"preset": "tiny"}}


def manifest(**more: Any) -> Manifest:
    return manifest_of(parse_spec({**MINIMAL, **more}, "run.yaml"), identity(0), EPOCH_S)[0]


def sentence(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        manifest_of(read_spec(path), identity(0), EPOCH_S)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_example_says_what_would_hold_without_it(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(EXAMPLE)
    made = manifest_of(read_spec(tmp_path / "run.yaml"), identity(0), EPOCH_S)[0]
    plain = manifest(name=made.name)
    assert run_data(made).text == "English novels, out of copyright"
    assert dataclasses.replace(made, data=plain.data) == plain
    assert run_data(made).optimizer == run_data(plain).optimizer


def test_what_is_left_out_is_the_presets() -> None:
    made, pace = manifest(model={"preset": "small"}), RECIPES["small"]
    assert bridge.model_of(made)[0] == PRESETS["small"]
    assert (made.slot_s, made.window) == (pace.slot_s, pace.fragments)
    assert (made.up.per_tile, made.down.per_tile) == (pace.up_per_tile, pace.down_per_tile)
    assert (made.up.magnitude_bits, made.down.magnitude_bits) == (1, 2)
    assert (made.up.turns, made.down.turns) == (TURNS, 1)


def test_everything_that_is_described_is_in_the_manifest() -> None:
    made = manifest(
        model={"preset": "tiny", "num_hidden_layers": 3},
        seed=7,
        slot_s=2.5,
        fragments=12,
        codec={"up": {"per_tile": 32, "magnitude_bits": 2, "turns": 1}, "down": {"per_tile": 64, "magnitude_bits": 3}},
        merge={"step": 0.5, "coverage": 1, "margin_percent": 40},
        admission={"who": "anybody", "weight_cap": 2},
    )
    assert bridge.model_of(made)[0] == dataclasses.replace(PRESETS["tiny"], num_hidden_layers=3)
    assert (made.seed, made.slot_ms, made.window) == (7, 2500, 12)
    assert made.up == CodecRules(32, 2, 1)
    assert (made.down.per_tile, made.down.magnitude_bits) == (64, 3)
    assert made.merge == MergeRules(step_q16=1 << 15, coverage_halves=2, weight_cap=2, margin_percent=40)
    assert (made.founder, made.epoch_ms) == (identity(0).peer_id, int(EPOCH_S * 1000))


def test_the_optimizer_recipe_is_what_joiners_train_with() -> None:
    recipe = {"learning_rate": 0.005, "adam_learning_rate": 0.002, "warmup_steps": 3, "weight_decay": 0.1}
    made = manifest(optimizer=recipe, seed=4)
    assert train_settings(TrainSection(batch=2, device="cpu"), made) == dataclasses.replace(
        TrainSettings(), batch=2, seed=4, **recipe
    )
    own = train_settings(TrainSection(learning_rate=0.5), made)
    assert (own.learning_rate, own.weight_decay) == (0.5, 0.1)


def test_a_tokenizer_is_named_by_its_hash(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path / "tokenizer.json")
    model = {"preset": "tiny", "vocab_size": 448}
    assert run_data(manifest(model=model, data={"tokenizer": str(file)})).tokenizer == FileTokenizer.read(file).name
    assert run_data(manifest()).tokenizer == "bytes"
    with pytest.raises(ConfigError, match="vocab_size = 256 is too small: the tokenizer has more tokens"):
        manifest(data={"tokenizer": str(file)})
    with pytest.raises(DataError, match="the tokenizer gpt2 cannot be read"):
        manifest(data={"tokenizer": "gpt2"})


def test_a_model_of_ones_own_needs_a_pace_of_its_own(tmp_path: Path) -> None:
    model = {key: value for key, value in CONFIG.to_dict().items() if value != getattr(_defaults(), key, None)}
    pace = {"slot_s": 1.0, "fragments": 5, "codec": {"up": {"per_tile": 512}, "down": {"per_tile": 2048}}}
    made = manifest(model=model, **pace)
    assert bridge.model_of(made)[0] == CONFIG
    lacking = sentence(tmp_path / "run.yaml", yaml.safe_dump({**MINIMAL, "model": model, "slot_s": 1.0}))
    assert "lacks fragments, codec.up.per_tile, codec.down.per_tile" in lacking


def _defaults() -> ModelConfig:
    """A model of which every key that has a default has it."""
    return ModelConfig(hidden_size=2, num_hidden_layers=9, num_attention_heads=1, intermediate_size=8, context=3)


def test_toml_says_the_same_as_yaml(tmp_path: Path) -> None:
    text = 'name = "mine"\nslot_s = 2\n[model]\npreset = "tiny"\n[codec.up]\nper_tile = 9\n'
    (tmp_path / "run.toml").write_text(text)
    assert read_spec(tmp_path / "run.toml") == parse_spec(tomllib.loads(text), "x")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("name: x\nmodle: {preset: tiny}", "unknown key 'modle'"),
        ("name: x\nmodel: {preset: tiny}\noptimizer: {learning_rte: 1}", "did you mean 'learning_rate'?"),
        ("name: x\nmodel: {preset: tiny}\nadmission: {proof: work}", "unknown key 'admission.proof'"),
        ("name: x\nmodel: {preset: tiny}\nadmission: {who: friends}", "expected 'anybody'"),
        ('name: x\nmodel: {preset: tiny}\ndata: {text: "a\\eb"}', "expected one line of printable characters"),
        ("name: x\nmodel: {preset: huge}", 'model.preset = "huge" is no preset: choose one of tiny, small'),
        ("name: x\nmodel: {preset: tiny, num_layers: 4}", "has no key 'num_layers'"),
        ("name: x\nmodel: {preset: tiny, hidden_size: 129}", "make it a multiple of model.num_attention_heads"),
        ("name: x\nmodel: {preset: tiny, vocab_size: 100}", "is too small: text is read as bytes"),
        ("name: x\nmodel: {hidden_size: 8}\nslot_s: 1", "lacks fragments"),
        ("model: {preset: tiny}", "lacks 'name': add it"),
        ("name: x", "lacks 'model'"),
        ("name: 2026\nmodel: {preset: tiny}", "expected a valid string"),
        ("name: x\nmodel: {preset: tiny}\nslot_s: fast", 'slot_s = "fast"'),
        ("name: x\nmodel: {preset: tiny}\nslot_s: 1s", "expected a valid number"),
        ("name: x\nmodel: {preset: tiny}\nslot_s: .nan", "expected a finite number"),
        ("name: x\nmodel: {preset: tiny}\nslot_s: 7200", "less than or equal to 3600"),
        ("name: x\nmodel: {preset: tiny}\nseed: true", "expected a value that is not true or false"),
        ("name: x\nmodel: {preset: tiny}\nmerge: {coverage: 0.7}", "expected 0, 0.5 or 1"),
        ("name: x\nmodel: {preset: tiny}\nmerge: {step: 5}", "less than or equal to 4"),
        ("name: x\nmodel: {preset: tiny}\ncodec: {up: {per_tile: 0}}", "codec.up.per_tile = 0"),
        ("name: x\nmodel: {preset: tiny}\nfragments: 4000", "are too many"),
        ("name: x\nname: y\nmodel: {preset: tiny}", "the key 'name' is given twice (at line 1"),
        ("name: [", "is not valid YAML"),
        ("name: !!python/object/apply:os.system [true]", "is not valid YAML"),
        ("when: 2026-13-45", "is not valid YAML"),
        ("- a list", "does not describe a run"),
        ("", "does not describe a run: see `braniac-node init --example`"),
    ],
)
def test_a_mistake_gets_one_sentence(tmp_path: Path, text: str, wanted: str) -> None:
    assert wanted in sentence(tmp_path / "run.yaml", text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No such file or directory\): check its path"):
        read_spec(tmp_path / "none.yaml")
    assert "is not valid TOML" in sentence(tmp_path / "run.toml", "name = \n")
    assert "longer than" in sentence(tmp_path / "run.yaml", "#" * (1 << 21))
    (tmp_path / "run.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_spec(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        ({"tokenizer": "bytes", "curriculum": "hard"}, "'curriculum' is unknown to"),
        ({"tokenizer": "gpt2"}, "'tokenizer' is not 'bytes' or the SHA-256 of a tokenizer's file for"),
        ({"optimizer": {"learning_rate": 1e9}}, "'optimizer.learning_rate' is not"),
        ({"optimizer": {"learning_rate": float("nan")}}, "'optimizer.learning_rate' is not"),
        ({"optimizer": {"learning_rate": "fast"}}, "'optimizer.learning_rate' is not"),
        ({"text": "\x1b]0;mine\x07"}, "'text' is not"),
    ],
)
def test_a_strangers_recipe_is_followed_in_full_or_not_at_all(data: dict[str, Any], wanted: str) -> None:
    with pytest.raises(Incompatible) as caught:
        train_settings(TrainSection(), dataclasses.replace(manifest(), data=data))
    assert wanted in str(caught.value)


def test_the_recipe_of_a_plain_run_is_the_usual_one() -> None:
    usual = train_settings(TrainSection(device="cpu"), dataclasses.replace(manifest(), data={"tokenizer": "bytes"}))
    assert usual == TrainSettings()


# --- the signed file -------------------------------------------------------------------------------------------------


def test_a_run_file_reads_back(tmp_path: Path) -> None:
    made, body, signature = manifest_of(parse_spec(MINIMAL, "x"), identity(0), EPOCH_S)
    run_file.write(tmp_path / "run.braniac", body, signature, overwrite=False)
    assert run_file.read(tmp_path / "run.braniac") == (made, (body, signature))
    with pytest.raises(ConfigError, match="exists: choose another --out"):
        run_file.write(tmp_path / "run.braniac", body, signature, overwrite=False)
    run_file.write(tmp_path / "run.braniac", body, signature, overwrite=True)
    with pytest.raises(ConfigError, match="cannot write"):
        run_file.write(tmp_path / "none" / "run.braniac", body, signature, overwrite=True)


def test_a_run_file_that_was_changed_is_refused(tmp_path: Path) -> None:
    made, _, signature = manifest_of(parse_spec(MINIMAL, "x"), identity(0), EPOCH_S)
    path = tmp_path / "run.braniac"
    forged = dataclasses.replace(made, name="mine too").body()
    run_file.write(path, forged, signature, overwrite=True)
    with pytest.raises(ConfigError, match="not signed by its founder; get a fresh copy"):
        run_file.read(path)
    stranger = Identity.from_seed(bytes(32))
    theirs = dataclasses.replace(made, founder=stranger.peer_id)
    run_file.write(path, *sign_manifest(theirs, stranger), overwrite=True)
    assert run_file.read(path)[0].run_id != made.run_id  # another founder's run is another run


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[]", b"7", b"\xff", b'{"braniac_run": 1}', b'{"braniac_run": 2, "body": "", "signature": ""}',
        b'{"braniac_run": 1, "body": 3, "signature": ""}', b'{"braniac_run": 1, "body": "{}", "signature": "!"}',
        b'{"braniac_run": 1, "body": "\\ud800", "signature": ""}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_file_that_is_no_run_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.braniac").write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.braniac"):
        run_file.read(tmp_path / "run.braniac")


def test_a_run_file_of_another_protocol(tmp_path: Path) -> None:
    run_file.write(tmp_path / "run.braniac", json.dumps({"protocol": 9}).encode(), bytes(64), overwrite=True)
    with pytest.raises(VersionMismatch, match="install"):
        run_file.read(tmp_path / "run.braniac")


# --- init ------------------------------------------------------------------------------------------------------------


def test_init_signs_with_the_nodes_own_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--example"]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out)
    arguments = ["init", str(tmp_path / "run.yaml"), "--state-dir", str(tmp_path / "state")]
    assert main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    made, signed = run_file.read(tmp_path / "run.braniac")
    assert open_manifest(*signed).founder == load(tmp_path / "state" / "identity.key").peer_id
    assert (told["file"], told["run_id"]) == (str(tmp_path / "run.braniac"), made.run_id.hex())
    assert [tier["tier"] for tier in told["tiers"]] == list(range(made.tiers))
    assert main(arguments) == 2
    assert "run.braniac exists: choose another --out, or replace that run with --force" in capsys.readouterr().err
    assert main([*arguments, "--force"]) == 0
    shown = capsys.readouterr().out
    assert "text  English novels" in shown
    assert f"braniac-node join --run {tmp_path / 'run.braniac'} --state-dir {tmp_path / 'state'}" in shown
    assert main(["costs", "--run", str(tmp_path / "run.braniac"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "my first run"


def test_init_makes_nothing_of_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("name: x\nmodel: {preset: huge}\n")
    assert main(["init", str(tmp_path / "run.yaml"), "--state-dir", str(tmp_path / "state")]) == 2
    assert "is no preset" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    assert main(["init"]) == 2
    assert "init --example > run.yaml" in capsys.readouterr().err
