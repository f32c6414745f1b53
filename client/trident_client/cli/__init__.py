"""`trident`: the client on the command line.

    parser        every command with its flags
    connection    the flags that say which server is asked, and how
    texts, output what commands read and print; `exits`: how they end
    generation, tasks, control   the calls of `Client`, one command each
    conversation, batch, top, bench, completion   the commands that are more than one call

The base install runs all but the conversation, `top` and `completion`, which need the extra `cli`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from trident_client.cli import exits


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status, which `exits.Exit` explains.

    Raises:
        SystemExit: the arguments are wrong (2), or ask for help (0).
    """
    with exits.told() as ended:
        from trident_client.cli import parser

        options = parser.build().parse_args(sys.argv[1:] if arguments is None else arguments)
        ended.status = options.run(options)
    return ended.status
