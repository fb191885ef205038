"""Folders are written whole or not at all, whatever interrupts, and nothing else is ever replaced."""

from __future__ import annotations

import os
from collections.abc import Callable, ItemsView, Iterator
from pathlib import Path

import pytest

from braniac.model.errors import CheckpointError
from braniac.model.tier_folders import write_folder

FILES = {"config.json": b"{}", "model.safetensors": b"\1" * 100_000}


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Watched(dict[str, bytes]):
    """Files that call `look` before each of them is written."""

    def __init__(self, look: Callable[[], None]) -> None:
        super().__init__(FILES)
        self.look = look

    def items(self) -> ItemsView[str, bytes]:
        class View(ItemsView[str, bytes]):
            def __iter__(view) -> Iterator[tuple[str, bytes]]:
                for item in dict.items(self):
                    self.look()
                    yield item

        return View(self)


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "X"
    seen: list[bool] = []
    write_folder(target, Watched(lambda: seen.append(target.exists())))
    assert seen == [False, False]
    assert content(target) == FILES
    assert os.listdir(tmp_path) == ["X"]
    plain = tmp_path / "plain"
    plain.mkdir()
    assert target.stat().st_mode == plain.stat().st_mode, "others may read it as they may any new folder"


def test_an_old_folder_stays_whole_until_the_new_one_is(tmp_path: Path) -> None:
    target, seen = tmp_path / "X", list[dict[str, bytes]]()
    write_folder(target, {"old": b"1", "config.json": b"old"})
    write_folder(target, Watched(lambda: seen.append(content(target))), overwrite=True)
    assert seen == [{"old": b"1", "config.json": b"old"}] * 2
    assert content(target) == FILES
    assert os.listdir(tmp_path) == ["X"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
@pytest.mark.parametrize("exists", [False, True])
def test_an_interruption_leaves_nothing_partial(tmp_path: Path, error: type[BaseException], exists: bool) -> None:
    target, calls = tmp_path / "X", iter([None, error("stop")])
    if exists:
        write_folder(target, {"old": b"1"})

    def stop_at_the_second_file() -> None:
        problem = next(calls)
        if problem is not None:
            raise problem

    with pytest.raises(CheckpointError if error is OSError else error, match="stop"):
        write_folder(target, Watched(stop_at_the_second_file), overwrite=exists)
    assert os.listdir(tmp_path) == (["X"] if exists else [])
    assert not exists or content(target) == {"old": b"1"}


def test_a_disk_that_refuses_a_file_leaves_nothing_partial(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*X \(File name too long\)"):
        write_folder(tmp_path / "X", {**FILES, "n" * 300: b""})
    assert os.listdir(tmp_path) == []


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real = tmp_path / "X", Path.rename
    write_folder(target, {"old": b"1"})

    def rename(self: Path, to: Path) -> Path:
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write_folder(target, FILES, overwrite=True)
    assert content(target) == {"old": b"1"}
    assert os.listdir(tmp_path) == ["X"]


def test_what_exists_is_not_overwritten_unasked(tmp_path: Path) -> None:
    write_folder(tmp_path / "X", FILES)
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("X", "dangling"):
        with pytest.raises(CheckpointError, match=f"{name} exists: choose another name"):
            write_folder(tmp_path / name, {"new": b""})
    assert content(tmp_path / "X") == FILES


def test_only_a_flat_folder_can_be_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home" / "photos").mkdir(parents=True)
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("home")
    sentences = {"home": "holds the folder 'photos'", "file": "is no folder", "link": "is no folder"}
    for name, sentence in sentences.items():
        with pytest.raises(CheckpointError, match=sentence):
            write_folder(tmp_path / name, FILES, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "home", "link"]
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["", ".", "..", "../X", "a/b", "/etc/x", "a\\b", "C:x", "a\0"])
def test_a_file_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="give a plain file name"):
        write_folder(tmp_path / "X", {name: b""})
    assert os.listdir(tmp_path) == []


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot write .*no/X \(No such file or directory\)"):
        write_folder(tmp_path / "no" / "X", FILES)
