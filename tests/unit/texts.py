"""Texts and shards for tests of what a peer reads: every kind of source, and a hash of the windows that come of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from braniac.model.data import Batches
from braniac.model.sources import Corpus

CONTEXT = 16


def write_shard(path: Path, tokens: list[int], magic: int = 20240520, version: int = 1, extra: int = 0) -> None:
    """A `.bin` shard; `extra` is how many tokens more its header promises."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) + extra
    path.write_bytes(header.tobytes() + np.array(tokens, "<u4" if version == 7 else "<u2").tobytes())


def write_texts(folder: Path) -> None:
    """Forty files in three formats, some of them no UTF-8, some empty, some held out."""
    for number in range(36):
        path = folder / f"part{number % 3}" / f"{number}.{('txt', 'py', 'md')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{number}: line {i}, naïve 🐍\n" for i in range(number)), encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9 \xff au lait\r\n" * 50 + b"\xf0\x9f")
    records = [{"text": f"record {i}\nof two lines"} for i in range(40)]
    records += [{"text": ""}, {"text": "half \ud800 a pair"}, {"text": "🐍"}]
    (folder / "records.jsonl").write_text("\n\n".join(map(json.dumps, records)), encoding="utf-8")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "picture.png").write_bytes(b"no text")


def windows_hash(corpus: Corpus, seed: int = 3, peer: bytes = b"somebody") -> str:
    """Of everything that a peer reads in some steps, and of the held-out windows."""
    batches = Batches(corpus, seed, peer, CONTEXT, 4)
    digest = hashlib.sha256()
    for tokens, targets in (*(batches.batch(step) for step in (0, 1, 2, 1000)), batches.held_out(7)):
        digest.update(tokens.numpy().tobytes() + targets.numpy().tobytes())
    return digest.hexdigest()[:16]


def write_tokenizer(path: Path, vocab_size: int = 400) -> Path:
    """A byte-level BPE of the standard library's `json` package; the same file each time."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((Path(json.__file__).parent / "decoder.py").read_text().splitlines(True), trainer)
    tokenizer.save(str(path))
    return path
