"""Calls the launcher's own tritonserver, over HTTP and with the admin key."""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trident_serving import artefacts
from trident_serving.errors import ControlError, Refused
from trident_serving.launcher import failures, http, temporary_folder
from trident_serving.launcher.admin_key import HEADER
from trident_serving.launcher.failures import IndexEntry

# What the answer of a placeholder says.
PLACEHOLDER = "the model is not loaded: try again later"
_TENSOR = {"data_type": "TYPE_INT32", "dims": [1]}
_CONFIG = {"input": [{"name": "A", **_TENSOR}], "output": [{"name": "B", **_TENSOR}]}
# Under strict readiness a server is not ready while it knows a model that could not be loaded. A load with the first
# config fails at once. A load with the second succeeds, and the unload of a loaded model clears its failure.
_FAILS = {"backend": "none", **_CONFIG}
_LOADS = {"backend": "python", "instance_group": [{"kind": "KIND_CPU"}]}
# A request may meet the second one in the milliseconds before its unload. It has the tensors of the model whose place
# it takes, since Triton would else tell the caller that those of the request are wrong.
_CODE = """\
%s
import json
import triton_python_backend_utils as utils

class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        # A gRPC stream carries only the message.
        streams = config.get("model_transaction_policy", {}).get("decoupled")
        self.code = "UNAVAILABLE: " if streams else ""

    def execute(self, requests):
        for request in requests:
            error = utils.TritonError(self.code + %r, utils.TritonError.UNAVAILABLE)
            request.get_response_sender().send(
                utils.InferenceResponse(error=error), flags=utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
            )
"""


class Control:
    """Calls to one server.

    Args:
        url: of its HTTP port, without a path.
        key: the admin key.
        models: the folder from which it loads models, in the launcher's.
    """

    def __init__(self, url: str, key: str, models: Path) -> None:
        self._url = url
        self._models = models
        self._code = _CODE % (temporary_folder.mark(models.parent), PLACEHOLDER)
        self._headers = {HEADER: key, "Content-Type": "application/json"}

    def live(self, seconds: float = 2.0) -> bool:
        """Whether the server answers at all."""
        return self._healthy("live", seconds)

    def ready(self, seconds: float = 2.0) -> bool:
        """Whether the server says that it is ready."""
        return self._healthy("ready", seconds)

    def index(self) -> list[IndexEntry]:
        """Every model of the repository.

        Raises:
            ControlError: the server does not answer.
        """
        return failures.entries(json.loads(self._post("/v2/repository/index", {}, 10.0)))

    def load(self, model: str, seconds: float) -> None:
        """Load a model, or load it again.

        Raises:
            Refused: it can't be loaded.
            ControlError: the server does not answer in time.
        """
        self._post(f"/v2/repository/models/{model}/load", {}, seconds)

    def unload(self, model: str, seconds: float = 10.0) -> None:
        """Begin to unload a model.

        Raises:
            ControlError: the server does not answer.
        """
        self._post(f"/v2/repository/models/{model}/unload", {}, seconds)

    def be_unready(self, reason: str) -> None:
        """Make the server report from now on that it is not ready.

        Args:
            reason: a model name, which the server's index then shows.
        """
        try:
            self._override(reason, _FAILS)
        except ControlError:
            return  # the load fails, as it should

    def clear_failure(self, model: str, version: str = "1") -> None:
        """Clear the failed load of a model's version, so that it no longer makes the server unready.

        Raises:
            ControlError: the server refuses it, or does not answer.
        """
        self.load_placeholder(model, version)
        self.unload(model)

    def load_placeholder(self, model: str, version: str = "1") -> None:
        """Load a model that refuses every request with UNAVAILABLE in the place of another one.

        Raises:
            ControlError: the server refuses it, or does not answer.
        """
        signature = artefacts.signature(self._models, model)
        self._override(model, _LOADS | (signature if signature["input"] and signature["output"] else _CONFIG), version)

    def _override(self, model: str, config: Mapping[str, Any], version: str = "1") -> None:
        code = base64.b64encode(self._code.encode()).decode()
        self._post(
            f"/v2/repository/models/{model}/load",
            {"parameters": {"config": json.dumps(config), f"file:{version}/model.py": code}},
            30.0,
        )

    def _healthy(self, what: str, seconds: float) -> bool:
        try:
            with http.open(f"{self._url}/v2/health/{what}", seconds):
                return True
        except OSError:
            return False

    def _post(self, path: str, body: dict[str, Any], seconds: float) -> bytes:
        try:
            request = urllib.request.Request(self._url + path, json.dumps(body).encode(), self._headers)
            with http.open(request, seconds) as answer:
                found: bytes = answer.read()
                return found
        except urllib.error.HTTPError as error:
            raise Refused(_message(error)) from None
        except (OSError, ValueError) as error:
            raise ControlError(str(error)) from None


def _message(error: urllib.error.HTTPError) -> str:
    text = error.read().decode("utf-8", "replace")
    try:
        return str(json.loads(text)["error"]).strip()
    except (ValueError, KeyError, TypeError):
        return text or f"HTTP status {error.code}"
