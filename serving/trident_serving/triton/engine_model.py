"""The part of a Triton model that every engine's adapter has: start, requests, end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trident_serving.schema.reading import read_parameters
from trident_serving.triton import adapter
from trident_serving.triton.metrics import Publisher


class EngineModel:
    """A model whose engine answers through response senders; the adapters derive `TritonPythonModel` from it.

    Attributes:
        api: Triton's `pb_utils`.
        limits: the class of the model's limits.
        channel: the class of a request's `adapter.Responder`.
    """

    api: Any
    limits: type[Any]
    channel: type[adapter.Responder]

    def initialize(self, args: Mapping[str, str]) -> None:
        """See Triton's Python backend; so are the methods below."""
        self._process = adapter.setup(self.api, args)
        self._config = adapter.model_config(args)
        limits = read_parameters(self.limits, adapter.parameters(self._config))
        name, version = args["model_name"], args["model_version"]
        unloading = adapter.unloading(self.api, name, version)
        self._service = self.make_service(args, limits, unloading)
        self._publisher = Publisher(self.api, self._service.recorder, {"model": name, "version": version})
        # Not through Triton's logger, whose level would hide the line. It shows the memory that the limits take.
        print(f"trident: {name}: {self.room(limits)}; {self._service.memory}", file=sys.stderr, flush=True)
        self._process.start(self._service.steps, self._service.busy)

    def make_service(self, args: Mapping[str, str], limits: Any, unloading: Callable[[], bool]) -> Any:
        """The service with the engine.

        Args:
            unloading: whether the model is being unloaded.
        """
        raise NotImplementedError

    def room(self, limits: Any) -> str:
        """What the limits give room for, in words."""
        return f"{limits.slots} slots"

    def execute(self, requests: Sequence[Any]) -> None:
        """Submit requests, which are answered later."""
        adapter.submit_each(self.api, requests, self._process, self._submit, self.channel)

    def _submit(self, request: Any, channel: Any) -> None:
        timeout = adapter.timeout(request, self._config)
        self._service.submit(self._service.parse(adapter.inputs(request), timeout), channel)

    def finalize(self) -> None:
        """End the engine, and what watches it."""
        self._process.ends()
        self._service.stop()
        self._publisher.stop(shared=self._process.replaced)
        self._process.stop()
