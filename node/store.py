"""Durable state: immutable blobs named by their SHA-256, and generations that name a consistent set of them.

    <root>/lock                              held by the running daemon
    <root>/blobs/<2 hex>/<64 hex>            anchors, weights, optimizer state, pending payloads
    <root>/generations/<12 digits>.json      the manifests, see generation.py
    <root>/starts, <root>/signed             of the node and not of a generation, see marks.py

Blobs are durable before the manifest that names them is written, and one rename makes the manifest appear, so at every
instant the newest readable manifest is a whole generation: a crash leaves the old one or the new one, never a mix.
Nothing is trusted when it is read back; what does not hash to its name is removed, and `recover` falls back.

One thread writes (`put`, `commit`, `recover`, `collect`); `has`, `size`, `get`, `read` may be called from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import threading
from collections.abc import Iterable, Iterator
from io import FileIO
from pathlib import Path

from braniac.node.errors import ConfigError, ResourceError, StateError
from braniac.node.files import Files, ReadOnlyFiles, make_directory, remove_others, write_whole
from braniac.node.generation import JSON, Generation, decode_manifest, encode_manifest
from braniac.node.lock import DirectoryLock
from braniac.node.marks import Marks

_DIGEST_BYTES = 32
_MANIFEST_NAME = re.compile(r"[0-9]{12}\.json")
_CANNOT_WRITE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


class DiskFull(ResourceError):
    """Nothing can be written now. The store stays usable and the last generation stays; try again later."""


class BlobMissing(StateError):
    """No blob with this digest is here: put it again or fetch it."""


class BlobDamaged(BlobMissing):
    """The blob's bytes did not hash to its name; it has been removed."""


