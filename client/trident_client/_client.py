"""The client: one gRPC channel, a method for each task. Safe to use from several threads."""

from __future__ import annotations

from trident_client._generation import GenerationCalls
from trident_client._tasks import TaskCalls


class Client(GenerationCalls, TaskCalls):
    """Calls a Trident server.

    Args:
        url: host and port of the server's gRPC endpoint.
        timeout: seconds that a call may take where it names none; None waits as long as it takes.
        admin_key: for `models`, `load` and `unload`; found by itself where a server of the same user runs here.
    """
