"""The store keeps one whole generation through damage and full disks; crashes are in test_store_crash.py."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from braniac.node.errors import AlreadyRunning, ConfigError, StateError
from braniac.node.files import Files
from braniac.node.generation import JSON, Generation, decode_manifest, encode_manifest
from braniac.node.store import BlobDamaged, BlobMissing, DiskFull, Store
from braniac.protocol.spans import Spans
from tests.sim.disk import CrashingFiles, PowerCut


@contextlib.contextmanager
def opened(root: Path, keep: int = 3, files: Files | None = None) -> Iterator[Store]:
    store = Store.open(root, keep=keep, files=files)
    try:
        yield store
    finally:
        store.close()


def blobs_of(number: int) -> list[bytes]:
    """Weights and optimizer state of one generation; the last blob never changes, as an anchor may not."""
    return [f"weights {number} ".encode() * 50, f"optimizer {number} ".encode() * 70, b"anchor " * 30]


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def save(store: Store, number: int) -> int:
    return store.commit({"step": number}, [store.put(blob) for blob in blobs_of(number)])


def check_whole(store: Store, generation: Generation) -> int:
    """The step of a recovered generation, after checking that every blob belongs to that very step."""
    step = generation.content["step"]
    assert isinstance(step, int)
    assert {store.get(digest) for digest in generation.refs} == set(blobs_of(step))
    return step


def recovered_step(store: Store) -> int | None:
    generation = store.recover()
    return None if generation is None else check_whole(store, generation)


# Damage


def every_byte_flip(path: Path) -> Iterator[None]:
    original = path.read_bytes()
    for position in [*range(0, len(original), 7), len(original) - 1]:
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        yield
    for data in (b"", original[: len(original) // 2], original + b"\0", b"[]", b"null", b"\xff"):
        path.write_bytes(data)
        yield


def test_damage_anywhere_falls_back_one_generation(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        save(store, 1)
        before = set(tmp_path.rglob("*"))
        save(store, 2)
        only_in_2 = [path for path in sorted(set(tmp_path.rglob("*")) - before) if path.is_file()]
        assert len(only_in_2) == 3
        for path in only_in_2:
            original = path.read_bytes()
            for _ in every_byte_flip(path):
                assert recovered_step(store) == 1
                [(number, reason)] = store.skipped
                assert number == 2
                assert str(path) in reason
            path.write_bytes(original)
        assert recovered_step(store) == 2
        assert store.skipped == []


def test_damage_to_what_every_generation_needs_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        save(store, 1)
        save(store, 2)
        anchor = hashlib.sha256(blobs_of(1)[-1])
        path = tmp_path / "blobs" / anchor.hexdigest()[:2] / anchor.hexdigest()
        path.write_bytes(b"x" * path.stat().st_size)
        with pytest.raises(StateError, match="join again"):
            store.recover()
        assert [number for number, _ in store.skipped] == [2, 1]
        # The damaged blob was removed, so that putting (or fetching) it again repairs both.
        assert not store.has(anchor.digest())
        store.put(blobs_of(1)[-1])
        assert recovered_step(store) == 2


def test_get_removes_a_damaged_blob(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        digest = store.put(b"good")
        (tmp_path / "blobs" / digest.hex()[:2] / digest.hex()).write_bytes(b"evil")
        with pytest.raises(BlobDamaged):
            store.get(digest)
        with pytest.raises(BlobMissing):
            store.get(digest)
        assert store.put(b"good") == digest
        assert store.get(digest) == b"good"


def test_numbers_never_go_back_over_a_damaged_generation(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        save(store, 1)
        save(store, 2)
    (tmp_path / "generations" / f"{2:012}.json").write_bytes(b"{}")
    with opened(tmp_path) as store:
        assert recovered_step(store) == 1
        assert save(store, 3) == 3


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(
    number=st.integers(1, 10**12 - 1),
    content=st.dictionaries(st.text(max_size=9), VALUES, max_size=4),
    refs=st.lists(st.binary(min_size=32, max_size=32), max_size=3),
)
def test_any_manifest_comes_back(number: int, content: dict[str, JSON], refs: list[bytes]) -> None:
    generation = Generation(number, content, tuple(refs))
    data = encode_manifest(generation)
    assert decode_manifest(number, data) == generation
    with pytest.raises(ValueError, match="not those of this generation"):
        decode_manifest(number + 1, data)


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a":' * 100_000])
def test_a_manifest_nested_too_deeply_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        decode_manifest(1, data)


# Starts


def test_the_number_of_a_start_only_grows(tmp_path: Path) -> None:
    """Whatever the clock says that gives the least, and though nothing else was ever saved."""
    for least, number in ((100, 100), (90, 101), (90, 102), (200, 200)):
        with opened(tmp_path) as store:
            assert store.marks.count_start(least) == number
    for damage in (b"", b"many", b"\xff", b"9" * 30, b"9" * 5000, b"9 " + b"0" * 64):
        (tmp_path / "starts").write_bytes(damage)
        with opened(tmp_path) as store:
            assert store.marks.count_start(300) == 300


@pytest.mark.parametrize("mode", ["kill", "power", "reorder"])
def test_the_number_of_a_start_survives_a_crash(tmp_path: Path, mode: str) -> None:
    files = CrashingFiles(0, mode)
    with opened(tmp_path, files=files) as store:
        counted = store.marks.count_start(5)
    with contextlib.suppress(PowerCut):
        files.crash()
    with opened(tmp_path) as store:
        assert store.marks.count_start(5) == counted + 1


def test_what_may_be_signed_is_remembered(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        assert store.marks.signed() == Spans()
        store.marks.note_signing(5, 7)
        assert store.marks.note_signing(2647, 2650) == Spans(((5, 7), (2647, 2650)))
        store.marks.note_signing(4, 8)
    with opened(tmp_path) as store:
        assert store.marks.signed() == Spans(((4, 8), (2647, 2650)))
    data = bytearray((tmp_path / "signed").read_bytes())
    data[0] += 1
    (tmp_path / "signed").write_bytes(data)
    with opened(tmp_path) as store:
        assert store.marks.signed() == Spans()


def test_one_number_as_it_was_once_stored_stands_for_all_slots_up_to_it(tmp_path: Path) -> None:
    (tmp_path / "signed").write_bytes(b"7 " + hashlib.sha256(b"7").hexdigest().encode())
    with opened(tmp_path) as store:
        assert store.marks.signed() == Spans(((0, 7),))


@pytest.mark.parametrize("mode", ["kill", "power", "reorder"])
def test_what_may_be_signed_survives_a_crash(tmp_path: Path, mode: str) -> None:
    files = CrashingFiles(0, mode)
    with opened(tmp_path, files=files) as store:
        store.marks.note_signing(5, 7)
    with contextlib.suppress(PowerCut):
        files.crash()
    with opened(tmp_path) as store:
        assert store.marks.signed() == Spans(((5, 7),))


# Blobs


def test_a_blob_is_stored_once_and_served_in_chunks(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        data = bytes(range(256)) * 4
        digest = store.put(memoryview(data))
        assert digest == hashlib.sha256(data).digest()
        (path,) = (p for p in (tmp_path / "blobs").rglob("*") if p.is_file())
        inode = path.stat().st_ino
        assert store.put(data) == digest
        assert path.stat().st_ino == inode
        assert store.size(digest) == 1024
        assert store.read(digest, 1000, 100) == data[1000:]
        assert store.read(digest, 5000, 100) == b""
        assert store.get(store.put(b"")) == b""
        absent = bytes(32)
        assert not store.has(absent)
        assert store.size(absent) is None
        with pytest.raises(BlobMissing):
            store.read(absent, 0, 1)


def test_a_truncated_blob_is_put_again(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        digest = store.put(b"whole")
        (tmp_path / "blobs" / digest.hex()[:2] / digest.hex()).write_bytes(b"who")
        store.put(b"whole")
        assert store.get(digest) == b"whole"


def test_a_commit_needs_its_blobs(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        with pytest.raises(BlobMissing):
            store.commit({}, [bytes(32)])
        assert store.recover() is None


def test_content_that_json_would_change_is_our_bug(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        with pytest.raises(AssertionError):
            store.commit({"shape": (1, 2)}, [])  # type: ignore[dict-item]
        with pytest.raises(ValueError, match="JSON compliant"):
            store.commit({"loss": float("nan")}, [])
        assert store.recover() is None
        assert store.commit({"loss": 0.1, "deep": {"a": [None, True, "é"]}}, []) == 1
        assert store.recover() == Generation(1, {"loss": 0.1, "deep": {"a": [None, True, "é"]}}, ())


# Collection


def test_collect_keeps_the_newest_generations_and_what_is_asked_for(tmp_path: Path) -> None:
    with opened(tmp_path, keep=2) as store:
        for number in range(1, 5):
            save(store, number)
        pending = store.put(b"pending")
        stray = store.put(b"stray")
        (tmp_path / "generations" / "000000000009.json.tmp").write_bytes(b"torn")
        assert store.collect(keep_also=[pending]) == 2 + 4 + 1 + 1  # manifests, their blobs, the stray, the torn file
        assert store.has(pending)
        assert not store.has(stray)
        assert sorted(path.name for path in (tmp_path / "generations").iterdir()) == [f"{n:012}.json" for n in (3, 4)]
        assert recovered_step(store) == 4
        assert store.collect(keep_also=[pending]) == 0


def test_collect_never_counts_a_broken_generation(tmp_path: Path) -> None:
    with opened(tmp_path, keep=1) as store:
        save(store, 1)
        save(store, 2)
        (tmp_path / "generations" / f"{2:012}.json").write_bytes(b"{}")
        store.collect()
        assert recovered_step(store) == 1
        (tmp_path / "generations" / f"{1:012}.json").write_bytes(b"{}")
        assert store.collect() == 0
        with pytest.raises(StateError):
            store.recover()


# Full disks


class FullFiles(Files):
    """A disk whose `at`-th call fails, after half of the bytes if it is a write."""

    def __init__(self, at: int, code: int) -> None:
        self.at = at
        self._code = code

    def _step(self) -> None:
        self.at -= 1
        if self.at == 0:
            raise OSError(self._code, os.strerror(self._code))

    def create(self, path: Path) -> FileIO:
        self._step()
        return super().create(path)

    def write(self, file: FileIO, data: memoryview) -> None:
        super().write(file, data[: len(data) // 2])
        self._step()
        super().write(file, data[len(data) // 2 :])

    def fsync(self, file: FileIO) -> None:
        self._step()

    def fsync_directory(self, path: Path) -> None:
        self._step()

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)

    def mkdir(self, path: Path) -> None:
        self._step()
        super().mkdir(path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_at_every_call_keeps_the_last_generation(tmp_path: Path, code: int) -> None:
    files = FullFiles(0, code)
    with opened(tmp_path, files=files) as store:
        number = save(store, 0)
        for at in range(1, 100):
            files.at = at
            try:
                save(store, at)
            except DiskFull:
                files.at = 0
                assert not list(tmp_path.rglob("*.tmp"))
                assert recovered_step(store) == 0
                assert store.collect() <= 2  # what was put before the failure
            else:
                break
        assert at > 15  # two blobs at 5 to 7 calls each and the manifest's 5 must each have failed
        assert recovered_step(store) == at
        assert store.recover() == Generation(number + 1, {"step": at}, tuple(sorted(map(sha256, blobs_of(at)))))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_takes_no_number_away(tmp_path: Path, code: int) -> None:
    """A start that was forgotten would repeat sequence numbers, and a forgotten seat might be used twice."""
    files = FullFiles(0, code)
    with opened(tmp_path, files=files) as store:
        started = store.marks.count_start(5)
        store.marks.note_signing(5, 7)
        for at in range(1, 6):  # create, write, sync, rename, sync
            files.at = at
            with pytest.raises(DiskFull):
                store.marks.count_start(5)
            files.at = at
            with pytest.raises(DiskFull):
                store.marks.note_signing(6, 8)
        assert store.marks.signed().last in (7, 8)
        files.at = 0
        assert store.marks.count_start(5) > started
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_blob_whose_name_may_not_last_is_not_believed_in(tmp_path: Path) -> None:
    """The rename is done and syncing it fails: a `put` that repeats must do the work again."""
    files = FullFiles(0, errno.EIO)
    with opened(tmp_path, files=files) as store:
        files.at = 7  # mkdir, sync, create, write, sync, rename, sync
        with pytest.raises(DiskFull, match="free some space"):
            store.put(b"data")
        assert not store.has(sha256(b"data"))
        store.put(b"data")
        assert store.get(sha256(b"data")) == b"data"


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")
def test_a_really_full_disk(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)], check=False)
    if mounted.returncode != 0:
        pytest.skip("this system does not let us mount a tmpfs")
    try:
        with opened(tmp_path, keep=1) as store:
            save(store, 1)
            ballast = store.put(os.urandom(100_000))
            with pytest.raises(DiskFull):
                store.put(os.urandom(200_000))
            assert store.has(ballast)
            assert recovered_step(store) == 1
            store.collect()
            assert not store.has(ballast)
            store.put(b"z" * 200_000)
            save(store, 2)
            assert recovered_step(store) == 2
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_size_limit_reads_as_a_full_disk(tmp_path: Path) -> None:
    program = f"""
