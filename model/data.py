"""Which tokens a peer trains on: a pure function of (run seed, peer id, step).

So a peer that restarts resumes where it was, nobody hands out work, and anybody who has the same text can check what
a peer claims to have read. NumPy's Philox with a hashed key is the random function: any step can be computed alone.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from braniac.model.errors import DataError
from braniac.model.shards import Tokens
from braniac.model.sources import Corpus


def keyed_bits(purpose: str, seed: int, peer: bytes, step: int, count: int) -> npt.NDArray[np.uint64]:
    """`count` uniform 64-bit numbers, uint64 [count], that only these arguments decide."""
    key = hashlib.blake2b(f"{purpose}\0{seed}\0".encode() + peer, digest_size=16).digest()
    # The stream advances the lowest word of the counter, so steps never share numbers.
    return np.random.Philox(key=int.from_bytes(key, "little"), counter=step << 64).random_raw(count)


class Batches:
    """Draws training batches for one peer, and evaluation windows that are the same for all peers."""

    def __init__(self, corpus: Corpus, seed: int, peer: bytes, context: int, batch: int) -> None:
        """Raises DataError if the training text is shorter than one batch of `batch` windows of `context` tokens."""
        self.corpus = corpus
        self.seed = seed
        self.peer = peer
        self.context = context
        self.batch_size = batch
        self._starts = _window_starts(corpus.train, context)
        held, needed = sum(len(tokens) for tokens in corpus.train), batch * context + 1
        if held < needed or self._starts[-1] == 0:
            raise DataError(
                f"{corpus.name} holds {held} tokens for training, fewer than one batch: "
                f"give at least {needed} ({batch} windows of {context})."
            )

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of one step, int64 [batch, context] each; a target is the token after its input."""
        bits = keyed_bits("batch", self.seed, self.peer, step, self.batch_size)
        return self._windows(self.corpus.train, bits % np.uint64(self._starts[-1]), self._starts)

    def held_out(self, windows: int) -> tuple[Tensor, Tensor]:
        """Evaluation tokens and targets, int64 [windows, context] each, evenly spaced over the held-out text.

        Raises DataError if not even one window was held out.
        """
        starts = _window_starts(self.corpus.held_out, self.context)
        if not len(starts) or starts[-1] == 0:
            held = sum(len(tokens) for tokens in self.corpus.held_out)
            raise DataError(
                f"{self.corpus.name} leaves {held} tokens held out: evaluation needs one window of {self.context + 1}."
            )
        places = np.arange(windows, dtype=np.uint64) * np.uint64(starts[-1]) // np.uint64(windows)
        return self._windows(self.corpus.held_out, places, starts)

    def _windows(
        self, arrays: tuple[Tokens, ...], places: npt.NDArray[np.uint64], starts: npt.NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        rows = np.empty((len(places), self.context + 1), np.int64)
        for row, place in zip(rows, places.astype(np.int64), strict=True):
            which = int(np.searchsorted(starts, place, side="right"))
            begin = place - (starts[which - 1] if which else 0)
            row[:] = arrays[which][begin : begin + self.context + 1]
        self.corpus.release()
        windows = torch.from_numpy(rows)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def _window_starts(arrays: tuple[Tokens, ...], context: int) -> npt.NDArray[np.int64]:
    """Cumulative count of places where a window of context + 1 tokens can start, int64 [arrays]."""
    return np.cumsum([max(0, len(tokens) - context) for tokens in arrays], dtype=np.int64)
