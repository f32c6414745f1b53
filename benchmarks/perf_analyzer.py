"""Sets up Triton's perf_analyzer, also on machines with an older C library than it was built for.

Its wheel needs glibc 2.38. On an older Debian it runs through the loader of Debian 13's C library, which is unpacked
into the cache; nothing else of the machine changes.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

VERSION = "2.60.0"
_LIBRARIES = ("libc6", "libstdc++6", "libgcc-s1", "libssl3t64", "zlib1g", "libzstd1")
_SUITE = "trixie"


class SetupError(RuntimeError):
    """perf_analyzer can't run here; the message says what to do."""


def command(cache: Path) -> list[str]:
    """The beginning of a command line that runs perf_analyzer.

    Raises:
        SetupError: it can't be downloaded or can't run on this machine.
    """
    folder = cache / f"perf_analyzer-{VERSION}"
    binary = _binary(folder)
    if _runs([str(binary)]):
        return [str(binary)]
    return _through_newer_loader(folder, binary)


def _binary(folder: Path) -> Path:
    found = list(folder.glob("wheel/**/perf_analyzer"))
    if not any(path.is_file() for path in found):
        wheels = folder / "download"
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        download += ["--platform", "manylinux_2_38_x86_64", "--dest", str(wheels), f"perf-analyzer=={VERSION}"]
        _run(download, "perf_analyzer's wheel can't be downloaded")
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            wheel.extractall(folder / "wheel")
        found = list(folder.glob("wheel/**/perf_analyzer"))
    binary = next(path for path in found if path.is_file())
    binary.chmod(0o755)
    return binary


def _runs(prefix: list[str]) -> bool:
    # Without arguments it prints its usage; there is no --help and no --version that ends well.
    try:
        run = subprocess.run(prefix, capture_output=True, text=True, check=False)
    except OSError:
        return False
    return "Usage" in run.stdout + run.stderr or "-m must be specified" in run.stdout + run.stderr


def _through_newer_loader(folder: Path, binary: Path) -> list[str]:
    root = folder / "libraries"
    if not list(root.glob("**/ld-linux-x86-64.so.2")):
        _unpack_debian_libraries(folder / "apt", root)
    loader = next(path for path in root.glob("**/ld-linux-x86-64.so.2"))
    libraries = sorted({str(path.parent) for path in root.glob("**/*.so*")})
    prefix = [str(loader), "--library-path", ":".join(libraries), str(binary)]
    if not _runs(prefix):
        raise SetupError("perf_analyzer does not run here: use a machine with glibc 2.38 or later")
    return prefix


def _unpack_debian_libraries(apt: Path, root: Path) -> None:
    """Download with an apt root of our own, from the mirror that this machine already uses."""
    for part in ("lists/partial", "cache/archives/partial"):
        (apt / part).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    mirror, keyring = _debian_mirror()
    signed = f"[signed-by={keyring}] " if keyring else ""
    (apt / "sources.list").write_text(f"deb {signed}{mirror} {_SUITE} main\n")
    options = [
        f"Dir::State={apt}",
        f"Dir::State::status={apt / 'status'}",
        f"Dir::State::lists={apt / 'lists'}",
        f"Dir::Cache={apt / 'cache'}",
        f"Dir::Etc::sourcelist={apt / 'sources.list'}",
        "Dir::Etc::sourceparts=-",
        "APT::Get::List-Cleanup=0",
        "APT::Sandbox::User=root",
    ]
    flags = [word for option in options for word in ("-o", option)]
    _run(["apt-get", "-q", *flags, "update"], "Debian 13's package lists can't be read")
    debs = apt / "debs"
    debs.mkdir(exist_ok=True)
    _run(["apt-get", "-q", *flags, "download", *_LIBRARIES], "Debian 13's libraries can't be downloaded", debs)
    for deb in sorted(debs.glob("*.deb")):
        _run(["dpkg-deb", "-x", str(deb), str(root)], f"{deb.name} can't be unpacked")


def _debian_mirror() -> tuple[str, str]:
    """Address and keyring of the Debian archive in this machine's own apt configuration."""
    for file in sorted(Path("/etc/apt/sources.list.d").glob("*.sources")):
        for stanza in file.read_text().split("\n\n"):
            fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != "#")
            if fields.get("URIs", "").rstrip("/").endswith("/debian"):
                return fields["URIs"].split()[0], fields.get("Signed-By", "")
    lists = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*.list"))]
    for file in (path for path in lists if path.exists()):
        for line in file.read_text().splitlines():
            words = [word for word in line.split() if not word.startswith("[")]
            if words[:1] == ["deb"] and words[1].rstrip("/").endswith("/debian"):
                return words[1], ""
    raise SetupError(
        "this machine's C library is too old for perf_analyzer, and it is no Debian whose archive has a newer "
        "one: use a machine with glibc 2.38 or later"
    )


def _run(arguments: list[str], problem: str, folder: Path | None = None) -> None:
    try:
        run = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=folder)
    except OSError as error:
        raise SetupError(f"{problem}: {error}") from None
    if run.returncode:
        raise SetupError(f"{problem}: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
