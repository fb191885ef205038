"""The command line: what it prints, where, and which exit code a failure ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from braniac.model.errors import DataError, ModelError
from braniac.node import commands, control_pb2, replies
from braniac.node.cli import app, main
from braniac.node.config import NodeConfig
from braniac.node.control_client import ControlClient
from braniac.node.errors import AlreadyRunning, ConfigError, NodeError
from braniac.node.failures import explain
from braniac.node.log_view import log_path
from braniac.node.settings_merge import load_config
from braniac.protocol import limits
from braniac.protocol.errors import ManifestError, VersionMismatch

VERBS = [
    *("join", "status", "peers", "leave", "generate", "evaluate", "swarm", "observe", "shape"),
    *("pause", "resume", "finish", "logs", "contributions"),
    *("init", "link", "costs", "doctor"),
    *("train", "profile", "mixnmatch", "export", "convert", "version", "config"),
]


GROUPS = {"config": ("show", "check"), "identity": ("show", "export", "import")}
LINK = "braniac://" + "1" * 64


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of whoever runs the tests."""
    monkeypatch.setenv("BRANIAC_DEBUG", "0")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nowhere")


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {verb} " in shown for verb in VERBS)
    assert "..." not in shown.replace("[ARGS]...", "")  # every summary fits its line


@pytest.mark.parametrize("verb", VERBS[:-2])
def test_the_help_of_a_verb_has_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"\n    braniac-node {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(("group", "verb"), [(group, verb) for group, verbs in GROUPS.items() for verb in verbs])
def test_the_help_of_a_verb_in_a_group_has_examples(group: str, verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([group, "--help"]) == 0
    assert f"\n  {verb} " in capsys.readouterr().out
    assert main([group, verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"\n    braniac-node {group} {verb}" in shown
    assert "--json" in shown


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"braniac-node 0.1.0, protocol {limits.PROTOCOL_VERSION}\n"


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
        (["pause", "--state-dir", "/nowhere"], 9, "no daemon answers on /nowhere/control.sock"),
        (["pause", "--for", "2 weeks"], 2, "--for '2 weeks' is not a time span"),
        (["pause", "--for", "0s"], 2, "write it as in --for 90s, --for 1h30m or --for 2d"),
        (["finish", "--state-dir", "/nowhere", "--json"], 9, "no daemon answers on /nowhere/control.sock"),
        (["resume", "--state-dir", "/nowhere"], 9, "no daemon answers on /nowhere/control.sock"),
        (["contributions", "--state-dir", "/nowhere"], 9, "no daemon answers on /nowhere/control.sock"),
        (["status", "--watch", "--state-dir", "/nowhere"], 9, "no daemon answers on /nowhere/control.sock"),
        (["logs", "--state-dir", "/nowhere"], 8, "there is no log in /nowhere/logs"),
        (["logs", "--level", "loud"], 2, "Invalid value for '--level'"),
        (["join", "run.braniac"], 2, "'run.braniac' is not a join link: it does not begin with braniac://"),
        (["join", LINK], 2, "it names no address after an @; copy the whole line"),
        (["join", LINK + "@/ip4/192.0.2.7/tcp/4001"], 2, "it does not end in /p2p/<peer id>"),
        (["join", "a", "b"], 2, "unexpected extra argument"),
        (["link", "--state-dir", "/nowhere", "--qr"], 9, "no daemon answers on /nowhere/control.sock"),
        (["init", "/nowhere/run.yaml"], 2, "cannot read the run description /nowhere/run.yaml"),
        (["costs"], 2, "costs needs either a join link or --run FILE"),
        (["costs", "--run", "/nowhere/run.braniac"], 2, "cannot read the run file /nowhere/run.braniac"),
        (["costs", "x"], 2, "'x' is not a join link"),
        (["costs", "--run", "x", "--swarm-peers", "0"], 2, "Invalid value for '--swarm-peers'"),
        (["identity", "show", "--state-dir", "/nowhere"], 6, "/nowhere holds no key"),
        (["config", "check", "/nowhere/node.toml"], 2, "cannot read the configuration file /nowhere/node.toml"),
        (["doctor", "--set", "caps.disk=1GB"], 2, "unknown setting 'caps.disk'"),
        (["join", "--set", "caps.disk_mib=1GB"], 2, "expected a valid integer"),
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


def test_check_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--check", "--state-dir", "/nowhere"]) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("state", "well"),
    [
        *(("starting", False), ("joining", False), ("training", True)),
        *(("degraded", True), ("paused", True), ("leaving", False)),
    ],
)
def test_who_is_well(state: str, well: bool) -> None:
    class Client(ControlClient):
        def status(self, since_slot: int = 0) -> control_pb2.StatusReply:
            return control_pb2.StatusReply(state=state)

    assert replies.is_well(Client(Path("/nowhere"))) is well


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("2h", 7200), ("1h30m", 5400), ("2H 30M", 9000), ("1d1s", 86_401), ("366d", 366 * 86_400)],
)
def test_time_spans(text: str, seconds: float) -> None:
    assert commands.parse_duration_s("--for", text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "90", "h", "1m2h", "-1s", "1.5h", "367d", "9" * 40 + "s", "1w", "٣s"])
