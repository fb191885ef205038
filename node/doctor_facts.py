"""What `doctor` looks at: the machine, the state directory, the running node if there is one. Judged in doctor.py.

Nothing here changes anything but for one small file that is written and removed again to see how fast the disk is.
"""

from __future__ import annotations

import dataclasses
import fcntl
import importlib.metadata
import importlib.util
import ipaddress
import os
import platform
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from braniac.model.errors import ModelError
from braniac.node import address_file, bridge, control_pb2, costs, identity_copy, identity_file, run_file
from braniac.node.checkpoint import from_generation
from braniac.node.config import NodeConfig
from braniac.node.control_client import ControlClient
from braniac.node.control_socket import PATH_BYTES_MAX
from braniac.node.errors import ConfigError, NodeError, ResourceError
from braniac.node.facts import DaemonFact, Facts, ListenFact
from braniac.node.founding import found_run, train_settings
from braniac.node.memory import Fit, choose_tier, fits, free_memory_bytes, usable_bytes
from braniac.node.sensors import Sample, Sensors
from braniac.node.store import Store
from braniac.node.text import given_tokenizer
from braniac.node.transport import parse_address
from braniac.protocol import limits
from braniac.protocol.errors import ProtocolError
from braniac.protocol.identity import Identity, peer_id_text
from braniac.protocol.manifest import Manifest

_DISTRIBUTIONS = ("braniac-node", "torch", "hivemind")
_PROBE_BYTES = 4 << 20
_P2PD_S = 20.0
_SENSORS = tuple(
    field.name
    for field in dataclasses.fields(Sample)
    if field.name not in ("local_time", "daily_bytes", "memory_bytes")
)


def gather(config: NodeConfig) -> Facts:
    """Look at everything; what cannot be found out is None. Takes some seconds."""
    state_dir = config.state.dir
    look = Sensors(state_dir if state_dir.is_dir() else None)
    look.sample()  # how busy the processor is shows between two looks
    daemon, daemon_trouble = _daemon(config)
    manifest, of = _run(config)
    identity, identity_trouble = _identity(state_dir)
    present, missing = sensors(look.sample())
    free_bytes = free_memory_bytes()
    needed, other_sizes = _memory(config, manifest, free_bytes)
    return Facts(
        versions={
            **{name: importlib.metadata.version(name) for name in _DISTRIBUTIONS},
            "Python": platform.python_version(),
        },
        protocol=limits.PROTOCOL_VERSION,
        state_dir=str(state_dir),
        state_exists=state_dir.is_dir(),
        state_trouble=state_trouble(state_dir),
        state_mode=stat.S_IMODE(state_dir.stat().st_mode) if state_dir.is_dir() else None,
        disk_free_bytes=disk_free_bytes(state_dir),
        disk_needed_bytes=_disk_needed(config, manifest),
        disk_free_min_bytes=config.caps.disk_free_min_mib << 20,
        disk_bytes_per_s=disk_bytes_per_s(state_dir, time.perf_counter),
        lock_holder=lock_holder(state_dir),
        socket_path=str(config.control_socket),
        socket_path_trouble=_socket_path_trouble(config.control_socket),
        socket_there=config.control_socket.is_socket(),
        daemon=daemon,
        daemon_trouble=daemon_trouble,
        identity_trouble=identity_trouble,
        identity_peer=peer_id_text(identity.peer_id) if identity else None,
        memory_free_bytes=free_bytes,
        memory_cap_bytes=config.caps.memory_mib << 20 or None,
        memory_needed_bytes=needed,
        memory_tier=None if config.train.tier == "auto" else config.train.tier,
        memory_fits=other_sizes,
        memory_of=of,
        sensors_present=present,
        sensors_missing=missing,
        listen=() if daemon else [_listen(address) for address in config.network.listen],
        global_addresses=global_addresses(),
        p2pd_trouble=p2pd_trouble(),
        data_missing=[str(path) for path in config.data.files if not path.exists()],
        bad_addresses=_bad_addresses(config.network.peers),
    )


def sensors(sample: Sample) -> tuple[list[str], list[str]]:
    """Names of the sensors that work, and of those that are missing."""
    present = [name for name in _SENSORS if getattr(sample, name) is not None]
    return present, [name for name in _SENSORS if name not in present]


def state_trouble(state_dir: Path) -> str | None:
    """Why a node could not keep its state there."""
    place = state_dir
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is not a folder"
    if not os.access(place, os.W_OK | os.X_OK):
        return f"{place} cannot be written by this user"
    return None


def disk_free_bytes(state_dir: Path) -> int | None:
    """On the file system that holds the directory, or would hold it."""
    for place in (state_dir, *state_dir.parents):
        if place.is_dir():
            try:
                return psutil.disk_usage(str(place)).free
            except OSError:
                return None
    return None


def disk_bytes_per_s(state_dir: Path, clock: Callable[[], float]) -> float | None:
    """How fast a small file becomes durable there; None if nothing can be written."""
    if not state_dir.is_dir():
        return None
    data = os.urandom(_PROBE_BYTES)
    try:
        with tempfile.NamedTemporaryFile(dir=state_dir, prefix=".doctor-") as file:
            began_s = clock()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            return _PROBE_BYTES / max(1e-6, clock() - began_s)
    except OSError:
        return None


