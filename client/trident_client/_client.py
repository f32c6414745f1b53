"""The client: one gRPC channel, a method for each task. Safe to use from several threads."""

from __future__ import annotations

from trident_client._generation import GenerationCalls
from trident_client._tasks import TaskCalls


class Client(GenerationCalls, TaskCalls):
    """Calls a Trident server.

    Args:
        url: host and port of the server's gRPC endpoint.
        timeout: seconds that a call without its own timeout may take; None: no limit.
        admin_key: for `models`, `load` and `unload`; None: TRIDENT_ADMIN_KEY, or the key that a server of the same
            user on this machine has written to a file.
    """
