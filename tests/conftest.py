"""Settings for all tests: no deadlines on shared machines, the same cases in every CI run, torch on one thread."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Before torch is imported: its threads would wait for one another on the few cores that test processes share.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "shared", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("shared")