class Store:
    """The state directory of one running daemon. Make it with `Store.open`."""

    def __init__(self, root: Path, keep: int, files: Files, lock: DirectoryLock | None) -> None:
        assert keep >= 1
        self.root = root
        self.skipped: list[tuple[int, str]] = []  # generations that the last `recover` passed over, and why
        self._keep = keep
        self._files = files
        self._lock = lock
        self._writing = threading.RLock()
        self.marks = Marks(root, files, self._guarded)
        self._blobs = root / "blobs"
        self._generations = root / "generations"
        self._number = 0  # of the newest manifest, readable or not: numbers only grow

    @classmethod
    def open(cls, root: Path, *, keep: int = 3, files: Files | None = None) -> Store:
        """Take the directory, making it if need be; `keep` is how many generations `collect` leaves.

        Raises AlreadyRunning if another process holds it, ConfigError if the path cannot be used, DiskFull.
        """
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = DirectoryLock(root)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"cannot keep state in {root} ({reason}): choose another --state-dir") from error
        store = cls(root, keep, files or Files(), lock)
        try:
            store._prepare()
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def look(cls, root: Path) -> Store:
        """A view for reading, also while a daemon writes. Raises StateError if nothing was ever kept there."""
        if not (root / "generations").is_dir():
            raise StateError(f"{root} holds no checkpoint: start a node there with `braniac-node join` first")
        return cls(root, 1, ReadOnlyFiles(), None)

    def _prepare(self) -> None:
        with self._disk_errors():
            for directory in (self._blobs, self._generations):
                make_directory(self._files, directory)
            # A killed process may have renamed a blob and not lived to sync its name, yet `put` takes a name that
            # exists for durable. Syncing directories that are clean already costs next to nothing.
            for directory in (*self._shards(), self._blobs, self._generations, self.root):
                self._files.fsync_directory(directory)
        self._number = max(self._numbers(), default=0)

    def close(self) -> None:
        """Let another process have the directory. Harmless when repeated."""
        if self._lock is not None:
            self._lock.release()

    def put(self, data: bytes | memoryview) -> bytes:
        """Store `data` durably and return its SHA-256 (32 bytes); free if it is here already. Raises DiskFull."""
        view = memoryview(data).cast("B")
        digest = hashlib.sha256(view).digest()
        path = self._path(digest)
        with self._writing:
            if self.size(digest) != len(view):
                with self._disk_errors():
                    make_directory(self._files, path.parent)
                    write_whole(self._files, path, view)
        return digest

    def get(self, digest: bytes) -> bytes:
        """The blob's bytes, verified. Raises BlobMissing, or BlobDamaged after removing what was there."""
        with self._open(digest) as file:
            data = file.read()
        if hashlib.sha256(data).digest() != digest:
            raise self._damaged(digest)
        return data

    def has(self, digest: bytes) -> bool:
        """Whether a blob of this name is here, verified or not."""
        return self.size(digest) is not None

    def size(self, digest: bytes) -> int | None:
        """Length of the blob in bytes, or None if it is not here."""
        try:
            return self._path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, digest: bytes, offset: int, length: int) -> bytes:
        """At most `length` bytes of a blob from `offset`, to serve a peer in chunks. Raises BlobMissing.

        Not verified: whoever fetches a blob checks the whole of it against the digest that was asked for.
        """
        assert offset >= 0
        assert length >= 0
        with self._open(digest) as file:
            return os.pread(file.fileno(), length, offset)

    def commit(self, content: dict[str, JSON], refs: Iterable[bytes]) -> int:
        """Make a generation of `content` and the blobs `refs`, all of them put before; return its number.

        Once this returns, `recover` finds this generation or a later one. Raises BlobMissing, DiskFull.
        """
        digests = sorted(set(refs))
        for digest in digests:
            if not self.has(digest):
                raise self._missing(digest)
        with self._writing:
            number = self._number + 1
            data = encode_manifest(Generation(number, content, tuple(digests)))
            with self._disk_errors():
                write_whole(self._files, self._manifest(number), memoryview(data))
            self._number = number
        return number

    def recover(self) -> Generation | None:
        """The newest generation that is whole, every byte verified; None in a fresh directory.

        `skipped` then says which were passed over. Raises StateError if there are generations and none is whole.
        """
        self.skipped = []
        verified: set[bytes] = set()
        for number in sorted(self._numbers(), reverse=True):
            try:
                generation = self._load(number)
                for digest in generation.refs:
                    if digest not in verified:
                        self._verify(digest)
                        verified.add(digest)
            except StateError as error:
                self.skipped.append((number, str(error)))
            else:
                return generation
        if self.skipped:
            raise StateError(
                f"no generation in {self.root} can be read ({self.skipped[0][1]}): "
                "restore a copy, or join again with an empty --state-dir"
            )
        return None

    def collect(self, keep_also: Iterable[bytes] = ()) -> int:
        """Remove what no kept generation needs, and return how many files that was.

        Kept are the newest `keep` generations that have all their blobs, those blobs, and `keep_also`. A blob that was
        put for a commit yet to come must be in `keep_also`. Raises DiskFull.
        """
        with self._guarded():
            kept = self._complete()
            if not kept:
                return 0  # nothing here is known to be whole, so nothing here is known to be useless
            needed = {digest.hex() for digest in keep_also}.union(*(map(bytes.hex, g.refs) for g in kept))
            manifests = {self._manifest(generation.number).name for generation in kept}
            # Manifests go first: a crash in between leaves blobs without a manifest, never the reverse.
            removed = remove_others(self._files, self._generations, manifests)
            for directory in self._shards():
                removed += remove_others(self._files, directory, needed)
            return removed

    def _complete(self) -> list[Generation]:
        """The newest `keep` generations whose manifest is sound and whose blobs all exist."""
        complete: list[Generation] = []
        for number in sorted(self._numbers(), reverse=True):
            with contextlib.suppress(StateError):
                generation = self._load(number)
                if all(self.has(digest) for digest in generation.refs):
                    complete.append(generation)
            if len(complete) == self._keep:
                break
        return complete

    def _load(self, number: int) -> Generation:
        try:
            return decode_manifest(number, self._manifest(number).read_bytes())
        except ValueError as error:
            raise StateError(f"{self._manifest(number)} is damaged: {error}") from None
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENOENT):  # gone: a daemon swept it while we looked
                raise
            raise StateError(f"{self._manifest(number)} cannot be read: {error.strerror}") from None

    def _verify(self, digest: bytes) -> None:
        """Hash a blob without holding it in memory. Raises BlobMissing, BlobDamaged."""
        with self._open(digest) as file:
            found = hashlib.file_digest(file, "sha256").digest()
        if found != digest:
            raise self._damaged(digest)

    @contextlib.contextmanager
    def _open(self, digest: bytes) -> Iterator[FileIO]:
        """A blob open for reading. Only what the medium lost is damage: nothing is removed for want of a descriptor."""
        try:
            with FileIO(self._path(digest)) as file:
                yield file
        except FileNotFoundError:
            raise self._missing(digest) from None
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise self._damaged(digest) from error

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        with self._writing, self._disk_errors():
            yield

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _CANNOT_WRITE:
                raise
            raise DiskFull(f"cannot write to {self.root} ({error.strerror}): free some space on that disk") from error

    def _shards(self) -> list[Path]:
        return sorted(path for path in self._blobs.iterdir() if path.is_dir())

    def _numbers(self) -> list[int]:
        return [int(path.stem) for path in self._generations.iterdir() if _MANIFEST_NAME.fullmatch(path.name)]

    def _manifest(self, number: int) -> Path:
        return self._generations / f"{number:012}.json"

    def _path(self, digest: bytes) -> Path:
        assert len(digest) == _DIGEST_BYTES
        name = digest.hex()
        return self._blobs / name[:2] / name

    def _missing(self, digest: bytes) -> BlobMissing:
        return BlobMissing(f"{self._path(digest)} is missing: put it again or fetch it")

    def _damaged(self, digest: bytes) -> BlobDamaged:
        with contextlib.suppress(OSError):
            self._files.remove(self._path(digest))
        return BlobDamaged(f"{self._path(digest)} was damaged and has been removed: put it again or fetch it")
