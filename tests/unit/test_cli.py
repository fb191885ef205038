"""The command line: what it prints, where, and which exit code a failure ends with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from braniac.model.errors import DataError, ModelError
from braniac.node import commands, control_pb2
from braniac.node.cli import app, main
from braniac.node.config import NodeConfig
from braniac.node.errors import AlreadyRunning, ConfigError, NodeError
from braniac.node.failures import explain
from braniac.node.settings_merge import load_config
from braniac.protocol.errors import ManifestError, VersionMismatch

VERBS = [
    *("join", "status", "peers", "leave", "generate", "evaluate", "swarm"),
    *("train", "profile", "mixnmatch", "export", "convert", "version", "config"),
]


@pytest.fixture(autouse=True)
def no_debug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRANIAC_DEBUG", "0")


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in VERBS)
    assert "..." not in shown.replace("[ARGS]...", "")  # every summary fits its line


@pytest.mark.parametrize("verb", VERBS[:-2])
def test_the_help_of_a_verb_has_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"\n    braniac-node {verb}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == "braniac-node 0.1.0, protocol 1\n"


def test_light_commands_load_nothing_heavy() -> None:
    script = (
        "import sys; from braniac.node.cli import main; main(['--help']); main(['version']); main(['config', 'show']);"
        "print({'torch', 'hivemind', 'grpc', 'google.protobuf', 'numpy', 'structlog', 'rich'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    ("arguments", "code", "wanted"),
    [
        (["join", "--teir", "1"], 2, "No such option: --teir"),
        (["frobnicate"], 2, "No such command 'frobnicate'"),
        (["join", "--set", "train.teir=1"], 2, "unknown setting 'train.teir' (from --set): did you mean 'train.tier'?"),
        (["join", "--tier", "big"], 2, 'train.tier = "big" (from the command line) cannot be used'),
        (["join", "--config", "/nowhere/node.toml"], 2, "cannot read the configuration file /nowhere/node.toml"),
        (["join", "--preset", "huge"], 2, "run.preset"),
        (["join", "--run-id", "12"], 2, "expected 64 hexadecimal digits"),
        (["join", "--metrics-port", "70000"], 2, "metrics.port = 70000"),
        (["swarm", "--tiers", "0,7"], 2, "--tiers '0,7' is not a list of tiers"),
        (["swarm", "--preset", "huge"], 2, "run.preset"),
        (["status", "--state-dir", "/nowhere"], 9, "no daemon answers on /nowhere/control.sock"),
        (["peers", "--state-dir", "/nowhere", "--json"], 9, "no daemon answers on /nowhere/control.sock"),
        (["leave", "--state-dir", "/nowhere"], 9, "no daemon answers on /nowhere/control.sock"),
        (["status", "--state-dir", "/" + "x" * 120], 7, "choose a shorter --state-dir"),
    ],
)
def test_a_failure_ends_in_a_sentence_and_an_exit_code(
    arguments: list[str], code: int, wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    output = capsys.readouterr()
    assert wanted in output.err
    assert output.out == ""
    assert "Traceback" not in output.err


def test_config_show_prints_a_file_that_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--set", "train.tier=2", "--state-dir", str(tmp_path)]) == 0
    file = tmp_path / "node.toml"
    file.write_text(capsys.readouterr().out)
    config = load_config(NodeConfig, file, {}, (), {})
    assert (config.train.tier, config.state.dir) == (2, tmp_path)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NodeError("a sentence"), 1),
        (AlreadyRunning("a sentence"), 4),
        (DataError("a sentence"), 2),
        (ModelError("a sentence"), 1),
        (ManifestError("a sentence"), 1),
        (VersionMismatch("a sentence"), 5),
        (ConfigError("a\n  sentence"), 2),
        (ExceptionGroup("tasks", [ExceptionGroup("tasks", [AlreadyRunning("a sentence")])]), 4),
    ],
)
def test_a_foreseen_error_is_one_line(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(error) == code
    assert capsys.readouterr().err == "braniac-node: a sentence\n"


def test_a_full_disk_is_the_machines_fault(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain(OSError(28, "No space left on device", "/state/blob")) == 7
    assert "No space left on device: /state/blob" in capsys.readouterr().err


def test_a_bug_asks_for_a_report_and_shows_a_traceback_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = ExceptionGroup("tasks", [NodeError("a sentence"), KeyError("slot")])
    assert explain(group) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "unexpected KeyError: 'slot'; this is a bug, please report it" in lines[0]
    monkeypatch.setenv("BRANIAC_DEBUG", "1")
    assert explain(group) == 1
    assert "ExceptionGroup: tasks (2 sub-exceptions)" in capsys.readouterr().err


def test_errors_and_interrupts_of_a_command_become_exit_codes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raised: list[BaseException] = [AlreadyRunning("taken"), KeyboardInterrupt(), typer.Exit(3), ZeroDivisionError()]
    extra = typer.Typer()
    codes: list[int] = []

    @extra.command("boom")
    def boom() -> None:
        raise raised[len(codes)]

    monkeypatch.setattr(app, "registered_commands", [*app.registered_commands, *extra.registered_commands])
    for _ in raised:
        codes.append(main(["boom"]))  # noqa: PERF401
    assert codes == [4, 130, 3, 1]
    assert "Traceback" not in capsys.readouterr().err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--debug", "join", "--tier", "big"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error() -> None:
    script = "import sys; from braniac.node.cli import main; sys.exit(main(['config', 'show']))"
    command = f'{sys.executable} -c "{script}" | true; exit ${{PIPESTATUS[0]}}'
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stderr) == (1, "")


def test_status_for_people_and_for_programs() -> None:
    reply = control_pb2.StatusReply(
        run_id="ab12", peer_id="12D3KooWx", state="training", tier=2, tiers=4, slot=412, slot_s=2.0, window=51,
        peers_live=3, steps=1234, tokens=5_000_000_000_000, parameters=460_000, bytes_sent=1_234_567,
        forfeited={"killed": 2}, addresses=["/ip4/1.2.3.4", "/ip4/5.6.7.8"], uptime_s=3700, clock_offset_s=float("nan"),
        join_bytes_received=10, join_bytes_needed=2000,
    )  # fmt: skip
    reply.digests.add(fragment=1, ring=0, slot=409, digest=b"\xab\xcd")
    text = commands.status_text(reply)
    for wanted in (
        "training, joining 10 B of 2.0 kB", "tier 2 of 0..3", "slot 412 of 2 s", "no loss yet", "1.2 MB sent",
        "2 killed", "refused    none", "up 1h 01m", "           /ip4/5.6.7.8",
    ):  # fmt: skip
        assert wanted in text
    content = json.loads(commands.json_text(commands.message_dict(reply)))
    assert set(content) == {field.name for field in reply.DESCRIPTOR.fields}
    assert (content["slot"], content["tokens"], content["train_loss"]) == (412, 5_000_000_000_000, None)
    assert content["clock_offset_s"] is None
    assert content["digests"] == [{"fragment": 1, "ring": 0, "slot": 409, "digest": "abcd"}]
    assert content["forfeited"] == {"killed": 2}
    reply.train_loss = 2.5
    assert "loss 2.500 nats/byte" in commands.status_text(reply)
    assert commands.message_dict(reply)["train_loss"] == 2.5


def test_peers_for_people() -> None:
    reply = control_pb2.PeersReply()
    assert commands.peers_text(reply) == "no other peers yet"
    reply.peers.add(peer_id="12D3KooWlonger", tier=1, state="silent", last_heard_s=80)
    reply.peers.add(
        peer_id="12D3KooWx", tier=3, state="live", last_heard_s=1.5, rtt_s=0.0123, merged=7, addresses=["/a"]
    )
    assert commands.peers_text(reply).splitlines() == [
        "PEER            TIER  STATE   HEARD       RTT    MERGED  ADDRESS",
        "12D3KooWx       3     live    1s ago      12 ms  7       /a",
        "12D3KooWlonger  1     silent  1m 20s ago  -      0       -",
    ]


def test_a_report_for_people() -> None:
    report = {"nodes": 4, "digests_agree": True, "loss_end": {"0": 1.98765, "1": 2.5}, "tokens": 1234567, "gap": None,
              "forfeited": {}, "tiers": [0, 1]}  # fmt: skip
    assert commands.aligned_text(report).splitlines() == [
        "nodes          4",
        "digests agree  yes",
        "loss end 0     1.988",
        "loss end 1     2.5",
        "tokens         1,234,567",
        "gap            -",
        "forfeited      none",
        "tiers          0, 1",
    ]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (3_200_000_000_000_000, "3200.0 TB")]
)
def test_bytes_for_people(count: int, text: str) -> None:
    assert commands.bytes_text(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (187, "3m 07s"), (18_725, "5h 12m"), (187_300, "2d 04h")])
def test_durations_for_people(seconds: float, text: str) -> None:
    assert commands.duration_text(seconds) == text


def test_addresses_come_separated_by_commas_or_spaces() -> None:
    assert commands.split_addresses(["a, b", "c d,e", ""]) == ["a", "b", "c", "d", "e"]
    assert commands.split_addresses(None) is None


def test_tiers() -> None:
    assert commands.parse_tiers("0, 3,3") == (0, 3, 3)
    with pytest.raises(ConfigError, match="--tiers '0,4' is not a list of tiers"):
        commands.parse_tiers("0,4")
