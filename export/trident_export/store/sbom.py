"""What a model or an environment is made of, as a CycloneDX 1.6 document, and its licences as a table.

The environment is what this Python imports and what Debian's package manager has installed, so in an image it is the
image's. The same content gives the same document: it has no time and no random number.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import uuid
from collections.abc import Iterator, Mapping
from email.parser import HeaderParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

from trident_serving.artefacts import Manifest

Document = dict[str, Any]
_EXPRESSION = re.compile(r"[A-Za-z0-9.+() -]+ (?:AND|OR|WITH) [A-Za-z0-9.+() -]+")
_CLASSIFIER = "License :: OSI Approved :: "
_UNKNOWN = "not stated"
# Of the list of the CycloneDX 1.6 schema, those that packages and models name; any other name stands as it is.
_IDS = frozenset(
    (
        *("0BSD", "AGPL-3.0", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC-BY-4.0", "CC-BY-NC-4.0"),
        *("CC-BY-SA-4.0", "CC0-1.0", "GPL-2.0", "GPL-3.0", "ISC", "LGPL-2.1", "LGPL-3.0", "MIT", "MIT-0", "MPL-2.0"),
        *("PSF-2.0", "Python-2.0", "Unlicense", "Zlib", "ZPL-2.1"),
    )
)


def environment(system: Path = Path("/")) -> Document:
    """Every package that this Python can import, and every Debian package of the system.

    Args:
        system: the root folder of the system.
    """
    found = {
        package.metadata["Name"].lower().replace("_", "-"): package for package in importlib.metadata.distributions()
    }
    components = [_package(package) for _, package in sorted(found.items())] + list(_debian(system))
    version = ".".join(map(str, sys.version_info[:3]))
    root: Document = {"type": "platform", "bom-ref": "python", "name": "python", "version": version}
    return _document(root, components)


def model(manifest: Manifest) -> Document:
    """One version of a model: its source, and each of its files with its digest."""
    digest = manifest.digest or manifest.fingerprint
    root: Document = {
        "type": "machine-learning-model",
        "bom-ref": f"model:{manifest.name}",
        "name": manifest.name,
        "version": digest,
        "hashes": [{"alg": "SHA-256", "content": digest}],
        "licenses": _licences(manifest.licences),
        "properties": [{"name": f"trident:source:{key}", "value": value} for key, value in manifest.source.items()],
        "modelCard": {"modelParameters": {"task": manifest.task}},
    }
    files = [
        {
            "type": "file",
            "bom-ref": f"file:{path}",
            "name": path,
            "hashes": [{"alg": "SHA-256", "content": digest}],
        }
        for path, digest in sorted(manifest.files.items())
    ]
    return _document(root, files)


def licences(document: Document) -> str:
    """The names, versions and licences of a document's parts, a line each."""
    parts = [document["metadata"]["component"], *document["components"]]
    rows = [
        (part["name"], part.get("version", "")[:20], ", ".join(_names(part)) or _UNKNOWN)
        for part in parts
        if part["type"] != "file"
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {version:<{widths[1]}}  {licence}" for name, version, licence in rows)


def _document(root: Document, components: list[Document]) -> Document:
    content = repr((root, components))
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, content)}",
        "version": 1,
        "metadata": {"component": root},
        "components": components,
        "dependencies": [{"ref": root["bom-ref"], "dependsOn": [component["bom-ref"] for component in components]}],
    }


def _package(package: importlib.metadata.Distribution) -> Document:
    name, version = package.metadata["Name"], package.version
    url = f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{version}"
    return {
        "type": "library",
        "bom-ref": url,
        "name": name,
        "version": version,
        "purl": url,
        "licenses": _licences(list(_stated(package))),
    }


def _debian(system: Path) -> Iterator[Document]:
    """Debian's packages, in the order of their names; their licences are texts in /usr/share/doc."""
    try:
        status = (system / "var/lib/dpkg/status").read_text(encoding="utf-8", errors="replace")
        release = (system / "etc/os-release").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    known = re.search(r"^ID=\"?([\w.-]+)", release, re.MULTILINE)
    entries = (HeaderParser().parsestr(entry) for entry in status.strip().split("\n\n"))
    installed = [entry for entry in entries if str(entry["Status"]).endswith(" installed")]
    for entry in sorted(installed, key=lambda entry: (str(entry["Package"]), str(entry["Architecture"]))):
        name, version = str(entry["Package"]), str(entry["Version"])
        where = f"deb/{known[1] if known else 'debian'}/{name}@{quote(version)}?arch={entry['Architecture']}"
        yield {"type": "library", "bom-ref": f"pkg:{where}", "name": name, "version": version, "purl": f"pkg:{where}"}


def _stated(package: importlib.metadata.Distribution) -> Iterator[str]:
    """What a package's metadata says of its licence; the newest form first."""
    fields: Mapping[str, Any] = package.metadata.json
    if expression := fields.get("license_expression"):
        yield expression
        return
    classified = [
        line.removeprefix(_CLASSIFIER) for line in fields.get("classifier", ()) if line.startswith(_CLASSIFIER)
    ]
    if classified:
        yield from classified
    elif text := str(fields.get("license", "")).strip():
        yield text.splitlines()[0][:120]  # older packages put the whole text there


def _licences(stated: list[str]) -> list[Document]:
    """The list as CycloneDX has it: one expression, or identifiers and names."""
    if len(stated) == 1 and _EXPRESSION.fullmatch(stated[0]):
        return [{"expression": stated[0]}]
    return [{"license": {"id": each} if each in _IDS else {"name": each}} for each in stated]


def _names(part: Document) -> list[str]:
    return [
        entry.get("expression") or entry["license"].get("id") or entry["license"]["name"]
        for entry in part.get("licenses", ())
    ]
