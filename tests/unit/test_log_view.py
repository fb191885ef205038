"""The log file and its reader: private, rotated, read over every rotation, and harmless when the disk is full."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import structlog

from braniac.node.errors import StateError
from braniac.node.log_view import lines, log_path
from braniac.node.logs import LogFile, configure_logging, log_to_file, render_line

pytestmark = pytest.mark.usefixtures("own_logging")

MIB = 1 << 20


def entry(number: int, level: str = "info") -> str:
    return json.dumps({"event": f"event {number}", "level": level})


def write(path: Path, *content: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(line + "\n" for line in content))


def numbers(found: list[str]) -> list[int]:
    return [int(json.loads(line)["event"].split()[1]) for line in found]


# --- writing ---------------------------------------------------------------------------------------------------------


def test_the_file_has_what_stderr_has_as_json_and_is_private(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = log_path(tmp_path)
    configure_logging("info", "console")
    log = structlog.get_logger("braniac.node.daemon")
    with log_to_file(path, MIB, 3):
        log.info("slot done", slot=7, agent="x\nfake")
        log.debug("chatter")
        logging.getLogger("elsewhere").warning("trouble with %s", "a socket")
    log.info("after the end")
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [each["event"] for each in written] == ["slot done", "trouble with a socket"]
    assert (written[0]["slot"], written[0]["agent"], written[0]["level"]) == (7, "x\\nfake", "info")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert "slot done" in capsys.readouterr().err


def test_the_file_says_why_the_node_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "json")
    with pytest.raises(ExceptionGroup), log_to_file(log_path(tmp_path), MIB, 3):
        raise ExceptionGroup("tasks", [StateError("nothing\nreadable"), KeyError()])
    [line] = log_path(tmp_path).read_text().splitlines()
    assert json.loads(line)["event"] == "stopped: nothing readable; KeyError"
    assert capsys.readouterr().err == ""


def test_a_full_file_is_set_aside_and_the_oldest_goes(tmp_path: Path) -> None:
    path = log_path(tmp_path)
    configure_logging("info", "json", io.StringIO())
    with log_to_file(path, 1000, 2):
        for number in range(60):
            structlog.get_logger("braniac.node.daemon").info(f"event {number}")
    assert sorted(file.name for file in path.parent.iterdir()) == ["node.log", "node.log.1", "node.log.2"]
    assert all(file.stat().st_size <= 1000 for file in path.parent.iterdir())
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
    kept = numbers(list(lines(path, 1000, "debug")))
    assert kept == list(range(kept[0], 60))
    assert len(kept) > 15


class FullDisk:
    """A stream that takes nothing until there is room again."""

    def __init__(self) -> None:
        self.full = True
        self.taken: list[str] = []

    def write(self, text: str) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.taken.append(text)

    def seek(self, *where: int) -> None: ...

    def tell(self) -> int:
        return 0

    def flush(self) -> None: ...

    def close(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_said_once_and_harms_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "console")
    disk, file = FullDisk(), LogFile(tmp_path / "node.log", MIB, 3)
    stream: Any = disk
    file.stream = stream
    for number in range(3):
        file.handle(logging.LogRecord("x", logging.INFO, "", 0, f"line {number}", None, None))
    assert capsys.readouterr().err.count("cannot write the log file") == 1
    disk.full = False
    file.handle(logging.LogRecord("x", logging.INFO, "", 0, "line 3", None, None))
    file.close()
    assert disk.taken == ["line 3\n"]


def test_a_folder_that_cannot_be_made_harms_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("a file is in the way")
    configure_logging("info", "console")
    with log_to_file(log_path(tmp_path), MIB, 3):
        for number in range(3):
            structlog.get_logger("braniac.node.daemon").info(f"event {number}")
    said = capsys.readouterr().err
    assert (said.count("cannot write the log file"), said.count("event ")) == (1, 3)


# --- reading ---------------------------------------------------------------------------------------------------------


def test_the_last_lines_come_from_all_files(tmp_path: Path) -> None:
    path = tmp_path / "node.log"
    for first, name in enumerate(("node.log.10", "node.log.2", "node.log.1", "node.log")):
        write(tmp_path / name, *(entry(10 * first + number) for number in range(10)))
    write(tmp_path / "node.log.old", entry(99))
    assert numbers(list(lines(path, 1000, "debug"))) == list(range(40))
    assert numbers(list(lines(path, 12, "debug"))) == list(range(28, 40))
    assert list(lines(path, 0, "debug")) == []


def test_levels(tmp_path: Path) -> None:
    path = tmp_path / "node.log"
    levels = ("debug", "info", "warning", "error", "critical")
    write(path, *(entry(number, level) for number, level in enumerate(levels)))
    for least in range(4):
        assert numbers(list(lines(path, 9, levels[least]))) == list(range(least, 5))
    write(path, "Traceback", "[1]", '{"no": "level"}')  # what cannot be judged is shown
    assert len(list(lines(path, 9, "error"))) == 5


def test_no_log_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"there is no log in .*braniac-node join"):
        list(lines(log_path(tmp_path), 9, "debug"))


def test_following_survives_rotations(tmp_path: Path) -> None:
    """Between two looks: nothing, half a line, its rest, a rotation, two rotations, and the loss of all older files."""
    path = tmp_path / "node.log"
    write(path, entry(0), entry(1))

    def rotate() -> None:
        for number in (2, 1):
            if (old := tmp_path / f"node.log.{number}").exists():
                old.rename(tmp_path / f"node.log.{number + 1}")
        path.rename(tmp_path / "node.log.1")

    def half() -> None:
        with path.open("a") as file:
            file.write(entry(2)[:5])

    def rest() -> None:
        with path.open("a") as file:
            file.write(entry(2)[5:] + "\n")

    def one() -> None:
        write(path, entry(3))  # after our last look, and before the rotation
        rotate()
        write(path, entry(4))

    def two() -> None:
        write(path, entry(5))
        rotate()
        write(path, entry(6))
        rotate()
        write(path, entry(7))

    def lost() -> None:
        rotate()
        for old in tmp_path.glob("node.log.*"):
            old.unlink()
        write(path, entry(8))

    def end() -> None:
        raise KeyboardInterrupt

    steps = iter([lambda: None, half, rest, one, rotate, two, lost, end])
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(lines(path, 1, "debug", lambda: next(steps)()))
    assert numbers(seen) == [1, 2, 3, 4, 5, 6, 7, 8]


# --- rendering -------------------------------------------------------------------------------------------------------


def test_a_line_looks_as_on_the_console() -> None:
    line = json.dumps({"slot": 7, "event": "slot done", "level": "info", "timestamp": "2026-01-02T03:04:05.678Z"})
    shown = render_line(line, colors=False)
    assert shown.startswith("2026-01-02T03:04:05Z [info     ] slot done ")
    assert shown.endswith("slot=7")
    assert "\x1b[" in render_line(line, colors=True)


def test_nothing_in_the_file_can_forge_a_line_or_move_the_cursor() -> None:
    forged = {"event": "a\nb", "agent": "\x1b[2J", "k\ney": 1, "exception": "Traceback\nValueError: \x1b[2J"}
    shown = render_line(json.dumps(forged), colors=False)
    assert len(shown.splitlines()) == 3  # the entry and the two lines of the traceback
    assert "\x1b" not in shown
    assert render_line("no json \x1b[2J", colors=False) == "no json \\x1b[2J"
    assert render_line("[1, 2]", colors=False) == "[1, 2]"
