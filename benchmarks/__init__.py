"""Benchmarks; the documents may state only figures that these print."""

import trident_serving  # noqa: F401  (turns ONNX Runtime's telemetry off, before anything here imports it)
