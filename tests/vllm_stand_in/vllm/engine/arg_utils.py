"""vLLM's arguments."""

from typing import Any


class AsyncEngineArgs:
    """What an engine is built with."""

    def __init__(self, **given: Any) -> None:
        self.given = given
