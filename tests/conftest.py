"""For all tests: the same hypothesis examples on every machine and in every run, however slow the machine is."""

from hypothesis import settings

settings.register_profile("deterministic", derandomize=True, deadline=None, database=None)
settings.load_profile("deterministic")
