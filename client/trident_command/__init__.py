"""The program `trident`: the first lines of it that run, before the client is imported.

That takes half a second, and Ctrl-C in it ends the program as it does later: with status 130, and without a traceback.
"""

from __future__ import annotations

import os
import signal

INTERRUPTED = 130


def main() -> int:
    """See `trident_client.cli.main`."""
    asked_for = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's job in the background is not
    if asked_for:
        # No exception: a library that is imported just now may swallow it, or make another one of it.
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    from trident_client import cli

    if asked_for:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()
