"""The key on the command line: shown, copied out, taken back, and refused where it would do harm."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from braniac.node import identity_copy, identity_file
from braniac.node.cli import main
from braniac.node.lock import DirectoryLock
from braniac.protocol.identity import peer_id_text
from tests.unit.node_harness import EPOCH_S, identity, write_run


def make(folder: Path, number: int = 0) -> str:
    """A state directory with a key: whose it is."""
    folder.mkdir(exist_ok=True)
    write_key(folder / "identity.key", number)
    return peer_id_text(identity(number).peer_id)


def write_key(path: Path, number: int, mode: int = 0o600) -> None:
    path.write_bytes(identity_file.encode(identity(number)))
    path.chmod(mode)


def run(*arguments: object) -> int:
    return main(["identity", *map(str, arguments)])


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer = make(tmp_path)
    assert run("show", "--state-dir", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"peer_id": peer, "file": str(tmp_path / "identity.key")}
    assert run("show", "--state-dir", tmp_path) == 0
    assert peer in capsys.readouterr().out


def test_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peer, copy, new = make(tmp_path / "a"), tmp_path / "copy.key", tmp_path / "b"
    mask = os.umask(0)
    try:
        assert run("export", copy, "--state-dir", tmp_path / "a") == 0
        assert run("import", copy, "--state-dir", new, "--json") == 0
    finally:
        os.umask(mask)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["peer_id"] == peer
    for path in (copy, new / "identity.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert identity_file.load(path).peer_id == identity(0).peer_id
    assert stat.S_IMODE(new.stat().st_mode) == 0o700
    assert sorted(path.name for path in new.iterdir()) == ["identity.key", "lock"]
    assert run("import", copy, "--state-dir", new) == 0  # its own key once more is nothing to refuse


def test_nothing_is_replaced_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a")
    theirs = make(tmp_path / "b", 1)
    (tmp_path / "notes.txt").write_text("mine")
    assert run("export", tmp_path / "notes.txt", "--state-dir", tmp_path / "a") == 2
    assert "notes.txt holds something else: choose another place, or replace it with --force" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"
    copy = tmp_path / "a" / "identity.key"
    assert run("import", copy, "--state-dir", tmp_path / "b") == 2
    assert f"holds the key of {theirs}" in capsys.readouterr().err
    assert run("import", copy, "--state-dir", tmp_path / "b", "--force") == 0
    assert identity_copy.own(tmp_path / "b").peer_id == identity(0).peer_id
    assert run("export", tmp_path / "notes.txt", "--state-dir", tmp_path / "a", "--force") == 0
    assert identity_file.load(tmp_path / "notes.txt").peer_id == identity(0).peer_id


def test_not_under_a_running_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a")
    write_key(tmp_path / "new.key", 1)
    lock = DirectoryLock(tmp_path / "a")
    try:
        assert run("import", tmp_path / "new.key", "--state-dir", tmp_path / "a", "--force") == 4
        assert f"is held by process {os.getpid()}: stop it" in capsys.readouterr().err
        assert run("export", tmp_path / "copy.key", "--state-dir", tmp_path / "a") == 0  # a backup does no harm
    finally:
        lock.release()
    assert identity_copy.own(tmp_path / "a").peer_id == identity(0).peer_id


def test_not_into_another_keys_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", 1000, epoch_s=EPOCH_S)
    before = identity_copy.own(tmp_path / "a").peer_id
    write_key(tmp_path / "new.key", 1)
    assert run("import", tmp_path / "new.key", "--state-dir", tmp_path / "a", "--force") == 6
    assert "holds checkpoints of another key" in capsys.readouterr().err
    assert identity_copy.own(tmp_path / "a").peer_id == before


@pytest.mark.parametrize(
    ("arguments", "code", "wanted"),
    [
        (["show", "--state-dir", "none"], 6, "holds no key: `braniac-node join` makes one"),
        (["export", "copy.key", "--state-dir", "none"], 6, "holds no key"),
        (["export", "none/copy.key", "--state-dir", "a"], 2, "No such file or directory"),
        (["export", "a", "--state-dir", "a", "--force"], 2, "cannot write a key to a (Is a directory)"),
        (["import", "missing.key", "--state-dir", "a"], 6, "there is no key file missing.key: check its path"),
        (["import", "open.key", "--state-dir", "b"], 6, "is open to other users: run `chmod 600 open.key`"),
        (["import", "damaged.key", "--state-dir", "b"], 6, "the key file damaged.key is damaged"),
        (["import", "a", "--state-dir", "b"], 6, "cannot read the key file a"),
        (["import", "a/identity.key", "--state-dir", "damaged.key"], 2, "cannot keep a key in"),
        (["show", "--state-dir", "c"], 6, "is open to other users: run `chmod 600"),
        (["export"], 2, "Missing argument 'FILE'"),
    ],
)
def test_bad_input_gets_a_sentence_and_a_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    wanted: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "a")
    make(tmp_path / "c")
    (tmp_path / "c" / "identity.key").chmod(0o644)
    write_key(tmp_path / "open.key", 1, 0o640)
    (tmp_path / "damaged.key").write_bytes(b"rubbish")
    (tmp_path / "damaged.key").chmod(0o600)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert run(*arguments) == code
    output = capsys.readouterr()
    assert wanted in output.err
    assert "Traceback" not in output.err
    after = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock")
    assert after == [path for path in before if path.name != "lock"]
