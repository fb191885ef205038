"""The latency profile: who is charged for what, the knee, the cost table, the command's table and picture."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from braniac.model.config import PRESETS, ModelConfig
from braniac.model.errors import ConfigError
from braniac.model.gpt import GPT
from braniac.model.profile import measure
from braniac.node.cli import app

CONFIG = ModelConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, context=16)
RICH = dataclasses.replace(CONFIG, value_embeddings=1, skip_connections=True)


def model_of(config: ModelConfig = CONFIG) -> GPT:
    model = GPT(config)
    model.init_weights(0)
    return model


class WorkClock:
    """A clock that goes by work done, not by time: each matrix product adds its size, whoever asks for it."""

    def __init__(self, model: GPT) -> None:
        self.now = 0.0
        for block in model.model.layers:
            block.self_attn.register_forward_hook(self._adding(lambda args: 1000.0))
            block.mlp.register_forward_hook(self._adding(lambda args: 10.0 * args[1]))
        model.model.norm.register_forward_hook(self._adding(lambda args: 500.0))

    def _adding(self, cost: Callable[[tuple[object, ...]], float]) -> Callable[..., None]:
        def hook(_: object, args: tuple[object, ...], __: object) -> None:
            self.now += cost(args)

        return hook

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("config", [CONFIG, RICH])
def test_each_part_is_charged_for_its_own_work_and_the_knee_is_where_they_cross(
    config: ModelConfig, decode: bool
) -> None:
    model = model_of(config)
    profile = measure(model, (128, 64, 16), (8, 15), clock=WorkClock(model), decode=decode, rounds=2)
    assert len(profile.layers) == 3 * 3 * 2
    assert all(t.attention_s == 1000 and t.ffn_s == 10 * t.width for t in profile.layers)
    for summary in profile.lengths:
        assert summary.outside_s == 500
        assert summary.attention_s == {128: 3000, 64: 3000, 16: 3000}
        assert summary.total_s(64) == 500 + 3000 + 3 * 640
        assert summary.knee == pytest.approx(3500 / 30, abs=1)


def test_a_cheap_ffn_has_no_knee() -> None:
    model = model_of(PRESETS["tiny"])
    clock = WorkClock(model)
    profile = measure(model, (64,), (8,), clock=lambda: min(clock(), 0.0), rounds=1)
    assert profile.lengths[0].knee is None


def test_the_cost_table_adds_up_to_the_forward_pass() -> None:
    model = model_of()
    profile = measure(model, (128, 16), (8, 16), clock=WorkClock(model), rounds=1)
    table = profile.cost_table(16)
    assert table.of((128, 16, 16)) == 500 + 3 * 1000 + 1280 + 160 + 160
    with pytest.raises(ConfigError, match="no sequence of 9 tokens was measured: choose from 8, 16"):
        profile.cost_table(9)


def test_real_time_is_positive_and_finite_in_both_modes() -> None:
    for decode in (False, True):
        profile = measure(model_of(), (128, 32), (4, 15), clock=time.perf_counter, decode=decode, rounds=3, batch=2)
        assert all(0 < t.attention_s < math.inf and 0 < t.ffn_s < math.inf for t in profile.layers)


def test_a_width_or_length_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="an FFN width of 100"):
        measure(model_of(), (100,), (8,), clock=time.perf_counter)
    with pytest.raises(ConfigError, match="17 tokens do not fit a context of 16"):
        measure(model_of(), (128,), (17,), clock=time.perf_counter)
    with pytest.raises(ConfigError, match="16 tokens do not fit"):
        measure(model_of(), (128,), (16,), clock=time.perf_counter, decode=True)


def test_the_command_prints_a_table_or_json_and_draws_a_picture(tmp_path: Path) -> None:
    picture = tmp_path / "profile.png"
    args = ["profile", "--preset", "tiny", "--lengths", "8", "--widths", "512,64", "--rounds", "1"]
    table = CliRunner().invoke(app, [*args, "--png", str(picture)])
    assert table.exit_code == 0, table.output
    assert "knee" in table.output
    assert "FFN SHARE" in table.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    as_json = json.loads(CliRunner().invoke(app, [*args, "--json"]).output)
    assert {row["width"] for row in as_json["layers"]} == {512, 64}


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--widths", "100"], "a multiple of 64"),
        (["--widths", "many"], "--widths 'many'"),
        (["--lengths", "0"], "positive whole numbers"),
        (["--preset", "huge"], "choose one of tiny"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(args: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["profile", "--preset", "tiny", *args])
    assert result.exit_code != 0
    assert sentence in str(result.exception)
