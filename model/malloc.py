"""What lean training asks of the C library, so that freed memory goes back to the system before the next peak.

Both calls are glibc's; with another C library they do nothing.
"""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h
_LARGE_BYTES = 3 << 19


def return_large_blocks_at_once() -> None:
    """For the whole process: blocks of 1.5 MiB and more get pages of their own, which are gone when they are freed.

    glibc would begin so too, but raises the bound to 32 MB as such blocks are freed, and then the holes that one phase
    of a step leaves do not fit the next one's blocks. Smaller ones come and go too often: clearing fresh pages for each
    took a fifth of the time (docs/LOG.md has figures).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def give_back_memory() -> None:
    """Return the holes that smaller blocks have left."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
