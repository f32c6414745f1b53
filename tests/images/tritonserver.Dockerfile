# Stands in for nvcr.io/nvidia/tritonserver where that can't be had: what deploy/Dockerfile relies on and no more. The
# wheel's server under /opt/tritonserver, a python3 with pip but without what `venv` needs for a pip of its own, and our
# Python backend under the native backend's name. Its libraries lie where the programs look: three folders up.
FROM debian:bookworm-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends libpython3.11 python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /
RUN python3 -m pip install --no-cache-dir --no-deps --constraint /constraints.txt --target /wheel nvidia-pytriton \
    && mv /wheel/pytriton/tritonserver /opt/tritonserver \
    && mv /wheel/nvidia_pytriton.libs / \
    && mv /opt/tritonserver/python_backend_stubs/3.11/triton_python_backend_stub /opt/tritonserver/backends/python/ \
    && rm -rf /wheel
COPY serving/trident_serving/_backends/onnxruntime /opt/tritonserver/backends/onnxruntime
