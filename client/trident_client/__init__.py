"""A thin typed client for a Trident server.

from trident_client import Client

with Client("localhost:8001") as client:
    print(client.generate("The capital of France is", max_tokens=8).text)

`AsyncClient` has the same methods for asyncio.
"""

from trident_client._async_client import AsyncClient
from trident_client._client import Client
from trident_client._errors import (
    CancelledError,
    DeadlineExceededError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ServerError,
    TridentError,
    UnavailableError,
)
from trident_client._options import (
    ExplanationOptions,
    GenerationOptions,
    TranscriptionOptions,
    TranslationOptions,
)
from trident_client._settings import TLS
from trident_client._types import (
    Answer,
    Attribution,
    Entity,
    Explanation,
    Filling,
    Finding,
    Generation,
    GenerationChunk,
    Health,
    ImagePart,
    Label,
    Message,
    ModelStatus,
    Ranked,
    Segment,
    SparseVector,
    TextPart,
    ToolCall,
    Transcription,
    TranscriptionChunk,
    Translation,
)

__all__ = [  # noqa: RUF022 (as `sorted` has it)
    "Answer",
    "AsyncClient",
    "Attribution",
    "CancelledError",
    "Client",
    "DeadlineExceededError",
    "Entity",
    "Explanation",
    "ExplanationOptions",
    "Filling",
    "Finding",
    "ForbiddenError",
    "Generation",
    "GenerationChunk",
    "GenerationOptions",
    "Health",
    "ImagePart",
    "InvalidRequestError",
    "Label",
    "Message",
    "ModelStatus",
    "NotFoundError",
    "OverloadedError",
    "Ranked",
    "Segment",
    "ServerError",
    "SparseVector",
    "TLS",
    "TextPart",
    "ToolCall",
    "Transcription",
    "TranscriptionChunk",
    "TranscriptionOptions",
    "Translation",
    "TranslationOptions",
    "TridentError",
    "UnavailableError",
]
