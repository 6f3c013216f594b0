"""Speed is measured by benchmarks: no test fails because a machine is busy."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("pasture", deadline=None)
settings.load_profile("pasture")
