"""For all tests: the same hypothesis examples on every machine and in every run, however slow; a cache of their own."""

import os
import tempfile

import pytest
from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")


def pytest_configure(config: pytest.Config) -> None:
    """No test, and no daemon that a test starts, sees what the person who runs it has in the usual cache."""
    folder = tempfile.TemporaryDirectory(prefix="braniac-cache-")
    config.add_cleanup(folder.cleanup)
    os.environ["XDG_CACHE_HOME"] = folder.name
