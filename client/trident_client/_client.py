"""The client whose calls block. Safe to use from several threads."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from trident_client import _control, _generation, _tasks
from trident_client._connection import Connection
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


class Client(Connection):
    """Calls Trident servers.

    Args:
        url: host and port of a server's gRPC endpoint ("localhost:8001"), or the URL of its HTTP endpoint
            ("http://localhost:8000"), which needs the extra `http`; "grpcs://" and "https://" are encrypted. Of several
            servers, the one with the fewest requests of this client gets the next one. If it can't be reached or has no
            room, another one does, as long as nothing of the answer has come.
        timeout: seconds that a call without its own may take; None: no limit. A stream may take longer, but not be
            silent for so long.
        admin_key: for `models`, `load` and `unload`; None: TRIDENT_ADMIN_KEY, or, over gRPC, the key that a server of
            the same user on this machine has written to a file.
        api_key: for a proxy before the server; it is sent as a bearer token.
        headers: more headers (gRPC's metadata) of every request; a function is called for each of them. The caller's
            span of OpenTelemetry is sent without being named here.
        tls: True, or the certificates: an address without a scheme is then encrypted.
        max_message_bytes: of one request and of one response; None: any, but 3 MiB of a request over HTTP, because
            older servers end at 4.
        keepalive: seconds of silence after which a gRPC connection with calls is tested; they raise UnavailableError if
            no answer comes for as long again. None: never.
        wait_if_full: whether requests of every call but those of a generator are sent again, within their time, where
            the server's queue is full.
        retries: how often a request to a model is sent again, within its time, whose answer broke off before the caller
            had anything of it: of a stream, before its first chunk. Calls about the server, such as `load`, are not.
        retry_silence: seconds without anything of an answer, or of its next chunk, after which an answer that is wanted
            whole counts as broken off, so that a server that hangs is given up; its last try has all the time that is
            left. Longer than the longest answer that comes at once. None: never.

    Raises:
        ValueError: an argument makes no sense; its message says which.
        ModuleNotFoundError: an address is one of HTTP, and the extra is not installed.
        OSError: a certificate can't be read.
    """

    def generate(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        *,
        images: File | Sequence[File] = (),
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """The continuation of a prompt; a list of messages is a chat, a list of numbers the prompt's tokens.

        Args:
            prompt: a text to continue, its tokens, or the messages of a chat.
            images: of a model that reads them: files by their bytes or paths, in the order of the marks of a text or
                of the parts of type "image".
            model: public name; None: the server's only generator.
            options: see `GenerationOptions`; an option that is None is left out.
            timeout: seconds; the server then gives up the request too, even one that waits for a slot.

        Raises:
            TridentError: see its subclasses.
            TypeError: an option is unknown.
            ValueError: an option's number does not fit its type.
        """
        return _generation.joined(self._whole(_generation.prompt(prompt, model, options, images=images), timeout))

    def stream(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        *,
        images: File | Sequence[File] = (),
        model: str | None = None,
        n: int = 1,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generator[GenerationChunk, None, None]:
        """The same, in chunks as they come. Closing the iterator cancels the request.

        Args:
            images: see `generate`.
            n: answers, see `generate_many`; each chunk is of one, which its `index` says.
            timeout: seconds until the last chunk; None: no limit but the client's, between two chunks.
            options: those of `generate`.

        Raises:
            TridentError: see its subclasses; raised while iterating, but for a model that is not named and not found.
            TypeError: an option is unknown.
        """
        return self._chunks(_generation.prompt(prompt, model, options, images=images, stream=True, n=n), timeout)

    def generate_many(
        self,
        prompt: str | Sequence[Message] | Sequence[int],
        n: int,
        *,
        images: File | Sequence[File] = (),
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[Generation]:
        """Several answers to one prompt, which is computed once; with `temperature` above 0 they differ.

        Args:
            prompt: see `generate`; `images` too.
            n: how many, between 1 and 32. The i-th has the seed `random_seed + i`.
            options: those of `generate`.

        Raises:
            TridentError: see its subclasses.
            TypeError: an option is unknown.
        """
        every = self._whole(_generation.prompt(prompt, model, options, images=images, n=n), timeout)
        return [_generation.joined([chunk]) for chunk in every]

    def chat(
        self,
        messages: str | Sequence[Message],
        *,
        images: File | Sequence[File] = (),
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Generation:
        """The assistant's next turn, through the model's chat template; a text is one message of the user.

        Args:
            images: see `generate`; those of a text come before it.
            options: those of `generate`.

        Raises:
            TridentError: see its subclasses.
            TypeError: an option is unknown.
        """
        return self.generate(
            _generation.turns(messages, images), images=images, model=model, timeout=timeout, **options
        )

    def embed(
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
        """Embeddings, float32 [texts, dimensions]; [dimensions] for a single text.

        Args:
            prompt_name: which of the model's prompts goes before each text, often "query" or "passage"; None: the
                model's default one, if it has one.
            dimensions: numbers in an embedding, one of those that the model allows; None: all that it gives.
            truncate: whether to cut texts that are longer than the model takes; None leaves it to the server,
                which refuses them unless its models.toml says otherwise.
            batch_size: texts in one request, at most the model's `max_batch_size`.

        Raises:
            TridentError: see its subclasses.
            ValueError: `dimensions` is no number of 64 bits, or a text is no text.
        """
        return self._send(_tasks.embed(texts, model, prompt_name, dimensions, truncate, batch_size), timeout)

    def tokenize(
        self,
        texts: Sequence[str],
        *,
        model: str,
        text_pairs: Sequence[str] | None = None,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> list[list[int]]:
        """The tokens of each text as a model of encoders reads it, by their ids.

        Args:
            model: public name.
            text_pairs: for a ranker: a text for each query.
            truncate: see `embed`; `batch_size` too.

        Raises:
            NotFoundError: the model is none of encoders.
            TridentError: see its other subclasses.
        """
        return self._send(_tasks.tokenize(texts, text_pairs, model, truncate, batch_size), timeout)

    def infer(
        self, model: str, tensors: Mapping[str, NDArray[Any]], *, timeout: float | None = None
    ) -> dict[str, NDArray[Any]]:
        """The tensors that a Triton model answers with, by their names: for plain models, and stages of ours.

        Args:
            model: its name in Triton, such as "minilm_model", the graph of `minilm`.
            tensors: what it reads, in the shapes of its config; those of texts hold bytes.

        Raises:
            TridentError: see its subclasses.
        """
        return self._send(_tasks.infer(model, tensors), timeout)

    # A str is a sequence of str too: the first overload wins.
    @overload
    def embed_sparse(  # type: ignore[overload-overlap]
        self, texts: str, *, prompt_name: str | None = None, **options: Unpack[TextOptions]
    ) -> SparseVector: ...
    @overload
    def embed_sparse(
        self, texts: Sequence[str], *, prompt_name: str | None = None, **options: Unpack[TextOptions]
    ) -> list[SparseVector]: ...
    def embed_sparse(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        prompt_name: str | None = None,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> SparseVector | list[SparseVector]:
        """Sparse embeddings, one a text: a weight for some tokens of the vocabulary; one for a single text.

        Args:
            model: public name, of sparse or hybrid embeddings; None: the server's only model of sparse ones.
            prompt_name: see `embed`; `truncate` and `batch_size` too.

        Raises:
            TridentError: see its subclasses.
        """
        return self._send(_tasks.embed_sparse(texts, model, prompt_name, truncate, batch_size), timeout)

    @overload
    def classify(  # type: ignore[overload-overlap]
        self, texts: str, *, text_pairs: str | None = None, **options: Unpack[ClassifyOptions]
    ) -> list[Label]: ...
    @overload
    def classify(
        self, texts: Sequence[str], *, text_pairs: Sequence[str] | None = None, **options: Unpack[ClassifyOptions]
    ) -> list[list[Label]]: ...
    def classify(
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
        """The likeliest classes of each text, the likeliest first; one list for a single text.

        Args:
            text_pairs: a second text for each, for models that compare two.
            top_k: classes of each text, at most the model's.
            truncate: see `embed`; `batch_size` too.

        Raises:
            TridentError: see its subclasses.
        """
        return self._send(_tasks.classify(texts, text_pairs, model, top_k, truncate, batch_size), timeout)

    @overload
    def classify_zero_shot(  # type: ignore[overload-overlap]
        self, texts: str, candidate_labels: Sequence[str], **options: Unpack[ZeroShotOptions]
    ) -> list[Label]: ...
    @overload
    def classify_zero_shot(
        self, texts: Sequence[str], candidate_labels: Sequence[str], **options: Unpack[ZeroShotOptions]
    ) -> list[list[Label]]: ...
    def classify_zero_shot(
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
        """All of the labels for each text, the likeliest first; one list for a single text.

        Args:
            candidate_labels: what a text may be about, in words.
            hypothesis_template: the sentence for a label, with {} in its place; None: "This example is {}."
            multi_label: whether each label is scored by itself, so that the scores need not add up to 1.
            truncate: see `embed`.
            batch_size: texts in one request; times the labels at most the model's `max_batch_size`.

        Raises:
            TridentError: see its subclasses.
        """
        batch = _tasks.classify_zero_shot(
            texts, candidate_labels, hypothesis_template, multi_label, model, truncate, batch_size
        )
        return self._send(batch, timeout)

    @overload
    def entities(  # type: ignore[overload-overlap]
        self, texts: str, **options: Unpack[EntityOptions]
    ) -> list[Entity]: ...
    @overload
    def entities(self, texts: Sequence[str], **options: Unpack[EntityOptions]) -> list[list[Entity]]: ...
    def entities(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        aggregation_strategy: str | None = None,
        truncate: bool | None = None,
        batch_size: int = 32,
        timeout: float | None = None,
    ) -> list[Entity] | list[list[Entity]]:
        """The entities of each text, in its order; one list for a single text.

        Args:
            aggregation_strategy: "none", "simple", "first", "average" or "max"; None leaves it to the server.
            truncate: see `embed`; `batch_size` too.

        Raises:
            TridentError: see its subclasses.
        """
        return self._send(_tasks.entities(texts, model, aggregation_strategy, truncate, batch_size), timeout)

    @overload
    def answer(  # type: ignore[overload-overlap]
        self, question: str, context: str, **options: Unpack[AnswerOptions]
    ) -> list[Answer]: ...
    @overload
    def answer(
        self, question: Sequence[str], context: str | Sequence[str], **options: Unpack[AnswerOptions]
    ) -> list[list[Answer]]: ...
    def answer(
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
        """The answers that a context holds, the best first; one list for a single question.

        Many questions go out in requests of 32.

        Args:
            question: one, or several to be answered from one context or from one each.
            top_k: answers to a question.
            max_answer_len: tokens of an answer; None: 15.
            handle_impossible_answer: whether "" may be an answer.

        Raises:
            TridentError: see its subclasses.
        """
        batch = _tasks.answer(question, context, top_k, model, max_answer_len, handle_impossible_answer)
        return self._send(batch, timeout)

    def rank(
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
        """The passages by how well they answer a query, the best first.

        Args:
            prompt_name: which of the model's prompts goes with the query; None: the model's default one, if any.
            truncate: see `embed`; `batch_size` too.

        Raises:
            TridentError: see its subclasses.
        """
        return self._send(_tasks.rank(query, passages, model, prompt_name, truncate, batch_size), timeout)

    def fill_mask(
        self, text: str, *, model: str | None = None, top_k: int | None = None, timeout: float | None = None
    ) -> list[list[Filling]]:
        """The likeliest tokens for each mask of a text, the likeliest first.

        Args:
            text: with the model's mask token ("[MASK]", "<mask>") in place of a word.
            top_k: tokens for a mask; None: 5.

        Raises:
            TridentError: see its subclasses.
        """
        return self._send(_tasks.fill_mask(text, model, top_k), timeout)

    @overload
    def translate(  # type: ignore[overload-overlap]
        self,
        texts: str,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> Translation: ...
    @overload
    def translate(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> list[Translation]: ...
    def translate(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> Translation | list[Translation]:
        """Each text in another language; one answer for a single text.

        Many texts are sent 16 at a time. One that finds the server's queue full is sent again, within its `timeout`.

        Args:
            texts: one text or several.
            model: public name; None: the server's only model of the task.
            options: see `TranslationOptions`; the model's generation config has the defaults.
            timeout: seconds; the server then gives up the request too.

        Raises:
            TridentError: see its subclasses.
            TypeError: an option is unknown.
            ValueError: an option's number does not fit its type.
        """
        return self._send(_tasks.text_to_text("translation", texts, model, options), timeout)

    @overload
    def summarize(  # type: ignore[overload-overlap]
        self,
        texts: str,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> Translation: ...
    @overload
    def summarize(
        self,
        texts: Sequence[str],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> list[Translation]: ...
    def summarize(
        self,
        texts: str | Sequence[str],
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranslationOptions],
    ) -> Translation | list[Translation]:
        """A summary of each text; see `translate`."""
        return self._send(_tasks.text_to_text("summarization", texts, model, options), timeout)

    def transcribe(
        self,
        audio: bytes | str | Path,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranscriptionOptions],
    ) -> Transcription:
        """What is said in a recording.

        Args:
            audio: a WAV, FLAC, MP3 or Ogg file: its bytes, or its path.
            model: public name; None: the server's only model of the task.
            options: see `TranscriptionOptions`; `timestamps` gives segments with their times.
            timeout: seconds; the server then gives up the request too.

        Raises:
            TridentError: see its subclasses; `InvalidRequestError` where the file is broken or too long.
            OSError: the file can't be read.
            TypeError: an option is unknown.
            ValueError: an option's number does not fit its type.
        """
        return _tasks.transcription(self._whole(_tasks.transcribe(audio, model, options), timeout, waits=True))

    def stream_transcription(
        self,
        audio: bytes | str | Path,
        *,
        model: str | None = None,
        timeout: float | None = None,
        **options: Unpack[TranscriptionOptions],
    ) -> Generator[TranscriptionChunk, None, None]:
        """The same, in chunks as they come; joined, they are what `transcribe` gives. Closing the iterator cancels it.

        Text comes as soon as no later token can take it away again: of a window's first segment token by token, of its
        other ones when each is complete. Of a search with beams it comes window by window.

        Args:
            timeout: seconds until the last chunk; None: no limit but the client's, between two chunks.
            options: those of `transcribe`.

        Raises:
            TridentError: see its subclasses; raised while iterating, but for a model that is not named and not found.
            OSError: the file can't be read.
            TypeError: an option is unknown.
        """
        return self._chunks(_tasks.transcribe(audio, model, options, stream=True), timeout)

    def explain(
        self, text: str, *, model: str, timeout: float | None = None, **options: Unpack[ExplanationOptions]
    ) -> list[Explanation]:
        """Which words the answer of a model rests on: what the score of each of its statements loses without a word.

        The model's table in models.toml must have `explain`.

        Args:
            text: to classify, to find entities in, to rank, to fill or to continue; of question answering the context.
            model: public name, or that of a variant.
            options: see `ExplanationOptions`; a ranker needs `query`, question answering `question`, and zero-shot
                classification `candidate_labels`.
            timeout: seconds.

        Raises:
            TridentError: see its subclasses; `NotFoundError` where nothing explains the model.
            TypeError: an option is unknown.
        """
        return self._send(_tasks.explain(text, model, options), timeout)

    def explain_page(
        self, text: str, *, model: str, timeout: float | None = None, **options: Unpack[ExplanationOptions]
    ) -> str:
        """The same as a page with the marked text, in HTML: it needs no other file and runs nothing.

        Raises:
            TridentError: see its subclasses.
            TypeError: an option is unknown.
        """
        return self._send(_tasks.explain_page(text, model, options), timeout)

    def embed_images(
        self,
        images: File | Sequence[File],
        *,
        model: str | None = None,
        batch_size: int = 8,
        timeout: float | None = None,
    ) -> NDArray[np.float32]:
        """Embeddings of images, float32 [images, dimensions]; [dimensions] for a single image.

        Those of a model with two towers (CLIP, SigLIP) are of length 1, and can be compared with what `embed` gives of
        texts by the same model.

        Args:
            images: PNG, JPEG or WebP files: the bytes of each, or its path.
            model: public name; None: the server's only model of the task.
            batch_size: images in one request, at most the model's `max_batch_size`; less where their files are large.

        Raises:
            TridentError: see its subclasses; `InvalidRequestError` says which image is broken or too large.
            OSError: a file can't be read.
        """
        return self._send(_tasks.embed_images(images, model, batch_size), timeout)

    @overload
    def classify_images(  # type: ignore[overload-overlap]
        self, images: File, *, top_k: int = 1, **options: Unpack[ImageOptions]
    ) -> list[Label]: ...
    @overload
    def classify_images(
        self, images: Sequence[File], *, top_k: int = 1, **options: Unpack[ImageOptions]
    ) -> list[list[Label]]: ...
    def classify_images(
        self,
        images: File | Sequence[File],
        *,
        top_k: int = 1,
        model: str | None = None,
        batch_size: int = 8,
        timeout: float | None = None,
    ) -> list[Label] | list[list[Label]]:
        """The likeliest classes of each image, the likeliest first; one list for a single image.

        Args:
            images: see `embed_images`; `batch_size` too.
            top_k: classes of each image, at most the model's.

        Raises:
            TridentError: see its subclasses; `InvalidRequestError` says which image is broken or too large.
            OSError: a file can't be read.
        """
        return self._send(_tasks.classify_images(images, model, top_k, batch_size), timeout)

    @overload
    def classify_images_zero_shot(  # type: ignore[overload-overlap]
        self,
        images: File,
        candidate_labels: Sequence[str],
        *,
        hypothesis_template: str | None = None,
        **options: Unpack[ImageOptions],
    ) -> list[Label]: ...
    @overload
    def classify_images_zero_shot(
        self,
        images: Sequence[File],
        candidate_labels: Sequence[str],
        *,
        hypothesis_template: str | None = None,
        **options: Unpack[ImageOptions],
    ) -> list[list[Label]]: ...
    def classify_images_zero_shot(
        self,
        images: File | Sequence[File],
        candidate_labels: Sequence[str],
        *,
        hypothesis_template: str | None = None,
        model: str | None = None,
        batch_size: int = 8,
        timeout: float | None = None,
    ) -> list[Label] | list[list[Label]]:
        """All of the labels for each image, the likeliest first; one list for a single image.

        Args:
            images: see `embed_images`; `batch_size` too.
            candidate_labels: what an image may show, in words.
            hypothesis_template: the sentence for a label, with {} in its place; None: "This is a photo of {}."

        Raises:
            TridentError: see its subclasses; `InvalidRequestError` says which image is broken or too large.
            OSError: a file can't be read.
        """
        batch = _tasks.classify_images_zero_shot(images, candidate_labels, hypothesis_template, model, batch_size)
        return self._send(batch, timeout)

    def models(self, *, timeout: float | None = None) -> list[ModelStatus]:
        """The models that the server has loaded or tried to load, by name.

        Raises:
            ForbiddenError: the admin key is missing or wrong.
            TridentError: see its other subclasses.
        """
        return self._run(_control.models, timeout)

    def served(self, *, timeout: float | None = None) -> list[str]:
        """The models that the server has loaded, with their stages, by name; no key is needed.

        Raises:
            TridentError: see its subclasses.
        """
        return self._run(_control.served, timeout)

    def parameters(self, model: str, *, timeout: float | None = None) -> dict[str, str]:
        """The parameters of a model's config: its task and its limits, as texts.

        Raises:
            NotFoundError: the server has not loaded such a model.
            TridentError: see its other subclasses.
        """
        return self._run(lambda: _control.parameters(model), timeout)

    def unverified(self, model: str, *, timeout: float | None = None) -> str:
        """Why the fidelity gate refused a model that was installed by force; "" for any other.

        Raises:
            NotFoundError: the server has not loaded such a model.
            TridentError: see its other subclasses.
        """
        return self._run(lambda: _control.unverified(model), timeout)

    def adapters(self, model: str, *, timeout: float | None = None) -> list[str]:
        """The adapters of a model, which `lora_name` chooses from; [] of one that has none.

        Raises:
            NotFoundError: the server has not loaded such a model.
            TridentError: see its other subclasses.
        """
        return self._run(lambda: _control.adapters(model), timeout)

    def load(self, model: str, *, only: Sequence[str] | None = None, timeout: float | None = None) -> list[str]:
        """Load a model that was exported since the server started, or that was exported again.

        The other models keep answering, and so does a generator until its new version is loaded. An ensemble that is
        loaded is unloaded first, because a new tokenizer before an old graph gives wrong answers; its requests get
        NotFoundError or UnavailableError until it is loaded again.

        Args:
            model: public name.
            only: Triton models of it to load, in this order, and nothing is unloaded before: each takes the place of
                what answers now once it is loaded, as `trident-export promote` does it.
            timeout: seconds for each of them.

        Returns:
            The Triton models that were loaded: its stages and variants, the public ones last.

        Raises:
            NotFoundError: the repository has no such model, or it was never exported.
            ForbiddenError: the admin key is missing or wrong.
            TridentError: see its other subclasses; a model that can't be loaded says why.
        """
        self._only.clear()
        every = self._run_on_all(lambda: _control.load(model, self._deadline(timeout), only), timeout)
        return every[-1]

    def unload(self, model: str, *, only: Sequence[str] | None = None, timeout: float | None = None) -> list[str]:
        """Unload a model, once its running requests are answered; it stays in the repository.

        Args:
            model: public name.
            only: Triton models of it to unload; None: all of them.
            timeout: seconds for the running requests.

        Returns:
            The Triton models that were unloaded.

        Raises:
            NotFoundError: the repository has no such model.
            ForbiddenError: the admin key is missing or wrong.
            TridentError: see its other subclasses.
        """
        self._only.clear()
        every = self._run_on_all(lambda: _control.unload(model, self._deadline(timeout), only), timeout)
        return every[-1]

    def health(self, *, timeout: float | None = None) -> Health:
        """Whether a server answers; one that can't be reached, or does not answer in time, is not live: no error."""
        return _control.best(self._run_on_all(_control.health, timeout))
