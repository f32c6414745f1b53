"""Triton's side of a backend.

adapter       between Triton's Python API and the services
metrics       an engine's counts on Triton's metrics port
onnx_backend  stand-in for Triton's C++ ONNX Runtime backend
onnx_session  an ONNX Runtime session as a Triton config asks for it
"""
