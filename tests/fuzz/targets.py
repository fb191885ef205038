"""Every decoder by name."""

from __future__ import annotations

from tests.fuzz import model_targets, node_targets, protocol_targets

TARGETS = {**protocol_targets.TARGETS, **node_targets.TARGETS, **model_targets.TARGETS}
