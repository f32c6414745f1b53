"""Write the packages that images install, with the hashes of their files; or say that the files are out of step.

    python tools/lock.py            asks the package index
    python tools/lock.py --check    asks nobody: versions are those of constraints.txt, each with a hash

deploy/requirements.txt is what our backends, launcher and gateway import, and setuptools, which builds our own wheel.
deploy/requirements-server.txt is the wheel that carries tritonserver; what its Python code needs is left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
EXTRAS = ("runtime", "gateway", "signing", "traces")
BUILD = "setuptools==84.2.1"
SERVER = "nvidia-pytriton"
PACKAGES, SERVERS = "deploy/requirements.txt", "deploy/requirements-server.txt"
_HEADER = "# Written by tools/lock.py from pyproject.toml and constraints.txt: change those, not this.\n"
# The images' platform. What is pinned for its Python 3.11 is the same for 3.12.
_PLATFORM = ("--python-platform", "x86_64-manylinux_2_35", "--python-version", "3.11")
_QUIET = ("--quiet", "--no-header", "--no-annotate", "--no-emit-index-url", "--generate-hashes")
_PIN = re.compile(r"([A-Za-z0-9._-]+)==(\S+)")
_HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}\b")


def main(arguments: list[str]) -> int:
    """Write or check; returns the exit status."""
    if "--check" not in arguments:
        for name, text in compiled().items():
            (ROOT / name).write_text(text, encoding="utf-8")
        return 0
    found = list(problems())
    for problem in found:
        print(f"{problem}: run python tools/lock.py", file=sys.stderr)
    return 1 if found else 0


def compiled() -> dict[str, str]:
    """The two files, as uv resolves them now."""
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    with tempfile.TemporaryDirectory() as scratch:
        build, server = Path(scratch, "build.in"), Path(scratch, "server.in")
        build.write_text(f"{BUILD}\n", encoding="utf-8")
        server.write_text(f"{SERVER}\n", encoding="utf-8")
        return {
            PACKAGES: _compile("pyproject.toml", str(build), *extras),
            SERVERS: _compile(str(server), "--no-deps"),
        }


def _compile(*arguments: str) -> str:
    command = [sys.executable, "-m", "uv", "pip", "compile", *arguments, *_PLATFORM, *_QUIET]
    done = subprocess.run(
        [*command, "--constraint", "constraints.txt"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return _HEADER + done.stdout


def pins(text: str) -> dict[str, tuple[str, int]]:
    """The version of each package of a file, and how many hashes it has."""
    found = ((_PIN.match(block), block) for block in re.split(r"\n(?=\w)", text))
    return {canonicalize_name(pin[1]): (pin[2], len(_HASH.findall(block))) for pin, block in found if pin}


def problems(root: Path = ROOT) -> Iterator[str]:
    """What is wrong with the files, a sentence each."""
    constraints = pins((root / "constraints.txt").read_text(encoding="utf-8"))
    packages, servers = (pins((root / name).read_text(encoding="utf-8")) for name in (PACKAGES, SERVERS))
    for name, text in ((PACKAGES, packages), (SERVERS, servers)):
        for package, (version, hashes) in text.items():
            pinned = dict([BUILD.split("==")]).get(package) or constraints.get(package, ("none",))[0]
            if version != pinned:
                yield f"{name} has {package} {version}, constraints.txt has {pinned}"
            if not hashes:
                yield f"{name} has no hash of {package}"
    for requirement in _wanted(root):
        if requirement.name not in packages:
            yield f"{PACKAGES} has no {requirement.name}, which pyproject.toml asks for"
        elif not requirement.specifier.contains(packages[requirement.name][0], prereleases=True):
            found = f"{requirement.name} {packages[requirement.name][0]}"
            yield f"{PACKAGES} has {found}, pyproject.toml wants {requirement.specifier}"
    if SERVER not in servers:
        yield f"{SERVERS} has no {SERVER}"


def _wanted(root: Path) -> Iterator[Requirement]:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra in EXTRAS:
        for text in (*project["dependencies"], *project["optional-dependencies"][extra]):
            requirement = Requirement(text)
            requirement.name = canonicalize_name(requirement.name)
            if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.11"}):
                yield requirement


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
