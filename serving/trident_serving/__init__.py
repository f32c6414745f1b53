"""The runtime that Trident's Triton backends call, and the launcher of `tritonserver`.

Imports numpy, onnxruntime, tokenizers and jinja2; never torch, transformers or Triton's `pb_utils`.
"""
