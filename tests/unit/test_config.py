"""Settings: which layer wins, how text is read, and the sentence that each mistake gets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from braniac.node.config import NodeConfig, default_cache_dir, default_state_dir
from braniac.node.errors import ConfigError
from braniac.node.settings_merge import load_config, render_toml

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


def load(
    *sets: str,
    file: Path | None = None,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> NodeConfig:
    return load_config(NodeConfig, file, environ or {}, sets, flags or {})


def sentence(*sets: str, file: Path | None = None, environ: Mapping[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*sets, file=file, environ=environ)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_without_any_layer_the_defaults_hold() -> None:
    config = load()
    assert config == NodeConfig()
    assert config.train.tier == "auto"
    assert config.state.dir == default_state_dir()
    assert config.control_socket == config.state.dir / "control.sock"


def test_each_layer_wins_over_the_ones_below(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text('[train]\nbatch = 2\nthreads = 2\nnice = 2\n[run]\nseed = 2\n[data]\npaths = ["a b"]\n')
    environ = {"BRANIAC_NODE__train__threads": "3", "BRANIAC_NODE__TRAIN__NICE": "3", "BRANIAC_NODE__run__seed": "3"}
    config = load("train.nice=4", "run.seed=4", file=file, environ=environ, flags={"run.seed": 5, "train.tier": None})
    assert (config.train.batch, config.train.threads, config.train.nice, config.run.seed) == (2, 3, 4, 5)
    assert config.data.paths == (Path("a b"),)
    assert config.train.tier == "auto"


def test_systemds_cache_directory_holds_the_tokens() -> None:
    assert load(environ={"CACHE_DIRECTORY": "/var/cache/braniac"}).data.cache_dir == Path("/var/cache/braniac")
    assert load().data.cache_dir == default_cache_dir()


def test_systemds_state_directory_yields_to_every_explicit_choice(tmp_path: Path) -> None:
    environ = {"STATE_DIRECTORY": "/var/lib/braniac:/var/lib/other"}
    assert load(environ=environ).state.dir == Path("/var/lib/braniac")
    file = tmp_path / "node.toml"
    file.write_text('[state]\ndir = "/elsewhere"\n')
    assert load(file=file, environ=environ).state.dir == Path("/elsewhere")


def test_a_later_set_wins() -> None:
    assert load("train.batch=2", "train.batch=3").train.batch == 3


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.tier=2", 2),
        ("train.tier=auto", "auto"),
        ("train.learning_rate=1e-3", 1e-3),
        ("train.learning_rate=null", None),
        ("run.name=2026", "2026"),
        ('run.name="2026, a year"', "2026, a year"),
        ("run.name=a = b", "a = b"),
        ("metrics.enabled=false", False),
        ("network.peers=", ()),
        ("network.peers=/ip4/1.2.3.4, /ip4/5.6.7.8", ("/ip4/1.2.3.4", "/ip4/5.6.7.8")),
        ('network.peers=["x,y", "z"]', ("x,y", "z")),
        ("network.listen.0=/ip4/127.0.0.1/tcp/1", ("/ip4/127.0.0.1/tcp/1",)),
        ("network.run_id=" + "1" * 64, "1" * 64),
    ],
)
def test_text_is_read_by_the_type_of_its_setting(text: str, value: object) -> None:
    section, key = text.partition("=")[0].split(".")[:2]
    assert getattr(getattr(load(text), section), key) == value


def test_an_index_replaces_one_item_of_a_list_from_a_lower_layer() -> None:
    environ = {"BRANIAC_NODE__network__peers": "a,b,c", "BRANIAC_NODE__network__peers__0": "A"}
    assert load("network.peers.1=B", environ=environ).network.peers == ("A", "B", "c")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("train.teir=1", "unknown setting 'train.teir' (from --set): did you mean 'train.tier'?"),
        ("tier=1", "did you mean 'train.tier'?"),
        ("train.tier.x=1", "did you mean 'train.tier'?"),
        ("network.peers.0.x=1", "did you mean 'network.peers'?"),
        ("qqq=1", "`braniac-node config show` lists all there are"),
        ("=1", "unknown setting ''"),
        ("train=3", "'train' (from --set) is a section, not a value: set one of its keys, such as 'train.tier'"),
        ("train.batch", "has no '=': write --set key.path=value"),
        ("train.tier=big", "train.tier = \"big\" (from --set) cannot be used: expected 'auto', 0, 1, 2 or 3"),
        ("train.tier=4", "expected 'auto', 0, 1, 2 or 3"),
        ("train.batch=x", "expected a valid integer"),
        ("train.batch=1.5", "expected a valid integer"),
        ("train.batch=0", "expected a number greater than or equal to 1"),
        ("run.slot_s=nan", "expected a finite number"),
        ("run.fragments=3", "expected a number greater than or equal to 4"),
        ("network.run_id=xyz", "expected 64 hexadecimal digits in lower case"),
        ("network.listen=[]", "expected at least 1 item"),
        ("network.peers=[1]", "network.peers.0 = 1 (from --set) cannot be used: expected a valid string"),
        ("network.peers={a=1}", "expected a list"),
        ("network.listen.1=x", "no 'network.listen.1' (from --set): network.listen has 1 item, counted from 0"),
        ("network.peers.-1=x", "network.peers has 0 items"),
        ("log.format=xml", "expected 'auto', 'console' or 'json'"),
    ],
)
def test_a_mistake_gets_one_sentence(text: str, wanted: str) -> None:
    assert wanted in sentence(text)


def test_a_mistake_in_the_environment_names_the_variable() -> None:
    assert "from BRANIAC_NODE__train__teir" in sentence(environ={"BRANIAC_NODE__train__teir": "1"})
    assert "from BRANIAC_NODE__train__tier" in sentence(environ={"BRANIAC_NODE__train__tier": "x"})


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (b"[train]\nbatch = \n", "is not valid TOML: Invalid value (at line 2, column 9)"),
        (b"[train]\nteir = 1\n", "did you mean 'train.tier'?"),
        (b"train = 1\n", "is a section, not a value"),
        (b"tier = 1\n", "did you mean 'train.tier'?"),
        (b"[train]\nbatch = true\n", "expected a value that is not true or false"),
        (b"[train]\nbatch = {x = 1}\n", "expected a valid integer"),
        (b"[network]\npeers = 'x'\n", "expected a list"),
        (b"[run]\nname = '\xff'\n", "is not UTF-8 text"),
    ],
)
def test_a_mistake_in_the_file_names_the_file(tmp_path: Path, content: bytes, wanted: str) -> None:
    file = tmp_path / "node.toml"
    file.write_bytes(content)
    text = sentence(file=file)
    assert wanted in text
    assert str(file) in text


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file or directory; check --config" in sentence(file=tmp_path / "none.toml")
    assert "Is a directory; check --config" in sentence(file=tmp_path)


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError):
        NodeConfig().train.batch = 3  # type: ignore[misc]


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load("data.paths=~/books", "state.dir=~/node").data.paths == (Path("/home/somebody/books"),)
    assert load("state.dir=~/node").state.dir == Path("/home/somebody/node")


@settings(max_examples=30)
@given(name=TEXT.filter(bool), peers=st.lists(TEXT, max_size=3))
def test_what_config_show_prints_reads_back(
    tmp_path_factory: pytest.TempPathFactory, name: str, peers: list[str]
) -> None:
    config = load(flags={"run.name": name, "network.peers": peers, "train.learning_rate": 0.02, "train.tier": 1})
    file = tmp_path_factory.getbasetemp() / "shown.toml"
    file.write_text(render_toml(config), encoding="utf-8", newline="")
    assert load(file=file) == config


def test_every_setting_is_described() -> None:
    comments = [line for line in render_toml(NodeConfig()).splitlines() if line.startswith("#")]
    assert "# None" not in comments
    assert len(comments) >= 28


@settings(max_examples=50)
@given(st.text(max_size=40), st.text(max_size=40))
def test_no_text_whatever_gets_a_traceback(key: str, value: str) -> None:
    for text in (f"{key}={value}", f"run.name={value}", f"network.peers.{key}={value}", f"train.{key}={value}"):
        try:
            load(text)
        except ConfigError:
            continue
