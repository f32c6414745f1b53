"""The commands about versions; see `trident_export.cli`, which lists them. None of them needs torch."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trident_client import Client, ForbiddenError, TridentError, UnavailableError
from trident_export.errors import ExportError, StoreError
from trident_export.store import rollout, sbom, signing, versions
from trident_serving import artefacts
from trident_serving.errors import ModelError

NAMES = ("versions", "promote", "rollback", "verify", "keygen", "sign", "sbom")
_Parsers = Any  # argparse's class has a private name


def add(commands: _Parsers) -> None:
    """Add the commands to those of a parser."""
    for name, what, run, model in (
        ("versions", "the versions of a model, and which one is served", _versions, None),
        ("promote", "serve another version, the latest if none is named", _promote, "VERSION"),
        ("rollback", "serve the version before", _rollback, None),
        ("verify", "compare the files of models with their manifests", _verify, None),
        ("sign", "sign the manifest of a model", _sign, None),
        ("sbom", "what a model, or this Python environment, is made of, as CycloneDX", _sbom, None),
    ):
        command = commands.add_parser(name, help=what)
        optional = name in ("versions", "verify", "sign", "sbom")
        every = "the environment" if name == "sbom" else "all models"
        command.add_argument("model", nargs="?" if optional else None, help=f"default: {every}" if optional else None)
        if model:
            command.add_argument("version", nargs="?", default="", help="its number, or the beginning of its digest")
        command.add_argument("--repository", type=Path, default=Path("model_repository"))
        command.set_defaults(run=run)
        if name in _OPTIONS:
            _OPTIONS[name](command)
    keygen = commands.add_parser("keygen", help="make a pair of keys for signatures")
    keygen.add_argument("key", type=Path, help="the file of the private key; the public one is FILE.pub")
    keygen.set_defaults(run=_keygen)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="trident-export", description=__doc__)
    add(parser.add_subparsers(dest="command", required=True))
    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (ExportError, ModelError) as error:
        _say(str(error))
        return 1
    except BrokenPipeError:  # the reader of the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except OSError as error:
        _say(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return 1


def _add_server(command: argparse.ArgumentParser) -> None:
    command.add_argument("--url", default="localhost:8001", help="the server's gRPC port (default %(default)s)")
    command.add_argument("--admin-key-file", type=Path, help="default: as the server's own user finds it")
    command.add_argument("--no-server", action="store_true", help="change the repository only")
    command.add_argument(
        "--interrupt", action="store_true", help="go on where callers are refused for a moment (it says when)"
    )
    command.add_argument(
        "--timeout", type=float, default=600.0, help="seconds for each model to load (default %(default)g)"
    )


def _add_key(command: argparse.ArgumentParser) -> None:
    command.add_argument("--key", type=Path, required=True, help="the private key, as keygen makes it")


def _add_trusted(command: argparse.ArgumentParser) -> None:
    command.add_argument("--trusted-keys", type=Path, metavar="FILE", help="public keys: check the signatures, too")


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument("--licences", action="store_true", help="a table of names, versions and licences instead")


_OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "promote": _add_server,
    "rollback": _add_server,
    "sign": _add_key,
    "verify": _add_trusted,
    "sbom": _add_output,
}


def _versions(options: argparse.Namespace) -> int:
    for name in _names(options):
        for version in versions.of(options.repository, name):
            path = artefacts.manifest_path(options.repository, name, version.number)
            exported = datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
            signed = "signed" if path.with_name(artefacts.SIGNATURE).exists() else ""
            words = [
                f"{name:<24} {version.number:>3}  {version.short_digest:<12}  {exported}",
                "served" if version.served else "",
                signed,
                f"UNVERIFIED: {', '.join(version.manifest.unverified)}" if version.manifest.unverified else "",
            ]
            print("  ".join(word for word in words if word))
    return 0


def _promote(options: argparse.Namespace) -> int:
    def choose(name: str, found: list[versions.Version]) -> versions.Version:
        if options.version:
            return versions.named(name, found, options.version)
        return versions.newer(name, found)

    return _change(options, choose)


def _rollback(options: argparse.Namespace) -> int:
    return _change(options, versions.older)


def _change(options: argparse.Namespace, choose: Callable[[str, list[versions.Version]], versions.Version]) -> int:
    before = versions.served(versions.of(options.repository, options.model)).number
    with _server(options) as server:
        now = rollout.change(options.repository, options.model, choose, server, _say, interrupt=options.interrupt)
    who = options.url if server is not None else "the next start of a server"
    if now.number == before:
        _say(f"version {now.number} of {options.model} is served already")
    else:
        _say(f"{who} serves version {now.number} of {options.model}, {now.short_digest}; before it was {before}")
    return 0


@contextlib.contextmanager
def _server(options: argparse.Namespace) -> Iterator[Client | None]:
    """The server that is told; None: there is none."""
    if options.no_server:
        yield None
        return
    key = options.admin_key_file.read_text(encoding="ascii").strip() if options.admin_key_file else None
    with Client(options.url, timeout=options.timeout, admin_key=key) as client:
        if not client.health(timeout=5.0).live:
            _say(f"no server answers at {options.url}: only the repository changes")
            yield None
            return
        try:
            client.models()
            yield client
        except (ForbiddenError, UnavailableError) as error:
            raise StoreError(
                f"the server at {options.url} does not do it ({error}); --no-server changes only the repository"
            ) from None
        except TridentError as error:
            raise StoreError(f"the server at {options.url}: {error}") from None


def _verify(options: argparse.Namespace) -> int:
    wrong = 0
    for name in _names(options):
        for version in versions.of(options.repository, name):
            found = signing.problem(options.repository, version, options.trusted_keys)
            wrong += bool(found)
            checked = f"{len(version.manifest.files)} files are as they were exported"
            print(f"{name} {version.number} {version.short_digest}: {found or checked}")
    return 1 if wrong else 0


def _keygen(options: argparse.Namespace) -> int:
    public = signing.make_keys(options.key)
    _say(f"{options.key} signs, keep it secret; {public} is for servers: trident-serve --trusted-keys {public}")
    return 0


def _sign(options: argparse.Namespace) -> int:
    for name in _names(options):
        for version in versions.of(options.repository, name):
            signing.sign(options.repository, version, options.key)
            _say(f"version {version.number} of {name}, {version.short_digest}, is signed")
    return 0


def _sbom(options: argparse.Namespace) -> int:
    if options.model is None:
        document = sbom.environment()
    else:
        document = sbom.model(versions.served(versions.of(options.repository, options.model)).manifest)
    print(sbom.licences(document) if options.licences else json.dumps(document, indent=2))
    return 0


def _names(options: argparse.Namespace) -> list[str]:
    """The models that a command is for."""
    if options.model is not None:
        return [options.model]
    return [manifest.name for manifest in artefacts.read_manifests(options.repository)]


def _say(text: str) -> None:
    print(f"trident-export: {text}", file=sys.stderr, flush=True)
