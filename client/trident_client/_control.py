"""Calls about the server itself, as steps: its health, its models, and which of them is meant."""

from __future__ import annotations

import time
from collections.abc import Sequence

from trident_client._errors import DeadlineExceededError, NotFoundError, UnavailableError
from trident_client._steps import Ask, Pause, Steps
from trident_client._types import Health, ModelStatus

POLL_SECONDS = 0.05
# What follows the name of a model that a promotion tries out.
_TRIAL = "_trial"
# A server sees a new model within a second of its export.
_EXPORTED_SECONDS = 2.0


def health() -> Steps[Health]:
    """See `Client.health`."""
    try:
        live = yield Ask("live")
        ready = yield Ask("ready")
    except (UnavailableError, DeadlineExceededError):
        return Health(live=False, ready=False)
    return Health(live=live, ready=ready)


def best(found: Sequence[Health]) -> Health:
    """The health of several servers: what one of them can answer is answered."""
    return Health(any(health.live for health in found), any(health.ready for health in found))


def models() -> Steps[list[ModelStatus]]:
    """See `Client.models`."""
    statuses: list[ModelStatus] = yield Ask("index")
    return sorted((status for status in statuses if status.state), key=lambda status: status.name)


def served() -> Steps[list[str]]:
    """See `Client.served`."""
    names: list[str] = yield Ask("served")
    return sorted(set(names))


def parameters(model: str) -> Steps[dict[str, str]]:
    """See `Client.parameters`."""
    found: dict[str, str] = yield Ask("parameters", model)
    return dict(found)


def unverified(model: str) -> Steps[str]:
    """See `Client.unverified`."""
    parameters: dict[str, str] = yield Ask("parameters", model)
    return parameters.get("unverified", "")


def adapters(model: str) -> Steps[list[str]]:
    """See `Client.adapters`."""
    parameters: dict[str, str] = yield Ask("parameters", model)
    named = parameters.get("adapters", "")
    return named.split(",") if named else []


def only_model(task: str) -> Steps[str]:
    """The public name of the server's only model of a task.

    Raises:
        NotFoundError: there is none, or there are several; the message names them.
    """
    served: list[str] = yield Ask("served")
    tasks: dict[str, str] = {}
    for name in sorted({name for name in served if "_" not in name}):  # names with "_" are stages and variants
        parameters: dict[str, str] = yield Ask("parameters", name)
        tasks[name] = parameters.get("task", "")
    found = [name for name, its in tasks.items() if its == task]
    if len(found) != 1:
        known = ", ".join(f"{name} ({its})" for name, its in tasks.items() if its)
        several = f"serves {' and '.join(found)} for {task}" if found else f"serves no model for {task}"
        raise NotFoundError(f"the server {several}: name one with model=; it serves {known or 'none'}")
    return found[0]


def load(model: str, seconds: float | None, only: Sequence[str] | None = None) -> Steps[list[str]]:
    """See `Client.load`; `seconds` is how long running requests are waited for, None: without a limit."""
    if only is not None:
        for name in only:
            yield from _triton_models(model, name)
            yield Ask("load", name, alone=True)
        return list(only)
    names = [name for name in (yield from _triton_models(model)) if not name.endswith(_TRIAL)]
    public = [name for name in names if not name.startswith(_roles(model))]
    if len(public) < len(names):
        yield from _unload(public, seconds)
    for name in names:
        yield Ask("load", name, alone=True)
    return names


def unload(model: str, seconds: float | None, only: Sequence[str] | None = None) -> Steps[list[str]]:
    """See `Client.unload`; `seconds` as in `load`."""
    names = list(only) if only is not None else (yield from _triton_models(model))[::-1]
    yield from _unload(names, seconds)
    return names


def _unload(names: Sequence[str], seconds: float | None) -> Steps[None]:
    """Unload models and wait until their running requests are answered."""
    began = time.monotonic()
    for name in names:
        yield Ask("unload", name, alone=True)
    while True:
        statuses: list[ModelStatus] = yield Ask("index", alone=True)
        busy = sorted(
            status.name for status in statuses if status.name in names and status.state not in ("", "UNAVAILABLE")
        )
        if not busy:
            return
        if seconds is not None and time.monotonic() - began > seconds:
            raise DeadlineExceededError(f"{', '.join(busy)}: requests still run after {seconds:g} s")
        yield Pause(POLL_SECONDS)


def _triton_models(model: str, wanted: str | None = None) -> Steps[list[str]]:
    """The Triton models of a public one, stages first. In a name, "_" comes only before a stage or a variant.

    Args:
        wanted: the one that must be among them; None: the public one.
    """
    wanted = wanted or model
    deadline = time.monotonic() + _EXPORTED_SECONDS
    while True:
        statuses: list[ModelStatus] = yield Ask("index")
        names = {status.name for status in statuses if status.name.partition("_")[0] == model}
        if wanted in names:
            return sorted(names, key=lambda name: (not name.startswith(_roles(model)), name))
        if time.monotonic() > deadline:
            raise NotFoundError(f"the server's repository has no exported model {wanted!r}")
        yield Pause(POLL_SECONDS)


def _roles(model: str) -> tuple[str, ...]:
    """What the names of a model's stages begin with."""
    return tuple(f"{model}_{role}" for role in ("tokenizer", "preprocess", "model", "postprocess"))
