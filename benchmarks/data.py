"""How fast text is read: windows of a mapped token shard, and text made into tokens once, in this fresh process.

The shard is made here and put out of the kernel's cache before it is read, so `shard_read_share` is how much of it the
windows took from the disk. Growth of resident memory is the kernel's (VmRSS, VmHWM). Without --tokenizer, text becomes
bytes. The JSON object is the last line on stdout.

    python benchmarks/data.py --shard-mib 512 --text-mib 64 --tokenizer tokenizer.json --json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from braniac.model.data import Batches
from braniac.model.sources import TextSource
from braniac.model.tokenizer import ByteTokenizer, FileTokenizer
from braniac.node.text import default_text

MIB = 1 << 20
WARM_STEPS = 20


def status_bytes(key: str) -> int:
    """A figure of this process from the kernel."""
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith(key + ":")).split()[1]) * 1024


def disk_bytes_read() -> int:
    with open("/proc/self/io") as io:
        return int(next(line for line in io if line.startswith("read_bytes:")).split()[1])


def write_shard(path: Path, mib: int) -> None:
    """Random tokens of GPT-2's vocabulary, on the disk and nowhere else."""
    dice, count = np.random.default_rng(0), mib * MIB // 2
    with path.open("wb") as file:
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count
        file.write(header.tobytes())
        for begin in range(0, count, MIB):
            file.write(dice.integers(0, 50257, min(MIB, count - begin)).astype("<u2").tobytes())
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def windows(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Batches of a shard."""
    path = folder / "shard.bin"
    write_shard(path, options.shard_mib)
    began = time.perf_counter()
    corpus = TextSource(folder / "cache", (path,)).load(50304)
    checked_s = time.perf_counter() - began
    with path.open("rb") as file:  # the check has read it all
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    TextSource(folder / "cache", (path,)).load(50304)
    again_s = time.perf_counter() - began
    batches = Batches(corpus, 0, b"somebody", options.context, options.batch)
    for step in range(WARM_STEPS):
        batches.batch(step)
    resident, read, began = status_bytes("VmRSS"), disk_bytes_read(), time.perf_counter()
    for step in range(WARM_STEPS, WARM_STEPS + options.steps):
        batches.batch(step)
    seconds = time.perf_counter() - began
    tokens = options.steps * options.batch * options.context
    return {
        "shard_mib": options.shard_mib,
        "shard_check_mib_per_s": options.shard_mib / checked_s,
        "shard_open_again_s": again_s,
        "shard_tokens_per_s": tokens / seconds,
        "shard_ms_per_batch": 1000 * seconds / options.steps,
        "shard_read_share": (disk_bytes_read() - read) / (options.shard_mib * MIB),
        "shard_wanted_share": 2 * tokens / (options.shard_mib * MIB),
        "shard_rss_growth_mib": (status_bytes("VmRSS") - resident) / MIB,
    }


def tokenising(folder: Path, options: argparse.Namespace) -> dict[str, float | str]:
    """Text that no cache has, then the same from the cache."""
    tokenizer = ByteTokenizer() if options.tokenizer is None else FileTokenizer.read(options.tokenizer)
    source = default_text().load(256).train[0].tobytes()
    text = folder / "text.txt"
    with text.open("wb") as file:
        for number in itertools.count():
            if file.tell() >= options.text_mib * MIB:
                break
            file.write(b"# copy %d\n" % number + source[: options.text_mib * MIB - file.tell()])
    cache, before, began = folder / "cache", status_bytes("VmHWM"), time.perf_counter()
    corpus = TextSource(cache, (text,), tokenizer=tokenizer).load(tokenizer.vocab_size)
    seconds = time.perf_counter() - began
    began = time.perf_counter()
    TextSource(cache, (text,), tokenizer=tokenizer).load(tokenizer.vocab_size)
    tokens = sum(map(len, (*corpus.train, *corpus.held_out)))
    return {
        "tokenizer": tokenizer.name,
        "text_mib": options.text_mib,
        "text_tokens": tokens,
        "text_tokens_per_s": tokens / seconds,
        "text_mib_per_s": options.text_mib / seconds,
        "text_from_cache_s": time.perf_counter() - began,
        "text_peak_growth_mib": (status_bytes("VmHWM") - before) / MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shard-mib", type=int, default=512)
    parser.add_argument("--text-mib", type=int, default=64)
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer.json")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="where to put the shard and the text; default: a temporary folder")
    parser.add_argument("--json", action="store_true", help="only the JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = windows(Path(folder), options) | tokenising(Path(folder), options)
    if not options.json:
        for key, value in found.items():
            print(f"{key:<24} {value if isinstance(value, str) else f'{value:,.4g}'}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
