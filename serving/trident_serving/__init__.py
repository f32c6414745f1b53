"""The runtime that Trident's Triton backends call, and the launcher of `tritonserver`.

Imports numpy, onnxruntime, tokenizers and jinja2; never torch, transformers or Triton's `pb_utils`.
"""

import os

# ONNX Runtime reports its use to Microsoft, and writes a device id into the user's cache folder, unless this is set
# before it is imported. Modules that import it import this package first; child processes inherit the setting.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
