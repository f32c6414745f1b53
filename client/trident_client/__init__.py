"""A thin typed client for a Trident server.

from trident_client import Client

with Client("localhost:8001") as client:
    print(client.generate("The capital of France is", max_tokens=8).text)
"""

from trident_client._client import Client
from trident_client._errors import (
    CancelledError,
    DeadlineExceededError,
    InvalidRequestError,
    NotFoundError,
    ServerError,
    TridentError,
    UnavailableError,
)
from trident_client._types import Generation, GenerationChunk, Health, Message, ModelStatus

__all__ = [
    "CancelledError",
    "Client",
    "DeadlineExceededError",
    "Generation",
    "GenerationChunk",
    "Health",
    "InvalidRequestError",
    "Message",
    "ModelStatus",
    "NotFoundError",
    "ServerError",
    "TridentError",
    "UnavailableError",
]
