"""Measurements; what they print is what the documents may state."""

import trident_serving  # noqa: F401  (turns ONNX Runtime's telemetry off, before anything here imports it)