def lock_holder(state_dir: Path) -> int | None:
    """The process that holds the directory, 0 if it is not known which one, None if none does."""
    try:
        with open(state_dir / "lock", encoding="ascii", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = file.read(20)
                return int(pid) if pid.isdecimal() else 0
    except OSError:
        return None
    return None


def global_addresses() -> list[str] | None:
    """Addresses of this machine that are valid in the whole internet."""
    try:
        interfaces: Mapping[str, Sequence[object]] = psutil.net_if_addrs()
    except OSError:  # Android forbids it
        return None
    found = []
    for addresses in interfaces.values():
        for each in addresses:
            text = str(getattr(each, "address", "")).partition("%")[0]
            try:
                if ipaddress.ip_address(text).is_global:
                    found.append(text)
            except ValueError:  # a hardware address
                continue
    return found


def p2pd_trouble() -> str | None:
    """Why hivemind's libp2p daemon cannot be run. hivemind itself is not loaded: that takes seconds."""
    spec = importlib.util.find_spec("hivemind")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        return "hivemind is not installed"
    try:
        done = subprocess.run(
            [str(Path(places[0]) / "hivemind_cli" / "p2pd"), "-help"],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=_P2PD_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None if b"-hostAddrs" in done.stdout + done.stderr else f"it ended with {done.returncode}"


def _daemon(config: NodeConfig) -> tuple[DaemonFact | None, str | None]:
    client = ControlClient(config.control_socket)
    try:
        status = client.status(since_slot=1 << 62)
    except NodeError as error:
        return None, str(error)
    try:
        reach = client.reachability()
    except NodeError as error:  # an older daemon, or one that is leaving
        reach = control_pb2.ReachabilityReply(reachability="unknown", detail=str(error))
    return DaemonFact(
        state=status.state,
        state_reason=status.state_reason,
        clock_offset_s=status.clock_offset_s,
        protocol=status.protocol_version,
        newest_protocol=status.newest_protocol,
        peers_live=status.peers_live,
        reachability=reach.reachability or "unknown",
        reachability_detail=reach.detail,
        dialed=tuple(reach.dialed),
    ), None


def _run(config: NodeConfig) -> tuple[Manifest | None, str]:
    """The run on disk, in the run file, or that would be founded; and what to call it."""
    try:
        generation = Store.look(config.state.dir).recover()
        if generation is not None:
            return from_generation(generation).manifest, "the run in the state directory"
    except (NodeError, ProtocolError, OSError):
        pass  # what is there is told elsewhere; memory can be judged without it
    try:
        if config.run.file is not None:
            return run_file.read(config.run.file)[0], f"the run in {config.run.file}"
        nobody = Identity.from_seed(bytes(32))
        return found_run(config.run, nobody, 0.0, given_tokenizer(config.data))[0], f"preset {config.run.preset}"
    except (NodeError, ModelError, ProtocolError):
        return None, f"preset {config.run.preset}"


def _memory(config: NodeConfig, manifest: Manifest | None, free_bytes: int) -> tuple[list[int], list[Fit]]:
    """What each tier needs, and which sizes of a training fit."""
    try:
        if manifest is None:
            return [], []
        model, settings = bridge.model_of(manifest)[0], train_settings(config.train, manifest)
    except (NodeError, ModelError):
        return [], []
    wanted = None if config.train.tier == "auto" else config.train.tier
    usable = usable_bytes(free_bytes, config.caps.memory_mib << 20 or None, wanted)
    tiers = range(wanted or 0, model.tiers)
    found = fits(model, settings, tiers, usable - costs.PROGRAM_BYTES - costs.P2PD_BYTES)
    return [each.memory_bytes for each in costs.costs_of(manifest, model, settings)], found


def _disk_needed(config: NodeConfig, manifest: Manifest | None) -> int | None:
    try:
        if manifest is None:
            return None
        model, settings = bridge.model_of(manifest)[0], train_settings(config.train, manifest)
        tier = choose_tier(config.train.tier, model, settings, free_memory_bytes())
    except (NodeError, ModelError):
        return None
    every = costs.costs_of(manifest, model, settings, generations=config.state.keep_generations)
    return every[tier].disk_bytes


def _identity(state_dir: Path) -> tuple[Identity | None, str | None]:
    try:
        return identity_file.load(identity_copy.path_in(state_dir)), None
    except FileNotFoundError:
        return None, None
    except NodeError as error:
        return None, str(error)


def _socket_path_trouble(path: Path) -> str | None:
    length = len(os.fsencode(path))
    if length <= PATH_BYTES_MAX:
        return None
    return f"the control socket's path {path} has {length} bytes and the system allows {PATH_BYTES_MAX}"


def _listen(address: str) -> ListenFact:
    from braniac.node.p2pd import check_listen  # loads hivemind

    try:
        check_listen(address)
    except (ConfigError, ResourceError) as error:
        return ListenFact(address=address, trouble=str(error))
    return ListenFact(address=address, trouble=None)


def _bad_addresses(peers: Sequence[str]) -> list[str]:
    found = []
    for peer in peers:
        try:
            if not address_file.is_reference(peer):
                parse_address(peer)
        except ConfigError as error:
            found.append(str(error))
    return found
