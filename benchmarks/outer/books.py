"""Who sent how many bytes after which step: the same books for every method.

Counted is what a method's own payloads take on a wire; framing, signatures and retransmissions are left out for all.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FLOAT32_BYTES = 4


class Books:
    """Bytes by step and peer. What is still sent after the last step has rows behind it."""

    def __init__(self, steps: int, peers: int) -> None:
        self.uplink: npt.NDArray[np.int64] = np.zeros((steps, peers), np.int64)
        """[steps, peers], by the number of inner steps that were complete before, less one."""
        self.downlink: npt.NDArray[np.int64] = np.zeros((steps, peers), np.int64)
        self.largest_message = 0
        """To one receiver, in bytes."""

    def send(self, step: int, sender: int, receiver: int, size: int) -> None:
        """One message from peer to peer."""
        self.carry(step, sender, receiver, size)
        self.note_message(size)

    def carry(self, step: int, sender: int, receiver: int, size: int) -> None:
        """A part of a message, or all of it."""
        if (more := step + 1 - len(self.uplink)) > 0:
            self.uplink = np.pad(self.uplink, ((0, more), (0, 0)))
            self.downlink = np.pad(self.downlink, ((0, more), (0, 0)))
        self.uplink[step, sender] += size
        self.downlink[step, receiver] += size

    def note_message(self, size: int) -> None:
        """A message of so many bytes to one receiver."""
        self.largest_message = max(self.largest_message, size)

    def all_reduce(self, step: int, present: list[int], size: int) -> None:
        """A ring all-reduce of `size` bytes: each peer passes on 2 (R - 1) parts of an R-th, in whole bytes."""
        count = len(present)
        part = -(-size // count)
        for at, sender in enumerate(present):
            for _ in range(2 * (count - 1)):
                self.send(step, sender, present[(at + 1) % count], part)

    def publish(self, step: int, sender: int, readers: list[int], size: int) -> None:
        """A message that is uploaded once, to a store, and downloaded by each of `readers` but the sender."""
        self.uplink[step, sender] += size
        for reader in readers:
            if reader != sender:
                self.downlink[step, reader] += size
        self.largest_message = max(self.largest_message, size)

    @property
    def bytes_per_peer(self) -> float:
        """Uplink of the whole run, the mean over peers."""
        return float(self.uplink.sum(0).mean())

    @property
    def downlink_bytes_per_peer(self) -> float:
        return float(self.downlink.sum(0).mean())

    def link_s(self, steps: int, up_bytes_per_s: float, down_bytes_per_s: float) -> float:
        """How long the busiest peer's link is occupied by what falls into the first steps, one after another."""
        busy = np.maximum(self.uplink[:steps] / up_bytes_per_s, self.downlink[:steps] / down_bytes_per_s)
        return float(busy.max(1).sum())

    def peak_to_mean(self, window: int = 1) -> float:
        """Of the uplink of the busiest peer in any `window` steps, over its own mean; 0 if nothing was sent.

        A last bucket of fewer steps is left out.
        """
        whole = len(self.uplink) // window * window
        buckets = self.uplink[:whole].reshape(-1, window, self.uplink.shape[1]).sum(1)
        mean = buckets.mean(0)
        return float((buckets.max(0)[mean > 0] / mean[mean > 0]).max(initial=0.0))
