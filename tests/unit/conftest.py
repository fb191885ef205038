"""Fixtures that several files of unit tests ask for by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import structlog


@pytest.fixture
def own_logging(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test does to the process's logging ends with it."""
    monkeypatch.setenv("HIVEMIND_LOGLEVEL", "WARNING")
    root, ours = logging.getLogger(), logging.getLogger("braniac")
    before = (root.handlers, root.level, ours.level)
    yield
    root.handlers, root.level, ours.level = before
    logging.captureWarnings(False)
    structlog.reset_defaults()
