"""Unloads and loads a model during the traffic, with the admin key and plain HTTP."""

from __future__ import annotations

import http.client
import json
import time
from typing import Any

from benchmarks.soak.calls import SECONDS, Address, CallError
from trident_serving.launcher.admin_key import HEADER

# The Triton models of a public name. Only the first is loaded by name: Triton loads the others with it.
TRITON_MODELS = {
    "minilm_int8_static": ("minilm_int8_static", "minilm_model_int8_static"),
    "smollm2_int4": ("smollm2_int4",),
}


def reload(address: Address, key: str, model: str) -> None:
    """Unload a model, wait until it has gone, and load it again.

    Raises:
        CallError: the server refuses, or does not finish in time.
    """
    for name in TRITON_MODELS[model]:
        _post(address, key, f"/v2/repository/models/{name}/unload")
    deadline = time.monotonic() + SECONDS
    while any(_states(address, key).get(name) not in (None, "UNAVAILABLE") for name in TRITON_MODELS[model]):
        if time.monotonic() > deadline:
            raise CallError("timeout", f"{model} was not unloaded within {SECONDS:.0f} s")
        time.sleep(0.1)
    _post(address, key, f"/v2/repository/models/{TRITON_MODELS[model][0]}/load")


def _states(address: Address, key: str) -> dict[str, str]:
    return {model["name"]: model.get("state", "") for model in _post(address, key, "/v2/repository/index")}


def _post(address: Address, key: str, path: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", address.http_port, timeout=SECONDS)
    try:
        connection.request("POST", path, b"{}", {HEADER: key})
        response = connection.getresponse()
        body = response.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise CallError("closed", f"{path}: {error!r}") from None
    finally:
        connection.close()
    if response.status != 200:
        raise CallError(f"HTTP {response.status}", f"{path}: {body}")
    return json.loads(body) if body else None
