"""What doctor finds: each judgement on facts made up for it, and the facts of directories made wrong on purpose."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from braniac.node import doctor_facts, identity_file
from braniac.node.cli import main
from braniac.node.doctor import Finding, Severity, exit_code, findings
from braniac.node.facts import DaemonFact, Facts, ListenFact
from braniac.node.lock import DirectoryLock
from braniac.node.memory import Fit
from braniac.node.sensors import Sample

MIB = 1 << 20
DAEMON = DaemonFact(state="training", state_reason="", clock_offset_s=0.01, protocol=1, newest_protocol=1, peers_live=2)
WELL = Facts(
    versions={"braniac-node": "0.1.0"}, protocol=1, state_dir="/state", state_exists=True, state_mode=0o700,
    disk_free_bytes=1000 * MIB, disk_needed_bytes=10 * MIB, disk_free_min_bytes=256 * MIB, disk_bytes_per_s=1e8,
    socket_path="/state/control.sock", identity_peer="12D3KooWx", memory_free_bytes=1000 * MIB,
    memory_needed_bytes=(400 * MIB, 200 * MIB), memory_of="preset tiny", sensors_present=("plugged",),
    listen=(ListenFact(address="/ip4/0.0.0.0/tcp/0", trouble=None),), global_addresses=("8.8.8.8",),
)  # fmt: skip


def judged(**changes: Any) -> dict[str, Finding]:
    found = findings(dataclasses.replace(WELL, **changes))
    codes = [finding.code for finding in found]
    assert len(set(codes)) == len(codes)
    for finding in found:
        if finding.severity >= Severity.WARNING:
            assert finding.remedy, f"{finding.code} says no remedy"
        assert "\n" not in finding.sentence + finding.remedy
    return {finding.code: finding for finding in found}


def daemon(**changes: Any) -> DaemonFact:
    return dataclasses.replace(DAEMON, **changes)


def test_when_all_is_well_there_are_only_notes() -> None:
    found = judged()
    assert {code for code, finding in found.items() if finding.severity > Severity.OK} == {"daemon"}
    assert exit_code(list(found.values())) == 0
    running = judged(daemon=daemon(reachability="public"))
    assert max(finding.severity for finding in running.values()) is Severity.OK
    assert exit_code(list(running.values())) == 0


@pytest.mark.parametrize(
    ("changes", "code", "severity", "wanted"),
    [
        ({"state_trouble": "/state is not a folder"}, "state_dir", Severity.ERROR, "is not a folder"),
        ({"state_exists": False}, "state_dir", Severity.NOTE, "is not there yet"),
        ({"state_mode": 0o722}, "state_dir_open", Severity.WARNING, "others may change"),
        ({"disk_free_bytes": 100 * MIB}, "disk_space", Severity.ERROR, "so the node rests"),
        ({"disk_free_bytes": 260 * MIB}, "disk_space", Severity.WARNING, "up to 10.5 MB may be used"),
        ({"disk_bytes_per_s": 1e5}, "disk_speed", Severity.WARNING, "100.0 kB per second"),
        ({"identity_trouble": "the key file x is open to other users: run `chmod 600 x`"}, "identity", Severity.ERROR,
         "is open to other users"),
        ({"identity_peer": None}, "identity", Severity.NOTE, "no key yet"),
        ({"socket_path_trouble": "the path is too long"}, "socket_path", Severity.ERROR, "too long"),
        ({"lock_holder": 77}, "daemon_silent", Severity.ERROR, "process 77 holds the state directory"),
        ({"lock_holder": 0, "daemon_trouble": "late"}, "daemon_silent", Severity.ERROR, "does not answer (late)"),
        ({"socket_there": True}, "stale_socket", Severity.NOTE, "was left by a node that was killed"),
        ({"memory_free_bytes": 400 * MIB}, "memory", Severity.NOTE, "the largest that fits is tier 1"),
        ({"memory_free_bytes": 100 * MIB}, "memory", Severity.ERROR, "tier 0 419.4 MB, tier 1 209.7 MB"),
        ({"memory_cap_bytes": 100 * MIB}, "memory", Severity.ERROR, "free, caps.memory_mib allows 104.9 MB;"),
        ({"memory_free_bytes": 399 * MIB, "memory_tier": 0}, "memory", Severity.ERROR, "418.4 MB of memory are free"),
        ({"memory_free_bytes": 400 * MIB, "memory_tier": 0}, "memory", Severity.OK, "419.4 MB of memory are free"),
        ({"sensors_missing": ("plugged", "idle_s")}, "sensors_missing", Severity.NOTE, "plugged, idle_s"),
        ({"p2pd_trouble": "no such file"}, "p2pd", Severity.ERROR, "no such file"),
        ({"listen": (ListenFact(address="/ip4/0.0.0.0/tcp/1", trouble="port 1 is in use: stop it"),)}, "listen",
         Severity.ERROR, "(port 1 is in use)"),
        ({"global_addresses": ()}, "nat", Severity.NOTE, "probably behind a router"),
        ({"data_missing": ("/nowhere",)}, "data", Severity.ERROR, "/nowhere, which does not exist"),
        ({"bad_addresses": ("'x' is not a peer's address: no; write it like y",)}, "peers", Severity.ERROR, "'x' is"),
        ({"daemon": daemon(newest_protocol=2)}, "protocol_old", Severity.WARNING, "peers speak protocol 2"),
        ({"daemon": daemon(protocol=9)}, "daemon_version", Severity.WARNING, "speaks protocol 9"),
        ({"daemon": daemon(state="degraded", state_reason="0 peers")}, "daemon", Severity.WARNING, "(0 peers)"),
        ({"daemon": daemon(state="paused")}, "daemon", Severity.OK, "is paused"),
        ({"daemon": daemon(clock_offset_s=-3.0)}, "clock", Severity.WARNING, "3.0 s ahead of the swarm's"),
        ({"daemon": daemon(clock_offset_s=2.5)}, "clock", Severity.WARNING, "2.5 s behind the swarm's"),
        ({"daemon": daemon(reachability="private")}, "reachability", Severity.WARNING, "peers cannot dial this node"),
        ({"daemon": daemon(reachability="relayed")}, "reachability", Severity.NOTE, "through a relay"),
        ({"daemon": daemon(reachability="unknown")}, "reachability", Severity.NOTE, "nobody could be asked"),
    ],
)  # fmt: skip
def test_a_fault_is_found(changes: dict[str, Any], code: str, severity: Severity, wanted: str) -> None:
    found = judged(**changes)
    assert found[code].severity is severity
    assert wanted in found[code].sentence


def test_sizes_that_fit_are_the_remedy() -> None:
    sizes = (Fit(0, 2, 128), Fit(1, 5, 128))
    found = judged(memory_free_bytes=100 * MIB, memory_fits=sizes)["memory"]
    assert found.remedy == "what fits is batch 2 with context 128 at tier 0, or batch 5 with context 128 at tier 1"
    assert "close other programs" in judged(memory_free_bytes=100 * MIB)["memory"].remedy


def test_what_could_not_be_found_out_is_no_fault() -> None:
    found = judged(
        state_mode=None, disk_free_bytes=None, disk_needed_bytes=None, disk_bytes_per_s=None, memory_free_bytes=None,
        memory_needed_bytes=(), global_addresses=None, sensors_present=(),
    )  # fmt: skip
    assert exit_code(list(found.values())) == 0


def test_the_worst_finding_decides_the_exit_code() -> None:
    def of(*severities: Severity) -> int:
        return exit_code([Finding("x", severity, "") for severity in severities])

    assert of() == of(Severity.OK, Severity.NOTE) == 0
    assert of(Severity.WARNING, Severity.NOTE) == 10
    assert of(Severity.WARNING, Severity.ERROR, Severity.OK) == 11


def test_every_sensor_is_present_or_missing() -> None:
    present, missing = doctor_facts.sensors(Sample(plugged=False, idle_s=0.0))
    assert present == ["plugged", "idle_s"]
    assert "battery_percent" in missing
    assert not {"local_time", "daily_bytes"} & {*present, *missing}  # those are no sensors


# --- facts -----------------------------------------------------------------------------------------------------------


def test_facts_of_a_state_directory(tmp_path: Path) -> None:
    assert doctor_facts.state_trouble(tmp_path / "not" / "yet") is None
    (tmp_path / "file").write_text("")
    assert doctor_facts.state_trouble(tmp_path / "file" / "state") == f"{tmp_path / 'file'} is not a folder"
    assert doctor_facts.disk_free_bytes(tmp_path / "not" / "yet") == doctor_facts.disk_free_bytes(tmp_path)
    ticks = iter((1.0, 1.5))
    assert doctor_facts.disk_bytes_per_s(tmp_path, lambda: next(ticks)) == 8 * MIB
    assert doctor_facts.disk_bytes_per_s(tmp_path / "not", lambda: 0.0) is None
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_who_holds_a_state_directory(tmp_path: Path) -> None:
    assert doctor_facts.lock_holder(tmp_path) is None
    lock = DirectoryLock(tmp_path)
    assert doctor_facts.lock_holder(tmp_path) == os.getpid()
    lock.release()
    assert doctor_facts.lock_holder(tmp_path) is None
    DirectoryLock(tmp_path).release()  # looking does not hold it


def test_the_libp2p_daemon_runs_here() -> None:
    assert doctor_facts.p2pd_trouble() is None


# --- the command -----------------------------------------------------------------------------------------------------


def doctor(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, dict[str, Any]]]:
    code = main(["doctor", "--json", *map(str, arguments)])
    content = json.loads(capsys.readouterr().out)
    assert content["exit_code"] == code
    return code, {finding["code"]: finding for finding in content["findings"]}


def test_doctor_on_a_machine_without_a_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tmp_path / "state"
    code, found = doctor(capsys, "--state-dir", state)
    assert code in (0, 10)  # the machine that tests may have little disk, or a slow one
    assert (found["state_dir"]["severity"], found["identity"]["severity"]) == ("note", "note")
    assert found["memory"]["sentence"].count("tier") >= 4
    assert found["p2pd"]["severity"] == found["listen"]["severity"] == "ok"
    assert not state.exists()  # it only looks
    assert main(["doctor", "--state-dir", str(state)]) == code
    assert capsys.readouterr().out.splitlines()[0].startswith("ok       braniac-node 0.1.0")


def test_doctor_finds_everything_that_is_wrong_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity_file.load_or_create(tmp_path / "identity.key")
    (tmp_path / "identity.key").chmod(0o644)
    tmp_path.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "control.sock"))  # and nobody listens any more
    with socket.create_server(("127.0.0.1", 0)) as server:
        listen = f"/ip4/127.0.0.1/tcp/{server.getsockname()[1]}"
        sets = ("--set", f"network.listen={listen}", "--set", "network.peers=rubbish", "--set", "data.paths=/nowhere")
        code, found = doctor(capsys, "--state-dir", tmp_path, *sets)
    assert code == 11
    assert {key for key, finding in found.items() if finding["severity"] == "error"} >= {
        "identity", "listen", "peers", "data",
    }  # fmt: skip
    assert found["identity"]["remedy"] == f"run `chmod 600 {tmp_path / 'identity.key'}`"
    assert found["state_dir_open"]["severity"] == "warning"
    assert found["stale_socket"]["severity"] == "note"
    assert (tmp_path / "control.sock").is_socket()  # it only looks
    lock = DirectoryLock(tmp_path)
    try:
        _, found = doctor(capsys, "--state-dir", tmp_path)
    finally:
        lock.release()
    assert f"process {os.getpid()} holds the state directory and does not answer" in found["daemon_silent"]["sentence"]
