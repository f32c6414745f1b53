"""A generator's service behind the guard that its config names, whichever engine computes the answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trident_serving.schema.limits import CausalLimits
from trident_serving.triton import adapter


def guarded(
    service: Any,
    config: Mapping[str, Any],
    limits: CausalLimits,
    own_pass: str,
    unloading: Callable[[], bool] = lambda: False,
    repository: Path | None = None,
) -> Any:
    """The service, behind its guard where the config has one; without one, no line of a guard runs.

    Args:
        config: the model's, as Triton gives it.
        own_pass: what the guard's own requests to this server carry.
        unloading: whether the model is being unloaded.
        repository: that the server serves.
    """
    text = adapter.parameters(config).get("guard")
    if not text:
        return service
    from trident_serving.guard.asking import Models
    from trident_serving.guard.rules import Guard
    from trident_serving.guard.service import GuardedService

    rules = Guard.from_json(text)
    models = Models.of_server(rules, own_pass, repository=repository)
    return GuardedService(service, rules, models, limits.slots + limits.max_waiting, unloading)
