"""What a heartbeat lists of a peer's certificates and anchors: everything, or where that is much, a part by turns.

A heartbeat goes to many peers in every slot. Of a long list it carries what is fresh and the part whose turn it is, and
whoever hears it puts the parts together. Greetings list everything.
"""

from __future__ import annotations

from collections.abc import Iterable

from braniac.protocol import limits
from braniac.protocol.manifest import Manifest
from braniac.protocol.messages import CertificateName, FragmentState, Heartbeat


def parts_of(manifest: Manifest) -> int:
    """Into how many parts the lists of this run are cut: after so many slots everything was said."""
    entries = (limits.HISTORY_WINDOWS + 1) * manifest.window  # certificates, and an anchor of each fragment
    return -(-entries // limits.HEARTBEAT_ENTRIES)


def named(names: Iterable[CertificateName], slot: int, parts: int) -> tuple[CertificateName, ...]:
    """Those of `names` that the heartbeat of `slot` lists."""
    fresh, turn = slot - limits.HEARTBEAT_FRESH_SLOTS, slot % parts
    return tuple(name for name in names if name.slot > fresh or name.slot % parts == turn)


def stated(states: Iterable[FragmentState], slot: int, parts: int) -> tuple[FragmentState, ...]:
    """Those of `states` that the heartbeat of `slot` lists."""
    fresh, turn = slot - limits.HEARTBEAT_FRESH_SLOTS, slot % parts
    return tuple(state for state in states if state.slot > fresh or state.fragment % parts == turn)


def names_heard(known: frozenset[CertificateName], heartbeat: Heartbeat) -> frozenset[CertificateName]:
    """A peer's list after its next heartbeat: what had its turn is as it is said now, the rest as it was."""
    if heartbeat.parts == 1:
        return frozenset(heartbeat.recent)
    had_turn = named(known, heartbeat.slot, heartbeat.parts)
    heard = known.difference(had_turn).union(heartbeat.recent)
    if len(heard) > limits.RECENT_CERTIFICATES_MAX:
        return frozenset(sorted(heard, key=lambda name: -name.slot)[: limits.RECENT_CERTIFICATES_MAX])
    return heard


def states_heard(known: dict[int, FragmentState], heartbeat: Heartbeat) -> dict[int, FragmentState]:
    """The same for its anchors, by fragment."""
    heard = {state.fragment: state for state in heartbeat.anchors}
    if heartbeat.parts == 1:
        return heard
    had_turn = {state.fragment for state in stated(known.values(), heartbeat.slot, heartbeat.parts)}
    return {fragment: state for fragment, state in known.items() if fragment not in had_turn} | heard


def complete_from(known: int | None, heartbeat: Heartbeat, slot: int) -> int:
    """The slot from which a peer's lists are complete; `known`: as of its heartbeat before, None if there was none."""
    if heartbeat.parts == 1:
        return min(heartbeat.slot, slot)
    return slot + heartbeat.parts - 1 if known is None else known
