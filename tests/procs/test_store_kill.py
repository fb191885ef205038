"""A process that commits in a loop is killed with SIGKILL again and again: nothing it acknowledged is lost or mixed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from braniac.node.store import Store

KILLS = 30
BLOB_BYTES = 100_000


def blob(name: str, number: int) -> bytes:
    """Bytes that say which generation they belong to, all the way through."""
    seed = f"{name} {number} ".encode()
    return seed * (BLOB_BYTES // len(seed))


def commit_forever(root: Path) -> None:
    store = Store.open(root, keep=2)
    generation = store.recover()
    number = 0 if generation is None else generation.number
    while True:
        number += 1
        refs = [store.put(blob(name, number)) for name in ("weights", "optimizer")]
        assert store.commit({"step": number}, refs) == number
        print(number, flush=True)  # noqa: T201 - the acknowledgement that the parent counts on
        if number % 3 == 0:
            store.collect()


def run_and_kill(root: Path, lines: int) -> int:
    """Kill the writer once it has acknowledged `lines` commits; the last number it acknowledged at all."""
    with subprocess.Popen([sys.executable, __file__, str(root)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline() for _ in range(lines)]
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL
    return max(int(line) for line in acknowledged if line.endswith("\n"))


def test_sigkill_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    last = 0
    for kill in range(KILLS):
        last = max(last, run_and_kill(tmp_path, lines=1 + kill * 5 % 7))
        store = Store.open(tmp_path, keep=2)  # the kernel released the dead process's lock
        generation = store.recover()
        store.close()
        assert generation is not None
        assert store.skipped == []
        assert generation.number >= last
        assert generation.content == {"step": generation.number}
        expected = {hashlib.sha256(blob(name, generation.number)).digest() for name in ("weights", "optimizer")}
        assert set(generation.refs) == expected
        last = generation.number
    assert last >= KILLS


if __name__ == "__main__":
    commit_forever(Path(sys.argv[1]))
