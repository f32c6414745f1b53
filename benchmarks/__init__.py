"""Benchmarks; the documents may state only figures that these print."""

import os

# As `import trident_serving` does, which the environments of peers do not have.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