def test_what_is_no_time_span(text: str) -> None:
    with pytest.raises(ConfigError, match="write it as in --for 90s"):
        commands.parse_duration_s("--for", text)


def test_completion_knows_the_verbs_and_is_light() -> None:
    script = (
        "import sys; from braniac.node.cli import main; code = main([]);"
        "print(code, {'torch', 'grpc', 'google.protobuf', 'numpy', 'structlog', 'rich'} & set(sys.modules))"
    )
    asked = {
        "_BRANIAC_NODE_COMPLETE": "complete_bash",
        "COMP_WORDS": "braniac-node sta",
        "COMP_CWORD": "1",
    }
    run = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | asked, capture_output=True, text=True, check=True, timeout=60
    )
    *offered, last = run.stdout.split("\n")[:-1]
    assert offered == ["status"]
    assert last == "0 set()"


def test_completion_can_be_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.completion._get_shell_name", lambda: "bash")
    assert main(["--show-completion"]) == 0
    assert "_BRANIAC_NODE_COMPLETE=complete_bash" in capsys.readouterr().out


def test_logs_shows_files_as_the_console_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = log_path(tmp_path)
    path.parent.mkdir()
    entries = [
        {"event": "slot 7", "level": "info", "timestamp": "2026-01-02T03:04:05.6Z"},
        {"event": "disk", "level": "error"},
    ]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert main(["logs", "--state-dir", str(tmp_path)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.rstrip() == "2026-01-02T03:04:05Z [info     ] slot 7"
    assert "disk" in second
    assert main(["logs", "--state-dir", str(tmp_path), "--json", "--level", "warning"]) == 0
    assert capsys.readouterr().out == json.dumps(entries[1]) + "\n"
    assert main(["logs", "--state-dir", str(tmp_path), "-n", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_config_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "node.toml"
    file.write_text("[train]\nbatch = 2\nthreads = 2\n")
    assert main(["config", "check", str(file)]) == 0
    assert capsys.readouterr().out == f"{file} is fine and sets train.batch, train.threads\n"
    assert main(["config", "check", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keys"] == ["train.batch", "train.threads"]
    file.write_text("[train]\nbacth = 2\n")
    assert main(["config", "check", str(file)]) == 2
    assert "did you mean 'train.batch'?" in capsys.readouterr().err


def test_the_default_file_is_read_unless_another_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    default, other = tmp_path / "braniac" / "node.toml", tmp_path / "other.toml"
    default.parent.mkdir()
    default.write_text("[train]\nbatch = 2\nthreads = 3\n")
    other.write_text("[train]\nbatch = 5\n")

    def shown(*arguments: str) -> dict[str, dict[str, object]]:
        assert main(["config", "show", "--json", *arguments]) == 0
        content: dict[str, dict[str, object]] = json.loads(capsys.readouterr().out)
        return content

    assert shown()["train.batch"] == {"value": 2, "origin": str(default)}
    assert shown("--config", str(other))["train.threads"] == {"value": 1, "origin": "the defaults"}
    default.write_text("[train]\nbacth = 2\n")
    assert main(["config", "show"]) == 2
    assert f"unknown setting 'train.bacth' (from {default})" in capsys.readouterr().err


def test_config_show_says_where_values_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "node.toml"
    file.write_text("[train]\nbatch = 2\nthreads = 3\n")
    monkeypatch.setenv("BRANIAC_NODE__train__threads", "4")
    arguments = ["config", "show", "--config", str(file), "--set", "train.nice=3", "--state-dir", str(tmp_path)]
    assert main([*arguments, "--origins"]) == 0
    text = capsys.readouterr().out
    for line in (
        f"batch = 2  # from {file}",
        "threads = 4  # from BRANIAC_NODE__train__threads",
        "nice = 3  # from --set",
        f'dir = "{tmp_path}"  # from the command line',
        'tier = "auto"  # from the defaults',
        "# learning_rate is not set  # from the defaults",
    ):
        assert line in text.splitlines()
    file.write_text(text)
    assert load_config(NodeConfig, file, {}, (), {}).train.nice == 3  # it is a file for --config all the same
    assert main([*arguments[:4], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train.threads"]["value"] == 4


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
    text = replies.status_text(reply)
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
    assert "loss 2.500 nats/byte" in replies.status_text(reply)
    assert commands.message_dict(reply)["train_loss"] == 2.5


def test_status_tells_why_it_rests_and_within_which_bounds() -> None:
    reply = control_pb2.StatusReply(
        state="paused", peers_live=3, peers_by_tier={0: 1, 3: 2}, tokens_merged=12_000, reachability="public",
        protocol_version=1, newest_protocol=2,
        caps=control_pb2.Caps(
            threads=2, duty_fraction=0.5, upload_bytes_per_s=50_000, daily_bytes=10_000_000, daily_bytes_used=2_500_000,
            memory_bytes=4_000_000_000, memory_bytes_used=1_000_000_000,
        ),
    )  # fmt: skip
    reply.reasons.add(code="manual", sentence="paused by hand", since_s=60, until_s=7200)
    reply.reasons.add(code="quota", sentence="the day's traffic is used up", since_s=5)
    lines = replies.status_text(reply).splitlines()
    for wanted in (
        "reasons    paused by hand (for 1m 00s now, 2h 00m to go)",
        "           the day's traffic is used up (for 5s now)",
        "caps       today 2.5 MB of 10.0 MB, memory 1.0 GB of 4.0 GB, upload 50.0 kB/s, training 50% of the time, "
        "2 threads",
        "reachable  yes, others can dial this node",
        "record     12,000 tokens of this node merged, over all its lives",
        "update     peers speak protocol 2, this node 1: install a newer braniac-node and restart",
    ):
        assert wanted in lines
    assert "3 peers live (1 of tier 0, 2 of tier 3)" in replies.status_text(reply)
    lines = replies.status_text(control_pb2.StatusReply(newest_protocol=1, protocol_version=1)).splitlines()
    assert {"reasons    none to rest", "caps       none", "reachable  not known yet"} <= set(lines)
    assert not [line for line in lines if line.startswith("update")]


def test_contributions_for_people() -> None:
    reply = control_pb2.ContributionsReply(first_slot=12, certificates=345)
    assert replies.contributions_text(reply, 20) == "no merged contributions seen yet"
    for number, tokens in enumerate((6000, 3000, 1000)):
        reply.contributors.add(
            peer_id=f"12D3KooW{number}", tier=number, contributions=10, tokens=tokens, me=number == 2
        )
    assert replies.contributions_text(reply, 1).splitlines() == [
        "#  PEER                   TIER  MERGED  TOKENS  SHARE",
        "1  12D3KooW0              0     10      6,000   60.0%",
        "3  12D3KooW2 (this node)  2     10      1,000   10.0%",
        "345 certificates counted, from slot 12 on",
    ]
    assert len(replies.contributions_text(reply, 20).splitlines()) == 5


def test_peers_for_people() -> None:
    reply = control_pb2.PeersReply()
    assert replies.peers_text(reply) == "no other peers yet"
    reply.peers.add(peer_id="12D3KooWlonger", tier=1, state="silent", last_heard_s=80)
    reply.peers.add(
        peer_id="12D3KooWx", tier=3, state="live", last_heard_s=1.5, rtt_s=0.0123, merged=7, addresses=["/a"]
    )
    assert replies.peers_text(reply).splitlines() == [
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_a_dash(value: float) -> None:
    assert commands.duration_text(value) == commands.bytes_text(value) == "-"


def test_addresses_come_separated_by_commas_or_spaces() -> None:
    assert commands.split_addresses(["a, b", "c d,e", ""]) == ["a", "b", "c", "d", "e"]
    assert commands.split_addresses(None) is None


def test_tiers() -> None:
    assert commands.parse_tiers("0, 3,3") == (0, 3, 3)
    with pytest.raises(ConfigError, match="--tiers '0,4' is not a list of tiers"):
        commands.parse_tiers("0,4")


def test_a_reply_comes_back_from_its_json() -> None:
    reply = control_pb2.StatusReply(
        state="training", slot=7, train_loss=0.0, peers_by_tier={0: 2, 3: 1}, forfeited={"clipped": 4},
        addresses=["/ip4/1.2.3.4", "/ip4/5.6.7.8"], caps=control_pb2.Caps(threads=2),
        slots=[control_pb2.SlotRecord(slot=6, certificate=b"\x00\xff", outcome="merged")],
        digests=[control_pb2.FragmentDigest(fragment=1, slot=6, digest=bytes(32))],
    )  # fmt: skip
    back = control_pb2.StatusReply()
    commands.fill_message(back, json.loads(commands.json_text(commands.message_dict(reply))))
    assert back == reply
