"""The command `trident-gateway`: it serves, and keeps the file of API keys."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trident_gateway import keys
from trident_gateway.settings import Settings

_DEFAULTS = Settings()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit status is 0, or 1 with a sentence on standard error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["key"]:
            return _key(given[1:])
        return _serve(given)
    except (ValueError, OSError) as error:
        print(f"trident-gateway: {error}", file=sys.stderr)
        return 1


def _serve(given: Sequence[str]) -> int:
    settings = _settings(_parser().parse_args(given))
    try:
        from trident_gateway import process
    except ModuleNotFoundError as missing:
        raise ValueError(f"{missing.name} is not installed: pip install 'trident-serving[gateway]'") from None
    return process.serve(settings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trident-gateway",
        description="OpenAI's, Cohere's, Jina's, TEI's and Ollama's HTTP APIs in front of Trident servers. "
        "'trident-gateway key' makes API keys.",
    )
    add = parser.add_argument
    add(
        "--triton",
        action="append",
        metavar="HOST:PORT",
        help="gRPC endpoint of a server, or dns:NAME:PORT for all that a name has; may be given several times",
    )
    add("--host", default=_DEFAULTS.host, help="address to listen on (%(default)s)")
    add("--port", type=int, default=_DEFAULTS.port, help="port to listen on (%(default)s)")
    add("--workers", type=int, default=_DEFAULTS.workers, help="processes (%(default)s)")
    add(
        "--keys", type=Path, metavar="FILE", help="API keys, made by 'trident-gateway key add'; none: everybody may ask"
    )
    add("--public", action="store_true", help="let everybody in who can reach it, without keys")
    add("--alias", action="append", default=[], metavar="NAME=MODEL", help="another name of a model")
    add("--cors-origin", action="append", default=[], metavar="URL", help="a site whose pages may ask")
    for name, what in _NUMBERS.items():
        default = getattr(_DEFAULTS, name)
        add(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"{what} (%(default)s)")
    add("--no-access-log", action="store_true", help="do not log requests")
    return parser


_NUMBERS = {
    "max_body_bytes": "bytes of a request at most",
    "max_audio_bytes": "bytes of a request with a recording at most",
    "body_seconds": "seconds that a request may take to arrive",
    "write_seconds": "seconds that a client may take to read what was sent",
    "timeout": "seconds that an answer may take",
    "grace": "seconds for running answers at the end",
    "max_running": "requests of one model at once on one server; 0: as its slots allow",
    "max_waiting": "requests of one model that may wait",
    "queue_seconds": "seconds that one may wait",
    "max_per_key": "requests at once with one key; 0: no limit",
    "health_seconds": "seconds between two looks at a server",
}


def _settings(given: argparse.Namespace) -> Settings:
    aliases = dict(pair.partition("=")[::2] for pair in given.alias)
    if not all(aliases.values()):
        raise ValueError("an alias must be NAME=MODEL")
    return Settings(
        triton=tuple(given.triton or _DEFAULTS.triton),
        host=given.host,
        port=given.port,
        workers=given.workers,
        keys=given.keys,
        public=given.public,
        aliases=aliases,
        cors_origins=tuple(given.cors_origin),
        access_log=not given.no_access_log,
        **{name: getattr(given, name) for name in _NUMBERS},
    )


def _key(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="trident-gateway key", description="Keeps a file of API keys.")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="make a key, which is printed once")
    adding.add_argument("name", help="whose")
    adding.add_argument("--scope", action="append", choices=keys.SCOPES, help="what it may do (inference)")
    adding.add_argument("--max-concurrent", type=int, default=0, help="requests at once; 0: the gateway's limit")
    removing = commands.add_parser("remove", help="take a key away")
    removing.add_argument("name")
    for command in (adding, removing, commands.add_parser("list", help="the names of the keys")):
        command.add_argument("--keys", type=Path, required=True, metavar="FILE")
    said = parser.parse_args(given)
    if said.command == "add":
        print(keys.add(said.keys, said.name, said.scope or (keys.INFERENCE,), said.max_concurrent))
    elif said.command == "remove":
        keys.remove(said.keys, said.name)
    else:
        for key in keys.read(said.keys):
            print(f"{key.name}\t{','.join(key.scopes)}\t{key.created}")
    return 0
