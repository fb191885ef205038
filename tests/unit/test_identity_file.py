"""The key file: made once, private, and refused when it is not what it should be."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from braniac.node.errors import IdentityFileError
from braniac.node.identity_file import encode, load, load_or_create
from braniac.protocol.identity import Identity


def write(path: Path, data: bytes, mode: int = 0o600) -> None:
    path.write_bytes(data)
    path.chmod(mode)


def test_made_once_and_readable_by_the_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    made = load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create(path).peer_id == made.peer_id
    assert load_or_create(tmp_path / "other.key").peer_id != made.peer_id


def test_bytes_are_libp2ps_private_key_message(tmp_path: Path) -> None:
    identity = Identity.from_seed(bytes(range(32)))
    assert encode(identity) == b"\x08\x01\x12\x40" + identity.seed + identity.public_key
    write(tmp_path / "key", encode(identity), 0o400)
    assert load(tmp_path / "key").seed == identity.seed


def test_a_missing_file_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_open_to_others_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    write(tmp_path / "key", encode(Identity.from_seed(bytes(32))), mode)
    with pytest.raises(IdentityFileError, match=r"chmod 600 .*key"):
        load_or_create(tmp_path / "key")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\x08\x02" + data[2:],
        lambda data: data[:10] + bytes([data[10] ^ 1]) + data[11:],  # the public half is of another seed
    ],
)
def test_damaged_is_refused_and_kept(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    data = damage(encode(Identity.from_seed(bytes(32))))
    write(tmp_path / "key", data)
    with pytest.raises(IdentityFileError, match="damaged"):
        load_or_create(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == data


def test_an_rsa_key_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "key", b"\x08\x00\x12\xa8\x09" + bytes(1192))
    with pytest.raises(IdentityFileError, match="RSA"):
        load_or_create(tmp_path / "key")


def test_a_directory_or_a_missing_one_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(IdentityFileError, match="cannot read"):
        load_or_create(tmp_path)
    with pytest.raises(IdentityFileError, match="cannot write"):
        load_or_create(tmp_path / "missing" / "key")


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(IdentityFileError, match="No space left"):
        load_or_create(tmp_path / "key")
    assert not list(tmp_path.iterdir())
