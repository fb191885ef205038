"""What may be wrong with a node, judged from facts that doctor_facts.py has gathered: findings with a remedy each.

Nothing here looks at the machine, so every judgement can be tested.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from braniac.node import memory
from braniac.node.commands import bytes_text
from braniac.node.facts import Facts

WARNING_EXIT_CODE = 10
ERROR_EXIT_CODE = 11

_CLOCK_OFF_S = 2.0
_DISK_SLOW_BYTES_PER_S = 2_000_000


class Severity(enum.IntEnum):
    """How bad a finding is."""

    OK = 0
    NOTE = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    code: str
    """Stable, for scripts."""
    severity: Severity
    sentence: str
    remedy: str = ""
    """What to do; empty where there is nothing to do."""


def findings(facts: Facts) -> list[Finding]:
    """Every judgement, in the order in which a person would check."""
    return [
        *_versions(facts),
        *_state(facts),
        *_disk(facts),
        *_identity(facts),
        *_daemon(facts),
        *_memory(facts),
        *_sensors(facts),
        *_clock(facts),
        *_network(facts),
        *_reachability(facts),
        *_settings(facts),
    ]


def exit_code(found: Sequence[Finding]) -> int:
    """0 if there is nothing worse than a note, 10 for warnings, 11 for errors."""
    worst = max((finding.severity for finding in found), default=Severity.OK)
    return {Severity.WARNING: WARNING_EXIT_CODE, Severity.ERROR: ERROR_EXIT_CODE}.get(worst, 0)


def _versions(facts: Facts) -> Iterator[Finding]:
    told = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    yield Finding("versions", Severity.OK, f"{told}, protocol {facts.protocol}")
    daemon = facts.daemon
    if daemon is not None and daemon.newest_protocol > facts.protocol:
        yield Finding(
            "protocol_old",
            Severity.WARNING,
            f"peers speak protocol {daemon.newest_protocol}, this program {facts.protocol}",
            "install a newer braniac-node and restart it",
        )
    if daemon is not None and daemon.protocol != facts.protocol:
        yield Finding(
            "daemon_version",
            Severity.WARNING,
            f"the running daemon speaks protocol {daemon.protocol}, this program {facts.protocol}",
            "restart the daemon",
        )


def _state(facts: Facts) -> Iterator[Finding]:
    if facts.state_trouble is not None:
        sentence = f"the state directory {facts.state_dir} cannot be used ({facts.state_trouble})"
        yield Finding(
            "state_dir", Severity.ERROR, sentence, "choose another --state-dir, or correct its owner and rights"
        )
    elif not facts.state_exists:
        sentence = f"the state directory {facts.state_dir} is not there yet"
        yield Finding("state_dir", Severity.NOTE, sentence, "`braniac-node join` makes it")
    else:
        yield Finding("state_dir", Severity.OK, f"the state directory {facts.state_dir} can be written")
    if facts.state_mode is not None and facts.state_mode & 0o022:
        yield Finding(
            "state_dir_open",
            Severity.WARNING,
            f"others may change the state directory {facts.state_dir}",
            f"run `chmod go-w {facts.state_dir}`",
        )


def _disk(facts: Facts) -> Iterator[Finding]:
    free, needed = facts.disk_free_bytes, facts.disk_needed_bytes
    if free is not None:
        told = f"{bytes_text(free)} of disk are free"
        remedy = "free some space, or choose another --state-dir"
        if free < facts.disk_free_min_bytes:
            sentence = f"{told}, less than caps.disk_free_min_mib asks for, so the node rests"
            yield Finding("disk_space", Severity.ERROR, sentence, remedy)
        elif needed is not None and free - facts.disk_free_min_bytes < needed:
            yield Finding("disk_space", Severity.WARNING, f"{told}, and up to {bytes_text(needed)} may be used", remedy)
        else:
            yield Finding("disk_space", Severity.OK, told)
    if facts.disk_bytes_per_s is not None:
        slow = facts.disk_bytes_per_s < _DISK_SLOW_BYTES_PER_S
        sentence = f"the disk writes about {bytes_text(facts.disk_bytes_per_s)} per second"
        remedy = "choose a faster disk for --state-dir: a checkpoint is written with every contribution"
        yield Finding("disk_speed", Severity.WARNING if slow else Severity.OK, sentence, remedy if slow else "")


def _identity(facts: Facts) -> Iterator[Finding]:
    if facts.identity_trouble is not None:
        what, _, remedy = facts.identity_trouble.partition(": ")
        yield Finding("identity", Severity.ERROR, what, remedy)
    elif facts.identity_peer is None:
        yield Finding("identity", Severity.NOTE, "there is no key yet", "`braniac-node join` makes one")
    else:
        yield Finding("identity", Severity.OK, f"this node is {facts.identity_peer}, and its key is private")


def _daemon(facts: Facts) -> Iterator[Finding]:
    if facts.socket_path_trouble is not None:
        yield Finding("socket_path", Severity.ERROR, facts.socket_path_trouble, "choose a shorter --state-dir")
    holder = f"process {facts.lock_holder}" if facts.lock_holder else "some process"
    if facts.daemon is not None:
        why = f" ({facts.daemon.state_reason})" if facts.daemon.state_reason else ""
        severity = Severity.WARNING if facts.daemon.state == "degraded" else Severity.OK
        remedy = "see `braniac-node status`" if severity else ""
        yield Finding("daemon", severity, f"a node runs here and is {facts.daemon.state}{why}", remedy)
    elif facts.lock_holder is not None:
        why = f" ({facts.daemon_trouble})" if facts.daemon_trouble else ""
        sentence = f"{holder} holds the state directory and does not answer{why}"
        yield Finding("daemon_silent", Severity.ERROR, sentence, "wait if it is starting, else stop it")
    elif facts.socket_there:
        sentence = f"{facts.socket_path} was left by a node that was killed"
        yield Finding("stale_socket", Severity.NOTE, sentence, "nothing: the next start removes it")
    else:
        yield Finding("daemon", Severity.NOTE, "no node runs on this state directory", "start one: `braniac-node join`")


def _memory(facts: Facts) -> Iterator[Finding]:
    free, needs = facts.memory_free_bytes, facts.memory_needed_bytes
    if free is None or not needs:
        return
    if facts.daemon is not None:
        yield Finding("memory", Severity.OK, f"{bytes_text(free)} of memory are free beside the running node")
        return
    limit = memory.usable_bytes(free, facts.memory_cap_bytes, facts.memory_tier)
    fitting = [tier for tier, need in enumerate(needs) if need <= limit]
    told = ", ".join(f"tier {tier} {bytes_text(need)}" for tier, need in enumerate(needs))
    capped = "" if facts.memory_cap_bytes is None else f", caps.memory_mib allows {bytes_text(facts.memory_cap_bytes)}"
    sentence = f"{bytes_text(free)} of memory are free{capped}; {facts.memory_of} needs: {told}"
    if not fitting or (facts.memory_tier is not None and facts.memory_tier not in fitting):
        yield Finding("memory", Severity.ERROR, sentence, memory.remedy(facts.memory_fits))
    elif fitting[0] > 0:
        yield Finding("memory", Severity.NOTE, f"{sentence}; the largest that fits is tier {fitting[0]}")
    else:
        yield Finding("memory", Severity.OK, sentence)


def _sensors(facts: Facts) -> Iterator[Finding]:
    if facts.sensors_present:
        yield Finding("sensors", Severity.OK, f"sensors that work: {', '.join(facts.sensors_present)}")
    if facts.sensors_missing:
        sentence = f"sensors that are missing: {', '.join(facts.sensors_missing)}"
        yield Finding(
            "sensors_missing", Severity.NOTE, sentence, "nothing: a gate without its sensor never rests the node"
        )


def _clock(facts: Facts) -> Iterator[Finding]:
    if facts.daemon is None:
        return
    offset_s = facts.daemon.clock_offset_s
    sentence = f"this machine's clock is {abs(offset_s):.1f} s {'behind' if offset_s > 0 else 'ahead of'} the swarm's"
    if abs(offset_s) > _CLOCK_OFF_S:
        yield Finding(
            "clock", Severity.WARNING, sentence, "set the clock, best by NTP; the node itself follows the swarm"
        )
    else:
        yield Finding("clock", Severity.OK, sentence)


def _network(facts: Facts) -> Iterator[Finding]:
    if facts.p2pd_trouble is not None:
        sentence = f"the libp2p daemon does not run ({facts.p2pd_trouble})"
        yield Finding("p2pd", Severity.ERROR, sentence, "install hivemind anew: pip install --force-reinstall hivemind")
    else:
        yield Finding("p2pd", Severity.OK, "the libp2p daemon runs")
    for each in facts.listen:
        if each.trouble is None:
            yield Finding("listen", Severity.OK, f"the node can listen on {each.address}")
        else:
            what, _, remedy = each.trouble.rpartition(": ")
            yield Finding("listen", Severity.ERROR, f"the node cannot listen on {each.address} ({what})", remedy)


def _reachability(facts: Facts) -> Iterator[Finding]:
    remedy = "forward a port and set network.listen and network.announce, or try --set network.nat=true"
    daemon = facts.daemon
    if daemon is not None and daemon.reachability in ("public", "relayed", "private"):
        detail = f" ({daemon.reachability_detail})" if daemon.reachability_detail else ""
        match daemon.reachability:
            case "public":
                sentence = f"peers can dial this node{detail}"
                yield Finding("reachability", Severity.OK, sentence)
            case "relayed":
                yield Finding("reachability", Severity.NOTE, f"peers reach this node through a relay{detail}", remedy)
            case _:
                sentence = f"peers cannot dial this node{detail}; it contributes and owns nothing"
                yield Finding("reachability", Severity.WARNING, sentence, remedy)
        return
    if daemon is not None:
        detail = daemon.reachability_detail or "nobody could be asked"
        yield Finding("reachability", Severity.NOTE, f"whether peers can dial this node is not known: {detail}")
    if facts.global_addresses is None:
        return
    if facts.global_addresses:
        told = ", ".join(facts.global_addresses[:3])
        yield Finding(
            "nat", Severity.OK, f"this machine has public addresses ({told}); a firewall may still be in the way"
        )
    else:
        sentence = "this machine has private addresses only, so it is probably behind a router"
        yield Finding("nat", Severity.NOTE, sentence, remedy)


def _settings(facts: Facts) -> Iterator[Finding]:
    for path in facts.data_missing:
        yield Finding("data", Severity.ERROR, f"data.paths names {path}, which does not exist", "correct the path")
    for trouble in facts.bad_addresses:
        what, _, remedy = trouble.partition("; ")
        yield Finding("peers", Severity.ERROR, what, remedy)
