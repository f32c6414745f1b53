"""How many examples: a few with each run of the tests, the same ones; `make fuzz` makes many new ones."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("few", max_examples=40, derandomize=True, deadline=None, suppress_health_check=CHECKS)
settings.register_profile(
    "many", max_examples=int(os.environ.get("FUZZ_EXAMPLES", "5000")), deadline=None, suppress_health_check=CHECKS
)
settings.load_profile("many" if "FUZZ_EXAMPLES" in os.environ else "few")
