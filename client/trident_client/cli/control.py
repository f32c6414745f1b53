"""Commands about the server itself: its health and its models."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from trident_client import Client
from trident_client.cli import output
from trident_client.cli.exits import Exit


def models(client: Client, options: argparse.Namespace) -> int:
    """The server's models, those that could not be loaded included."""
    statuses = client.models()
    refused = {status.name: client.unverified(status.name) if status.state == "READY" else "" for status in statuses}
    found = [dataclasses.asdict(status) | {"unverified": refused[status.name]} for status in statuses]

    def line(row: dict[str, Any]) -> str:
        remark = f"unverified: {row['unverified']}" if row["unverified"] else row["reason"]
        return f"{row['name']:<28} {row['version']:>3}  {row['state']} {remark}".rstrip()

    output.results(options, found, map(line, found))
    return Exit.DONE


def served(client: Client, options: argparse.Namespace) -> int:
    """The models that are loaded, each with its task."""
    names = client.served()
    public = [name for name in names if options.all or "_" not in name]  # names with "_" are stages and variants
    found = [{"name": name, "task": client.parameters(name).get("task", "")} for name in public]
    output.results(options, found, (f"{row['name']:<28} {row['task']}".rstrip() for row in found))
    return Exit.DONE


def info(client: Client, options: argparse.Namespace) -> int:
    """A model's task, limits and adapters."""
    parameters = client.parameters(options.model)
    found = {
        "name": options.model,
        "task": parameters.get("task", ""),
        "unverified": parameters.pop("unverified", ""),
        "adapters": client.adapters(options.model),
        "parameters": dict(sorted(parameters.items())),
    }
    if options.json:
        output.document(found)
        return Exit.DONE
    shown = {"adapters": ", ".join(found["adapters"]), "unverified": found["unverified"]}
    for name, value in {**found["parameters"], **{name: value for name, value in shown.items() if value}}.items():
        output.show(f"{name:<28} {value}")
    return Exit.DONE


def adapters(client: Client, options: argparse.Namespace) -> int:
    """The adapters that a model has."""
    names = client.adapters(options.model)
    if options.json:
        output.document(names)
    else:
        for name in names:
            output.show(name)
    return Exit.DONE


def load(client: Client, options: argparse.Namespace) -> int:
    """Load a model."""
    return _print_names(options, "loaded", client.load(options.model))


def unload(client: Client, options: argparse.Namespace) -> int:
    """Unload a model."""
    return _print_names(options, "unloaded", client.unload(options.model))


def _print_names(options: argparse.Namespace, what: str, names: list[str]) -> int:
    if options.json:
        output.document(names)
    else:
        output.show(f"{what} {', '.join(names)}")
    return Exit.DONE


def health(client: Client, options: argparse.Namespace) -> int:
    """Whether the server answers."""
    found = client.health()
    if options.json:
        output.document(found)
    else:
        print("ready" if found.ready else "live, not ready" if found.live else "not reachable")
    return Exit.DONE if found.ready else Exit.FAILED if found.live else Exit.UNAVAILABLE
