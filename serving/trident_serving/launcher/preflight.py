"""Checks before a server starts; each failure is one sentence that says what to do."""

from __future__ import annotations

import ctypes.util
import errno
import json
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from trident_serving.errors import StartError

SUPPORTED_PYTHON = ((3, 11), (3, 12))
BACKEND_PACKAGES = ("trident_serving", "numpy", "onnxruntime", "tokenizers", "jinja2")

# Run by the interpreter in question; it may be older than this one.
_LOOK = """
import importlib.util, json, sys
sys.path[:] = [folder for folder in sys.path if folder]  # the working directory is not on the backends' path
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
numpy = None
if "numpy" not in missing:
    from importlib.metadata import version
    numpy = version("numpy")
print(json.dumps([list(sys.version_info[:2]), missing, numpy]))
"""


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> None:
    """Check that the pinned packages and the server's stub support this interpreter."""
    if version not in SUPPORTED_PYTHON:
        supported = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED_PYTHON)
        raise StartError(
            f"Python {version[0]}.{version[1]} is not supported: use {supported} (make PYTHON=python3.11 ...)"
        )


def check_packages(environment: Mapping[str, str]) -> None:
    """Check that the interpreter of the backends, the first python3 on the PATH, has the packages that they import."""
    python = shutil.which("python3", path=environment.get("PATH", ""))
    if python is None:
        raise StartError(
            f"there is no python3 in {Path(sys.executable).parent} nor elsewhere on the PATH for the backends to run "
            "in: start from a virtual environment, which has one"
        )
    run = subprocess.run(
        [python, "-c", _LOOK, *BACKEND_PACKAGES], env=dict(environment), capture_output=True, text=True, check=False
    )
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
        raise StartError(f"{python}, in which the backends run, does not work ({reason}): install it again")
    version, missing, numpy = json.loads(run.stdout)
    if tuple(version) != sys.version_info[:2]:
        raise StartError(
            f"the backends would run in {python}, which is Python {version[0]}.{version[1]}, and this is "
            f"{sys.version_info.major}.{sys.version_info.minor}: start from a virtual environment of this Python"
        )
    if missing:
        raise StartError(
            f"{python}, in which the backends run, has no {', no '.join(missing)}: "
            f"install it with {python} -m pip install 'trident-serving[runtime]'"
        )
    check_numpy(numpy)


def check_numpy(version: str) -> None:
    """Refuse numpy 2, with which this server's Python backend sends tensors without bytes."""
    if int(version.split(".")[0]) >= 2:
        raise StartError(f"numpy {version} makes tritonserver send empty tensors without an error: install 'numpy<2'")


def libpython_folder(folder: str | None = None, name: str | None = None) -> Path | None:
    """The folder of the shared libpython that the stub loads; None if the loader finds it by itself."""
    folder = folder if folder is not None else sysconfig.get_config_var("LIBDIR")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    name = name or f"libpython{version}.so.1.0"
    if folder and (Path(folder) / name).exists():
        return Path(folder)
    if ctypes.util.find_library(name.removeprefix("lib").split(".so")[0]):
        return None
    raise StartError(
        f"{name} was not found in {folder} nor by the loader: install it (Debian and Ubuntu: apt install "
        f"libpython{version}; pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install)"
    )


def check_ports(host: str, ports: Mapping[str, int]) -> None:
    """Check that the ports are free and different from each other."""
    for name, port in ports.items():
        others = [other for other, number in ports.items() if number == port and other != name]
        if others:
            raise StartError(f"{name} and {others[0]} can't both be {port}")
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                    raise StartError(
                        f"{host} is no address to listen on ({error.strerror}): give one of this machine's with --host"
                    ) from None
                stop = "stop what listens there, or " if error.errno == errno.EADDRINUSE else ""
                raise StartError(
                    f"port {port} on {host} can't be used ({error.strerror}): {stop}choose another with {name} "
                    f"({_variable(name)}=... of make)"
                ) from None
            except OverflowError:
                raise StartError(
                    f"{name} {port} ({_variable(name)} of make) is no port: choose one from 1 to 65535"
                ) from None


def _variable(option: str) -> str:
    """The variable of make for an option of the launcher."""
    return option.removeprefix("--").replace("-", "_").upper()
