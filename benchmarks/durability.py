"""Real SIGKILLs of a process that saves generations in a loop: is anything that it acknowledged lost, torn or mixed?

Each life opens the store, recovers, and saves until it is killed at a random moment, from before the store is open on.
After each kill the store is opened here, as the node does at its start, and what it finds is compared with what the
dead process had acknowledged and with what belongs to that generation, byte by byte. Counted are

  kills         lives
  unfinished    of them, kills that left something that belongs to no generation: they hit a save, or a sweep
  saves         acknowledged generations
  lost          starts that found an older generation than was acknowledged last
  torn          starts that had to pass over a damaged generation, or found none that is whole
  mixed         starts that found a generation whose parts are not all its own

    python benchmarks/durability.py --kills 1000 --json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from braniac.node.errors import StateError
from braniac.node.store import Store

BLOB_BYTES = 200_000
ANCHORS = 4
KEEP = 2
LIFE_S_MAX = 0.25  # of which opening the store takes a small part


def blobs_of(number: int) -> list[bytes]:
    """Weights, optimizer and payload of one generation, and anchors of which one is new: each says what it is."""
    anchors = [f"anchor {index} as of {number - (number - index) % ANCHORS}" for index in range(ANCHORS)]
    return [
        f"{name} ".encode() * (BLOB_BYTES // len(name)) for name in (f"weights {number}", f"payload {number}", *anchors)
    ]


def save_for_ever(root: Path) -> None:
    """The process that is killed. Says `ready`, then the number of each generation that it has saved."""
    print("ready", flush=True)
    store = Store.open(root, keep=KEEP)
    generation = store.recover()
    number = generation.number if generation else 0
    while True:
        number += 1
        assert store.commit({"step": number}, [store.put(blob) for blob in blobs_of(number)]) == number
        print(number, flush=True)
        if number % 3 == 0:
            store.collect()


def live_and_die(root: Path, life_s: float) -> int:
    """Start that process and kill it `life_s` after it was ready: the last number it acknowledged, 0 if none."""
    command = [sys.executable, __file__, "--save", str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(life_s)  # not to wait for anything: this is the random moment
        process.send_signal(signal.SIGKILL)
        told = process.stdout.readlines()
    assert process.returncode == -signal.SIGKILL, "it must not end by itself"
    return max((int(line) for line in told if line.endswith("\n")), default=0)


def unfinished_files(root: Path) -> list[Path]:
    """What no manifest names."""
    manifests = list((root / "generations").glob("*.json"))
    named = {ref for manifest in manifests for ref in json.loads(manifest.read_bytes())["refs"]}
    known = {"lock", *named, *(manifest.name for manifest in manifests)}
    return [path for path in root.rglob("*") if path.is_file() and path.name not in known]


def torture(root: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill it again and again on one directory, and look at what is there after each."""
    dice = random.Random(seed)
    last = saves = unfinished = lost = torn = mixed = 0
    recover_s = []
    for _ in range(kills):
        acknowledged = max(last, live_and_die(root, dice.uniform(0, LIFE_S_MAX)))
        saves += acknowledged - last
        began = time.perf_counter()
        store = Store.open(root, keep=KEEP)  # the kernel has released the dead process's lock
        try:
            generation = store.recover()
        except StateError:
            generation = None
            torn += 1
        recover_s.append(time.perf_counter() - began)
        last = generation.number if generation else 0
        torn += bool(store.skipped) and generation is not None
        lost += last < acknowledged
        if generation is not None:
            refs = {hashlib.sha256(blob).digest() for blob in blobs_of(last)}
            mixed += generation.content != {"step": last} or set(generation.refs) != refs
        unfinished += bool(unfinished_files(root))
        store.close()
    return {
        "kills": kills,
        "unfinished": unfinished,
        "saves": saves,
        "lost": lost,
        "torn": torn,
        "mixed": mixed,
        "recover_s_median": statistics.median(recover_s),
        "recover_s_max": max(recover_s),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of death")
    parser.add_argument("--dir", type=Path, help="where to save; otherwise a temporary folder")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--save", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.save is not None:
        save_for_ever(options.save)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        found = torture(Path(folder), options.kills, options.seed)
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:20}{value:>12.4g}" if isinstance(value, float) else f"{name:20}{value:>12}")
    return int(bool(found["lost"] or found["torn"] or found["mixed"]))


if __name__ == "__main__":
    sys.exit(main())
