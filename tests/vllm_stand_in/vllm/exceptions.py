"""vLLM's errors."""


class VLLMClientError(Exception):
    """The request is to blame."""


class EngineDeadError(Exception):
    """The engine's process has ended."""