import resource, signal
from pathlib import Path
from braniac.node.store import DiskFull, Store
store = Store.open(Path({str(tmp_path)!r}))
store.commit({{"step": 1}}, [store.put(b"small")])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    store.put(bytes(5000))
except DiskFull:
    store.commit({{"step": 2}}, [store.put(b"also small")])
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not list(tmp_path.rglob("*.tmp"))
    with opened(tmp_path) as store:
        generation = store.recover()
        assert generation is not None
        assert generation.content == {"step": 2}


def test_other_errors_are_not_disguised(tmp_path: Path) -> None:
    files = FullFiles(0, errno.EMFILE)
    with opened(tmp_path, files=files) as store:
        files.at = 1
        with pytest.raises(OSError, match="Too many open files"):
            store.put(b"data")
        assert not store.has(hashlib.sha256(b"data").digest())


# The directory


def test_one_process_per_directory(tmp_path: Path) -> None:
    root = tmp_path / "new" / "state"
    program = f"from pathlib import Path; from braniac.node.store import Store; Store.open(Path({str(root)!r}))"
    with opened(root) as store:
        assert root.stat().st_mode & 0o777 == 0o700
        with pytest.raises(AlreadyRunning, match=f"process {os.getpid()}"):
            Store.open(root)
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert "AlreadyRunning" in other.stderr
        store.put(b"still mine")
    subprocess.run([sys.executable, "-c", program], check=True)
    with opened(root):
        assert (root / "lock").read_text() == str(os.getpid())


def test_a_path_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="--state-dir"):
            Store.open(path)


def test_a_fresh_directory_has_no_generation(tmp_path: Path) -> None:
    with opened(tmp_path) as store:
        assert store.recover() is None
        assert store.skipped == []
        assert store.collect() == 0
