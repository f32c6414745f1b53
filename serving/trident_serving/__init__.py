"""The runtime that Trident's Triton backends call, and the launcher of `tritonserver`.

Imports numpy, onnxruntime, tokenizers and jinja2; never torch, transformers or Triton's `pb_utils`.
"""

import os

# ONNX Runtime reports its use to its makers, unless this is set when it is imported. Server and backends inherit it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
