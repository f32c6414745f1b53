"""vLLM's configuration."""

from dataclasses import dataclass


@dataclass
class StructuredOutputsConfig:
    """What follows grammars."""

    backend: str = "auto"
