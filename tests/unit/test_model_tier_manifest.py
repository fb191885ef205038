"""The manifest of tiers: its format, and the refusal of every forged, damaged or misleading one."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from braniac.model.errors import CheckpointError
from braniac.model.tier_folders import Strategy, resolve, tier_folder, write_manifest
from tests.unit.checkpoint_folders import STRATEGIES, edit, export, save, weights


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    return export(tmp_path)


def test_the_manifest_has_schema_version_1(exported: Path) -> None:
    document = json.loads((exported / "matformer_manifest.json").read_text())
    prefixes = {0: "", 1: "../X-tier1/", 2: "../X-tier2/"}
    files = {
        tier: [prefix + name for name in ("config.json", "model.safetensors")] for tier, prefix in prefixes.items()
    }
    assert document == {
        "schema_version": 1,
        "matformer_base_intermediate_size": 64,
        "common_files": ["tokenizer.json"],
        "tiers": [{"tier": tier, "intermediate_size": 64 >> tier, "files": files[tier]} for tier in (0, 1, 2)],
        "sha256": {
            name: hashlib.sha256((exported / name).read_bytes()).hexdigest()
            for name in ["tokenizer.json", *itertools.chain(*files.values())]
        },
    }


def renamed(new: object, old: str = "../X-tier1/model.safetensors") -> Callable[[dict[str, Any]], object]:
    """Another path in place of the weights of tier 1, consistently."""

    def change(document: dict[str, Any]) -> None:
        files = document["tiers"][1]["files"]
        files[files.index(old)] = new
        document["sha256"][new if isinstance(new, str) else "x"] = document["sha256"].pop(old)

    return change


FORGERIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "absolute": (renamed("/etc/model.safetensors"), "'/etc/model.safetensors' is absolute"),
    "drive": (renamed("C:/model.safetensors"), "no POSIX path"),
    "backslash": (renamed("..\\X-tier1\\model.safetensors"), "no POSIX path"),
    "control character": (renamed("../X-tier1/\0model.safetensors"), "no POSIX path"),
    "two steps up": (renamed("../../etc/model.safetensors"), "leaves the folder"),
    "up again later": (renamed("../X-tier1/../../model.safetensors"), "leaves the folder"),
    "detour": (renamed("../X-tier1/./model.safetensors"), "leaves the folder or is not in its shortest form"),
    "double slash": (renamed("../X-tier1//model.safetensors"), "not in its shortest form"),
    "empty path": (renamed(""), "no path"),
    "only dots": (renamed(".."), "leaves the folder"),
    "long path": (renamed("../X-tier1/" + "m" * 600 + ".safetensors"), "1 to 512 characters"),
    "number for a path": (renamed(7), "7' is no path"),
    "pickle": (renamed("../X-tier1/pytorch_model.bin"), "never from a pickle"),
    "no weights": (lambda m: m["tiers"][1]["files"].pop(), "tier 1 names no .safetensors file"),
    "no config": (lambda m: m["tiers"][1]["files"].pop(0), "exactly one config.json"),
    "two folders": (renamed("../X-tier2/model.safetensors"), "lie in several folders"),
    "same file twice": (lambda m: m["tiers"][1]["files"].append(m["tiers"][1]["files"][0]), "list of different paths"),
    "executable common file": (lambda m: m["common_files"].append("run.so"), "'run.so'"),
    "version 2": (lambda m: m.update(schema_version=2), "schema_version is 2; 1 is the only one known"),
    "version true": (lambda m: m.update(schema_version=True), "schema_version is True"),
    "missing key": (lambda m: m.pop("sha256"), "exactly .*sha256"),
    "unknown key": (lambda m: m.update(extra=1), "exactly"),
    "unknown tier key": (lambda m: m["tiers"][1].update(extra=1), "a tier has the keys"),
    "base 0": (lambda m: m.update(matformer_base_intermediate_size=0), "matformer_base_intermediate_size is 0"),
    "base huge": (lambda m: m.update(matformer_base_intermediate_size=1 << 60), "whole number from 1 to"),
    "base of others": (lambda m: m.update(matformer_base_intermediate_size=128), "128 / 2\\^0 is expected"),
    "tier of others": (lambda m: m["tiers"][1].update(tier=3), "intermediate_size of tier 3 is 32"),
    "tier huge": (lambda m: m["tiers"][1].update(tier=10**9), "tier is 1000000000"),
    "tier twice": (lambda m: m["tiers"].append(m["tiers"][1]), "tier 1 is listed twice"),
    "tier no object": (lambda m: m["tiers"].append(1), "no object"),
    "tiers no list": (lambda m: m.update(tiers={}), "tiers is no list"),
    "common no list": (lambda m: m.update(common_files="tokenizer.json"), "common_files is no list"),
    "hash missing": (lambda m: m["sha256"].pop("tokenizer.json"), "exactly the files"),
    "hash too many": (lambda m: m["sha256"].update({"../../x": "0" * 64}), "exactly the files"),
    "hash in capitals": (lambda m: m["sha256"].update({"tokenizer.json": "A" * 64}), "64 lower-case"),
    "hashes no object": (lambda m: m.update(sha256=[]), "exactly the files"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_is_refused_under_every_strategy(exported: Path, name: str) -> None:
    change, sentence = FORGERIES[name]
    edit(exported, change)
    for tier, strategy in itertools.product((0, 1), STRATEGIES):
        with pytest.raises(CheckpointError, match=sentence) as caught:
            resolve(exported, tier, strategy)
        assert str(caught.value).startswith(str(exported / "matformer_manifest.json"))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no JSON object"),
        (b"1" * 10_000, "no JSON"),
        (b'{"schema_version": 1, "schema_version": 1}', "a key is repeated"),
        (b" " * (1 << 20) + b"{}", "larger than 1048576 bytes"),
        (pickle.dumps({"schema_version": 1}), "no JSON"),
    ],
)
def test_what_is_no_manifest_is_refused(exported: Path, data: bytes, sentence: str) -> None:
    (exported / "matformer_manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"matformer_manifest.json .*{sentence}"):
        resolve(exported, 0, "auto")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nothing")])
def test_a_manifest_that_is_no_file_is_refused(exported: Path, make: Callable[[Path], None]) -> None:
    path = exported / "matformer_manifest.json"
    path.unlink()
    make(path)
    with pytest.raises(CheckpointError, match=r"matformer_manifest.json is missing or no file"):
        resolve(exported, 0, "auto")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_file_of_the_whole_checkpoint_is_named(exported: Path, name: str) -> None:
    (exported / name).unlink()
    for strategy in STRATEGIES:
        with pytest.raises(CheckpointError, match=rf"matformer_manifest.json lists '{name}', which is missing"):
            resolve(exported, 0, strategy)


@pytest.mark.parametrize("name", ["../X-tier1/model.safetensors", "../X-tier1/config.json", "tokenizer.json"])
@pytest.mark.parametrize("strategy", ["auto", "sliced"])
def test_a_changed_file_is_refused(exported: Path, name: str, strategy: Strategy) -> None:
    with (exported / name).open("ab") as file:
        file.write(b" ")
    with pytest.raises(CheckpointError, match=f"{Path(name).name} has SHA-256 .* but .*matformer_manifest.json says"):
        resolve(exported, 1, strategy)


def test_changed_universal_weights_are_refused_and_other_tiers_are_not_read(exported: Path) -> None:
    (exported / "model.safetensors").write_bytes(weights(64) + b"")
    assert resolve(exported, 0, "auto").width == 64
    (exported / "config.json").write_text((exported / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match=r"config.json has SHA-256"):
        resolve(exported, 2, "universal")
    assert resolve(exported, 2, "auto").width == 16


def test_a_whole_checkpoint_that_is_listed_elsewhere_is_refused(exported: Path) -> None:
    save(exported.parent / "Y", 64, 64, 0)

    def elsewhere(document: dict[str, Any]) -> None:
        for name in ("config.json", "model.safetensors"):
            document["sha256"][f"../Y/{name}"] = document["sha256"].pop(name)
        document["tiers"][0]["files"] = ["../Y/config.json", "../Y/model.safetensors"]

    edit(exported, elsewhere)
    with pytest.raises(CheckpointError, match=r"has tier 0 in .*Y: it must be in .*X"):
        resolve(exported, 0, "auto")


def test_a_file_that_nobody_listed_is_refused(exported: Path) -> None:
    extra = tier_folder(exported, 1) / "model-extra.safetensors"
    extra.write_bytes(weights(32))
    with pytest.raises(CheckpointError, match=r"model-extra.safetensors is not listed"):
        resolve(exported, 1, "auto")


def link_file_outside(universal: Path) -> None:
    target = universal.parent / "X-tier1" / "model.safetensors"
    outside = universal.parent.parent / "outside.safetensors"
    target.rename(outside)
    target.symlink_to(outside)


def link_folder_outside(universal: Path) -> None:
    (universal.parent / "X-tier1").rename(universal.parent.parent / "outside")
    (universal.parent / "X-tier1").symlink_to(universal.parent.parent / "outside")


def link_to_nothing(universal: Path) -> None:
    target = universal.parent / "X-tier1" / "model.safetensors"
    target.unlink()
    target.symlink_to("nothing.safetensors")


def link_to_itself(universal: Path) -> None:
    target = universal.parent / "X-tier1" / "model.safetensors"
    target.unlink()
    target.symlink_to("model.safetensors")


def folder_for_file(universal: Path) -> None:
    target = universal.parent / "X-tier1" / "model.safetensors"
    target.unlink()
    target.mkdir()


def pipe_for_file(universal: Path) -> None:
    target = universal.parent / "X-tier1" / "model.safetensors"
    target.unlink()
    os.mkfifo(target)


@pytest.mark.parametrize(
    ("hide", "sentence"),
    [
        (link_file_outside, "leads to .*outside.safetensors; only files below"),
        (link_folder_outside, "leads to .*outside/config.json; only files below"),
        (link_to_nothing, "a link to nothing"),
        (link_to_itself, "cannot be read"),
        (folder_for_file, "no regular file"),
        (pipe_for_file, "no regular file"),
    ],
)
def test_a_listed_path_that_leads_elsewhere_is_refused(
    tmp_path: Path, hide: Callable[[Path], None], sentence: str
) -> None:
    universal = save(tmp_path / "inner" / "X", 64, 64, 0)
    save(tmp_path / "inner" / "X-tier1", 32, 64, 1)
    write_manifest(universal, [1])
    hide(universal)
    for strategy in STRATEGIES[:2]:
        with pytest.raises(CheckpointError, match=sentence):
            resolve(universal, 1, strategy)


def test_a_link_that_stays_among_the_siblings_is_followed(exported: Path) -> None:
    target = tier_folder(exported, 1) / "model.safetensors"
    target.rename(exported.parent / "blob.safetensors")
    target.symlink_to("../blob.safetensors")
    assert resolve(exported, 1, "sliced").folder == tier_folder(exported, 1)


def test_a_pickle_under_the_name_of_safetensors_is_refused(exported: Path) -> None:
    for folder, tier in ((exported, 0), (tier_folder(exported, 1), 1)):
        for data in (pickle.dumps({"a": 1}), b"", b"\xff" * 64):
            (folder / "model.safetensors").write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            name = "model.safetensors" if tier == 0 else "../X-tier1/model.safetensors"
            edit(exported, lambda m, name=name, digest=digest: m["sha256"].update({name: digest}))
            with pytest.raises(CheckpointError, match=r"model.safetensors is no valid safetensors file"):
                resolve(exported, tier, "auto")
