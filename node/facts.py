"""What can be known of a node, its machine and its daemon: gathered in doctor_facts.py, judged in doctor.py.

A fact that could not be found out is None and is never a fault.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from braniac.node.memory import Fit


@dataclass(frozen=True, kw_only=True)
class ListenFact:
    """One address to listen on."""

    address: str
    trouble: str | None
    """Why nobody can listen there; None: one can."""


@dataclass(frozen=True, kw_only=True)
class DaemonFact:
    """What a running daemon says about itself."""

    state: str
    state_reason: str
    clock_offset_s: float
    protocol: int
    newest_protocol: int
    peers_live: int
    reachability: str = "unknown"
    reachability_detail: str = ""
    dialed: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All that was found out."""

    versions: dict[str, str]
    protocol: int
    state_dir: str
    state_exists: bool
    state_trouble: str | None = None
    """Why nothing can be written there; None: it can, or it is yet to be made."""
    state_mode: int | None = None
    disk_free_bytes: int | None = None
    disk_needed_bytes: int | None = None
    """By the tier that would be taken."""
    disk_free_min_bytes: int = 0
    disk_bytes_per_s: float | None = None
    lock_holder: int | None = None
    """Process that holds the state directory; 0: some process."""
    socket_path: str = ""
    socket_path_trouble: str | None = None
    socket_there: bool = False
    daemon: DaemonFact | None = None
    daemon_trouble: str | None = None
    """Why the daemon did not answer."""
    identity_trouble: str | None = None
    identity_peer: str | None = None
    memory_free_bytes: int | None = None
    memory_cap_bytes: int | None = None
    """The owner's."""
    memory_needed_bytes: Sequence[int] = ()
    """By tier, the program itself included."""
    memory_tier: int | None = None
    """The one that its owner asks for."""
    memory_fits: Sequence[Fit] = ()
    """Other sizes of a training, within what may be used."""
    memory_of: str = ""
    """What model that is."""
    sensors_present: Sequence[str] = ()
    sensors_missing: Sequence[str] = ()
    listen: Sequence[ListenFact] = ()
    global_addresses: Sequence[str] | None = None
    """Of this machine's interfaces."""
    p2pd_trouble: str | None = None
    data_missing: Sequence[str] = ()
    bad_addresses: Sequence[str] = ()
    """Peers in the settings that are no addresses."""
