"""Makes the keys that `make up` needs, where they are missing: `python deploy/keys.py [folder]`.

    <folder>/gateway/keys.json    hashes of the gateway's keys: `prometheus` may read metrics, `first` may ask models
    <folder>/prometheus/key       Prometheus's key

The key `first` is printed, once. Other users may read these files, because the containers do: hashes of random keys
tell nothing, and Prometheus's key opens nothing but metrics and the state of queues.
"""

from __future__ import annotations

import sys
from pathlib import Path

from trident_gateway import keys

FOLDER = Path(__file__).parent / "keys"
SHARED = 0o644


def main(folder: Path) -> int:
    """Make what is missing; returns the exit status."""
    hashes, scraping = folder / "gateway" / "keys.json", folder / "prometheus" / "key"
    known = keys.read(hashes)
    found = keys.hashed(scraping.read_text(encoding="ascii")) if scraping.exists() else ""
    if not any(key.hash == found for key in known):
        if any(key.name == "prometheus" for key in known):  # the key itself is lost
            keys.remove(hashes, "prometheus")
        scraping.parent.mkdir(parents=True, exist_ok=True)
        scraping.write_text(keys.add(hashes, "prometheus", [keys.ADMIN]), encoding="ascii")
    if not any(keys.INFERENCE in key.scopes for key in known):
        first = keys.add(hashes, "first", [keys.INFERENCE])
        print(f"trident: the gateway's first API key, which is shown only now: {first}")
        print(f"trident: for more: .venv/bin/trident-gateway key add NAME --keys {hashes}", flush=True)
    for file in (hashes, scraping):
        file.chmod(SHARED)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER))
