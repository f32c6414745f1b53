"""The client whose calls are awaited."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from trident_client import _control, _generation, _tasks
from trident_client._async_connection import AsyncConnection
from trident_client._options import (
    ExplanationOptions,
    GenerationOptions,
    TranscriptionOptions,
    TranslationOptions,
)
from trident_client._task_options import (
    AnswerOptions,
    ClassifyOptions,
    EntityOptions,
    ImageOptions,
    TextOptions,
    ZeroShotOptions,
)
from trident_client._types import (
    Answer,
    Entity,
    Explanation,
    File,
    Filling,
    Generation,
    GenerationChunk,
    Health,
    Label,
    Message,
    ModelStatus,
    Ranked,
    SparseVector,
    Transcription,
    TranscriptionChunk,
    Translation,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AsyncClient(AsyncConnection):
    """Calls a Trident server from asyncio, with the methods of `Client`; see there. It belongs to one event loop.

        async with AsyncClient("localhost:8001") as client:
            answer = await client.generate("The capital of France is", max_tokens=8)
            async for chunk in client.stream("Once upon a time"):
                print(chunk.text, end="")

    A call whose task is cancelled is cancelled on the server, too, and so is a stream that is closed (`aclose`) or left
    before its end.

    Args:
        url: as for `Client`; the other arguments too.
    """

    async def generate(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        *,
        images: File | Sequence[File] = (),
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """See `Client.generate`."""
        return _generation.joined(await self._whole(_generation.prompt(prompt, model, options, images=images), timeout))

    def stream(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        *,
        images: File | Sequence[File] = (),
        model: str | None = None,
        n: int = 1,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncGenerator[GenerationChunk, None]:
        """See `Client.stream`. A model that is not named is looked for while iterating."""
        return self._chunks(_generation.prompt(prompt, model, options, images=images, stream=True, n=n), timeout)

    async def generate_many(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        n: int,
        *,
        images: File | Sequence[File] = (),
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Generation]:
        """See `Client.generate_many`."""
        every = await self._whole(_generation.prompt(prompt, model, options, images=images, n=n), timeout)
        return [_generation.joined([chunk]) for chunk in every]

    async def chat(
        self,
        messages: str | Sequence[Message],
        *,
        images: File | Sequence[File] = (),
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """See `Client.chat`."""
        return await self.generate(
            _generation.turns(messages, images), images=images, model=model, timeout=timeout, **options
        )

    async def embed(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> NDArray[np.float32]:
        """See `Client.embed`."""
        return await self._send(_tasks.embed(texts, model, prompt_name, dimensions, truncate, batch_size), timeout)

    async def tokenize(
        self,
        texts: Sequence[str],
        *,
        model: str,
        text_pairs: Sequence[str] | None = None,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> list[list[int]]:
        """See `Client.tokenize`."""
        return await self._send(_tasks.tokenize(texts, text_pairs, model, truncate, batch_size), timeout)

    async def infer(
        self, model: str, tensors: Mapping[str, NDArray[Any]], *, timeout: float | None = None
    ) -> dict[str, NDArray[Any]]:
        """See `Client.infer`."""
        return await self._send(_tasks.infer(model, tensors), timeout)

    # A str is a sequence of str too: the first overload wins.
    @overload
    async def embed_sparse(  # type: ignore[overload-overlap]
        self, texts: str, *, prompt_name: str | None = None, **options: Unpack[TextOptions]
    ) -> SparseVector: ...
    @overload
    async def embed_sparse(
        self, texts: Sequence[str], *, prompt_name: str | None = None, **options: Unpack[TextOptions]
    ) -> list[SparseVector]: ...
    async def embed_sparse(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        prompt_name: str | None = None,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> SparseVector | list[SparseVector]:
        """See `Client.embed_sparse`."""
        return await self._send(_tasks.embed_sparse(texts, model, prompt_name, truncate, batch_size), timeout)

    @overload
    async def classify(  # type: ignore[overload-overlap]
        self, texts: str, *, text_pairs: str | None = None, **options: Unpack[ClassifyOptions]
    ) -> list[Label]: ...
    @overload
    async def classify(
        self, texts: Sequence[str], *, text_pairs: Sequence[str] | None = None, **options: Unpack[ClassifyOptions]
    ) -> list[list[Label]]: ...
    async def classify(
        self,
        texts: str | Sequence[str],
        *,
        text_pairs: str | Sequence[str] | None = None,
        model: str | None = None,
        top_k: int = 1,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> list[Label] | list[list[Label]]:
        """See `Client.classify`."""
        return await self._send(_tasks.classify(texts, text_pairs, model, top_k, truncate, batch_size), timeout)

    @overload
    async def classify_zero_shot(  # type: ignore[overload-overlap]
        self, texts: str, candidate_labels: Sequence[str], **options: Unpack[ZeroShotOptions]
    ) -> list[Label]: ...
    @overload
    async def classify_zero_shot(
        self, texts: Sequence[str], candidate_labels: Sequence[str], **options: Unpack[ZeroShotOptions]
    ) -> list[list[Label]]: ...
    async def classify_zero_shot(
        self,
        texts: str | Sequence[str],
        candidate_labels: Sequence[str],
        *,
        hypothesis_template: str | None = None,
        multi_label: bool | None = None,
        model: str | None = None,
        truncate: bool | None = None,
        batch_size: int = 1,
        timeout: float | None = None,
    ) -> list[Label] | list[list[Label]]:
        """See `Client.classify_zero_shot`."""
        batch = _tasks.classify_zero_shot(
            texts, candidate_labels, hypothesis_template, multi_label, model, truncate, batch_size
        )
        return await self._send(batch, timeout)

    @overload
    async def entities(  # type: ignore[overload-overlap]
        self, texts: str, **options: Unpack[EntityOptions]
    ) -> list[Entity]: ...
    @overload
    async def entities(self, texts: Sequence[str], **options: Unpack[EntityOptions]) -> list[list[Entity]]: ...
    async def entities(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        aggregation_strategy: str | None = None,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> list[Entity] | list[list[Entity]]:
        """See `Client.entities`."""
        return await self._send(_tasks.entities(texts, model, aggregation_strategy, truncate, batch_size), timeout)

    @overload
    async def answer(  # type: ignore[overload-overlap]
        self, question: str, context: str, **options: Unpack[AnswerOptions]
    ) -> list[Answer]: ...
    @overload
    async def answer(
        self, question: Sequence[str], context: str | Sequence[str], **options: Unpack[AnswerOptions]
    ) -> list[list[Answer]]: ...
    async def answer(
        self,
        question: str | Sequence[str],
        context: str | Sequence[str],
        *,
        top_k: int = 1,
        model: str | None = None,
        max_answer_len: int | None = None,
        handle_impossible_answer: bool | None = None,
        timeout: float | None = None,
    ) -> list[Answer] | list[list[Answer]]:
        """See `Client.answer`."""
        batch = _tasks.answer(question, context, top_k, model, max_answer_len, handle_impossible_answer)
        return await self._send(batch, timeout)

    async def rank(
        self,
        query: str,
        passages: Sequence[str],
        *,
        model: str | None = None,
        prompt_name: str | None = None,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> list[Ranked]:
        """See `Client.rank`."""
        return await self._send(_tasks.rank(query, passages, model, prompt_name, truncate, batch_size), timeout)

    async def fill_mask(
        self, text: str, *, model: str | None = None, top_k: int | None = None, timeout: float | None = None
    ) -> list[list[Filling]]:
        """See `Client.fill_mask`."""
        return await self._send(_tasks.fill_mask(text, model, top_k), timeout)

    @overload
    async def translate(  # type: ignore[overload-overlap]
        self,
        texts: str,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> Translation: ...
    @overload
    async def translate(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> list[Translation]: ...
    async def translate(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> Translation | list[Translation]:
        """See `Client.translate`."""
        return await self._send(_tasks.text_to_text("translation", texts, model, options), timeout)

    @overload
    async def summarize(  # type: ignore[overload-overlap]
        self,
        texts: str,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> Translation: ...
    @overload
    async def summarize(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> list[Translation]: ...
    async def summarize(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> Translation | list[Translation]:
        """See `Client.summarize`."""
        return await self._send(_tasks.text_to_text("summarization", texts, model, options), timeout)

    async def transcribe(
        self,
        audio: bytes | str | Path,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranscriptionOptions],
    ) -> Transcription:
        """See `Client.transcribe`."""
        return _tasks.transcription(await self._whole(_tasks.transcribe(audio, model, options), timeout, waits=True))

    def stream_transcription(
        self,
        audio: bytes | str | Path,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranscriptionOptions],
    ) -> AsyncGenerator[TranscriptionChunk, None]:
        """See `Client.stream_transcription`. A model that is not named is looked for while iterating."""
        return self._chunks(_tasks.transcribe(audio, model, options, stream=True), timeout)

    async def explain(
        self, text: str, *, model: str, timeout: float | None = None, **options: Unpack[ExplanationOptions]
    ) -> list[Explanation]:
        """See `Client.explain`."""
        return await self._send(_tasks.explain(text, model, options), timeout)

    async def explain_page(
        self, text: str, *, model: str, timeout: float | None = None, **options: Unpack[ExplanationOptions]
    ) -> str:
        """See `Client.explain_page`."""
        return await self._send(_tasks.explain_page(text, model, options), timeout)

    async def embed_images(
        self,
        images: File | Sequence[File],
        *,
        model: str | None = None,
        batch_size: int = 8,
        timeout: float | None = None,
    ) -> NDArray[np.float32]:
        """See `Client.embed_images`."""
        return await self._send(_tasks.embed_images(images, model, batch_size), timeout)

    @overload
    async def classify_images(  # type: ignore[overload-overlap]
        self, images: File, *, top_k: int = 1, **options: Unpack[ImageOptions]
    ) -> list[Label]: ...
    @overload
    async def classify_images(
        self, images: Sequence[File], *, top_k: int = 1, **options: Unpack[ImageOptions]
    ) -> list[list[Label]]: ...
    async def classify_images(
        self,
        images: File | Sequence[File],
        *,
        top_k: int = 1,
        model: str | None = None,
        batch_size: int = 8,
        timeout: float | None = None,
    ) -> list[Label] | list[list[Label]]:
        """See `Client.classify_images`."""
        return await self._send(_tasks.classify_images(images, model, top_k, batch_size), timeout)

    @overload
    async def classify_images_zero_shot(  # type: ignore[overload-overlap]
        self,
        images: File,
        candidate_labels: Sequence[str],
        *,
        hypothesis_template: str | None = None,
        **options: Unpack[ImageOptions],
    ) -> list[Label]: ...
    @overload
    async def classify_images_zero_shot(
        self,
        images: Sequence[File],
        candidate_labels: Sequence[str],
        *,
        hypothesis_template: str | None = None,
        **options: Unpack[ImageOptions],
    ) -> list[list[Label]]: ...
    async def classify_images_zero_shot(
        self,
        images: File | Sequence[File],
        candidate_labels: Sequence[str],
        *,
        hypothesis_template: str | None = None,
        model: str | None = None,
        batch_size: int = 8,
        timeout: float | None = None,
    ) -> list[Label] | list[list[Label]]:
        """See `Client.classify_images_zero_shot`."""
        batch = _tasks.classify_images_zero_shot(images, candidate_labels, hypothesis_template, model, batch_size)
        return await self._send(batch, timeout)

    async def models(self, *, timeout: float | None = None) -> list[ModelStatus]:
        """See `Client.models`."""
        return await self._run(_control.models, timeout)

    async def served(self, *, timeout: float | None = None) -> list[str]:
        """See `Client.served`."""
        return await self._run(_control.served, timeout)

    async def parameters(self, model: str, *, timeout: float | None = None) -> dict[str, str]:
        """See `Client.parameters`."""
        return await self._run(lambda: _control.parameters(model), timeout)

    async def unverified(self, model: str, *, timeout: float | None = None) -> str:
        """See `Client.unverified`."""
        return await self._run(lambda: _control.unverified(model), timeout)

    async def adapters(self, model: str, *, timeout: float | None = None) -> list[str]:
        """See `Client.adapters`."""
        return await self._run(lambda: _control.adapters(model), timeout)

    async def load(self, model: str, *, only: Sequence[str] | None = None, timeout: float | None = None) -> list[str]:
        """See `Client.load`."""
        self._only.clear()
        every = await self._run_on_all(lambda: _control.load(model, self._deadline(timeout), only), timeout)
        return every[-1]

    async def unload(self, model: str, *, only: Sequence[str] | None = None, timeout: float | None = None) -> list[str]:
        """See `Client.unload`."""
        self._only.clear()
        every = await self._run_on_all(lambda: _control.unload(model, self._deadline(timeout), only), timeout)
        return every[-1]

    async def health(self, *, timeout: float | None = None) -> Health:
        """See `Client.health`."""
        return _control.best(await self._run_on_all(_control.health, timeout))
