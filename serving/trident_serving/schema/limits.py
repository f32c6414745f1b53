"""The limits of a model: one dataclass for each kind of model.

models.toml gives them, config.pbtxt carries them as parameters, and the server reads them again. Each dataclass checks
itself when it is built, and raises `ReadingError`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trident_serving.chat.messages import parse_options
from trident_serving.errors import InvalidRequest, ReadingError
from trident_serving.schema.fields import Aggregation, ChatFormat, LongInput
from trident_serving.schema.reading import JsonObject

DEVICES = ("cpu", "cuda")
NO_OPTIONS = JsonObject("{}")
BUCKETS = (128, 256)
MOST_PIXELS = 89_478_485  # of an image: where Pillow begins to warn of decompression bombs
_LONG = 512  # tokens from which on attention, which grows by the square of the padded length, is most of the work


def check_options(options: JsonObject) -> None:
    """Options of a chat template that a table names.

    Raises:
        ReadingError: one is no name of a template's variable, or is the request's to set.
    """
    try:
        parse_options(options)
    except InvalidRequest as error:
        raise ReadingError(str(error)) from None


@dataclass(frozen=True)
class CausalLimits:
    """Limits of a causal model, whichever engine computes it.

    Attributes:
        context: tokens of prompt and answer together.
        slots: answers that are generated at once.
        kv_cache_mib: MiB for keys and values; 0: enough for `slots` full contexts.
        max_waiting: requests that may wait for a slot; more get UNAVAILABLE at once.
        timeout: seconds that a request may take, waiting included; then it fails with DEADLINE_EXCEEDED. A request may
            ask for less.
        default_max_tokens: length of an answer where the request names none.
        prefix_reuse: whether a prompt reuses the tokens of its beginning that the cache already holds.
        threads: ONNX Runtime's intra-op threads.
        chat_template_kwargs: options of the chat template where a request does not say otherwise, such as
            `{ enable_thinking = false }`.
        chat_format: how the model writes calls of tools; "auto": as its chat template shows.
    """

    context: int = 1024
    slots: int = 8
    kv_cache_mib: int = field(default=0, metadata={"least": 0})
    max_waiting: int = 128
    timeout: int = 300
    default_max_tokens: int = 256
    prefix_reuse: bool = True
    threads: int = 2
    chat_template_kwargs: JsonObject = NO_OPTIONS
    chat_format: ChatFormat = ChatFormat.AUTO

    def __post_init__(self) -> None:
        if self.context < 2:
            raise ReadingError(f"context must be at least 2, a token and its successor, found {self.context}")
        check_options(self.chat_template_kwargs)


@dataclass(frozen=True)
class GenerationLimits(CausalLimits):
    """Limits of a causal model that ONNX Runtime computes.

    Attributes:
        prefill_chunk: the most prompt tokens in one step; running streams wait that long.
        prompt_lookup: whether greedy answers may be drafted from their own text.
        ngram_pool: whether they may be drafted from other requests' answers too, which changes their speed only;
            `prompt_lookup` is needed for it.
        device: "cpu" or "cuda"; the graph is made for it (decision 0023).
        images: that a request may have, of a model with an image tower; 0: the model is served by its text part.
        image_bytes: the largest image file that is decoded at all.
        image_pixels: the largest image, width times height.
        image_tokens: of an image, where the model reads it at its own size: a larger one is made smaller; 0: the
            model's image processor says how many.
    """

    prefill_chunk: int = 128
    prompt_lookup: bool = True
    ngram_pool: bool = True
    device: str = "cpu"
    images: int = field(default=0, metadata={"least": 0})
    image_bytes: int = 16777216
    image_pixels: int = 33554432
    image_tokens: int = field(default=0, metadata={"least": 0})

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ReadingError(f"device must be one of {', '.join(DEVICES)}, found {self.device!r}")
        if self.images and self.device != "cpu":
            raise ReadingError(f"images is {self.images} and device {self.device!r}: images are read on the CPU only")
        if self.image_pixels > MOST_PIXELS:
            raise ReadingError(f"image_pixels must be at most {MOST_PIXELS}, found {self.image_pixels}")
        super().__post_init__()


@dataclass(frozen=True)
class VllmLimits(CausalLimits):
    """Limits of a causal model that vLLM computes.

    Attributes:
        slots: answers that are generated at once: vLLM's `max_num_seqs`.
        kv_cache_mib: MiB for keys and values; 0: a share of the memory, vLLM's `gpu_memory_utilization`.
        prefix_reuse: whether a prompt reuses the tokens of its beginning that the cache already holds: vLLM's
            `enable_prefix_caching`.
        threads: of vLLM on a CPU.
    """


@dataclass(frozen=True)
class EncoderLimits:
    """Limits of a model that reads whole texts at once.

    Attributes:
        max_tokens: the longest input, special tokens included.
        max_bytes: the longest text that is tokenized at all.
        buckets: lengths that batches are padded to; `max_tokens` is always the last. (): 128 and 256, if shorter. Where
            the next is far, more are put between, so that a token beyond a bucket costs little: none is more than
            twice the one before, nor half as long again from 512 on.
        max_batch_size: texts in one run of the model.
        truncate: whether longer texts are cut where the request does not say.
        threads: ONNX Runtime's intra-op threads.
    """

    max_tokens: int = 256
    max_bytes: int = 262144
    buckets: tuple[int, ...] = ()
    max_batch_size: int = 32
    truncate: bool = False
    threads: int = 2

    def __post_init__(self) -> None:
        if list(self.buckets) != sorted(set(self.buckets)) or max(self.buckets, default=0) > self.max_tokens:
            raise ReadingError(f"buckets must rise to max_tokens ({self.max_tokens}) at most, found {self.buckets}")

    @property
    def all_buckets(self) -> tuple[int, ...]:
        """The buckets with `max_tokens` as the last."""
        named = (*(size for size in self.buckets or BUCKETS if size < self.max_tokens), self.max_tokens)
        found = [named[0]]
        for size in named[1:]:
            while size > found[-1] * (2 if found[-1] < _LONG else 1.5):
                found.append(found[-1] * 2 if found[-1] < BUCKETS[0] else found[-1] * 3 // 2)
            found.append(size)
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class EmbeddingLimits(EncoderLimits):
    """Limits of an embedding model.

    Attributes:
        dimensions: numbers in an embedding.
        matryoshka: shorter embeddings that a request may ask for: beginnings of the whole one.
    """

    dimensions: int
    matryoshka: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.matryoshka) != sorted(set(self.matryoshka)) or max(self.matryoshka, default=0) > self.dimensions:
            raise ReadingError(
                f"matryoshka must rise to dimensions ({self.dimensions}) at most, found {self.matryoshka}"
            )

    @property
    def answered(self) -> int:
        """Numbers in an answer; -1 where a request may ask for fewer."""
        return -1 if self.matryoshka else self.dimensions


@dataclass(frozen=True, kw_only=True)
class SparseLimits(EncoderLimits):
    """Limits of a model of sparse embeddings.

    Attributes:
        dimensions: tokens of the vocabulary, each of which may have a weight.
    """

    dimensions: int


@dataclass(frozen=True, kw_only=True)
class LabelLimits(EncoderLimits):
    """Limits of a classifier or a cross-encoder.

    Attributes:
        labels: numbers that the model gives for a text.
    """

    labels: int


@dataclass(frozen=True, kw_only=True)
class ZeroShotLimits(LabelLimits):
    """Limits of zero-shot classification.

    Attributes:
        labels: of the model of natural language inference: contradiction, neutral, entailment.
        max_batch_size: pairs of a text and a label in one request.
    """

    labels: int = 3


@dataclass(frozen=True, kw_only=True)
class EntityLimits(LabelLimits):
    """Limits of a token classifier.

    Attributes:
        aggregation: how tokens become entities where the request does not say.
    """

    aggregation: Aggregation = Aggregation.SIMPLE


@dataclass(frozen=True, kw_only=True)
class AnswerLimits(EncoderLimits):
    """Limits of extractive question answering.

    Attributes:
        max_tokens: of a window over the context, question included.
        stride: tokens that a window shares with the one before.
        max_batch_size: windows of one request.
    """

    max_tokens: int = 384
    stride: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride > self.max_tokens // 2:
            raise ReadingError(
                f"stride must be at most half of max_tokens ({self.max_tokens // 2}), found {self.stride}"
            )


@dataclass(frozen=True, kw_only=True)
class FillMaskLimits(EncoderLimits):
    """Limits of a masked language model.

    Attributes:
        top_k: tokens that a request can ask for.
    """

    top_k: int = 100


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """Limits of a model that reads images.

    Attributes:
        height: of the images that the graph reads, in pixels: what the model's image processor makes.
        width: of the same.
        max_bytes: the largest file that is decoded at all.
        max_pixels: the largest image, width times height.
        max_batch_size: images in one run of the model.
        threads: ONNX Runtime's intra-op threads.
    """

    height: int = 224
    width: int = 224
    max_bytes: int = 16777216
    max_pixels: int = 33554432
    max_batch_size: int = 16
    threads: int = 2

    def __post_init__(self) -> None:
        if self.max_pixels > MOST_PIXELS:
            raise ReadingError(f"max_pixels must be at most {MOST_PIXELS}, found {self.max_pixels}")


@dataclass(frozen=True, kw_only=True)
class ImageLabelLimits(ImageLimits):
    """Limits of a classifier of images.

    Attributes:
        labels: numbers that the model gives for an image.
    """

    labels: int


@dataclass(frozen=True, kw_only=True)
class ImageEmbeddingLimits(ImageLimits):
    """Limits of embeddings of images.

    Attributes:
        dimensions: numbers in an embedding.
    """

    dimensions: int


@dataclass(frozen=True, kw_only=True)
class ImageZeroShotLimits(ImageEmbeddingLimits):
    """Limits of zero-shot classification of images.

    Attributes:
        max_tokens: of a label's sentence, special tokens included.
        max_batch_size: images of one request, and labels.
    """

    max_tokens: int = 77
    max_batch_size: int = 32


@dataclass(frozen=True)
class Seq2SeqLimits:
    """Limits of an encoder-decoder model.

    Attributes:
        max_source_tokens: the longest source, special tokens included.
        max_target_tokens: the longest answer.
        default_max_tokens: length of an answer where neither request nor generation config says.
        slots: beams that decode at once.
        max_beams: the most beams of one search.
        max_windows: the most windows of one text.
        max_waiting: texts that may wait for slots.
        timeout: seconds that a request may take, waiting included; then it fails with DEADLINE_EXCEEDED. A request may
            ask for less.
        max_bytes: the longest text that is tokenized at all.
        long_input: what happens to longer texts where the request does not say: "error", "truncate" or "window".
        threads: ONNX Runtime's intra-op threads.
    """

    max_source_tokens: int = 512
    max_target_tokens: int = 256
    default_max_tokens: int = 128
    slots: int = 32
    max_beams: int = 8
    max_windows: int = 16
    max_waiting: int = 128
    timeout: int = 300
    max_bytes: int = 262144
    long_input: LongInput = LongInput.ERROR
    threads: int = 2

    def __post_init__(self) -> None:
        if self.max_beams > self.slots:
            raise ReadingError(
                f"max_beams ({type(self).max_beams} where it is not set) must be at most slots ({self.slots}), "
                f"found {self.max_beams}"
            )


@dataclass(frozen=True)
class SpeechLimits:
    """Limits of a model of speech recognition.

    Attributes:
        max_seconds: the longest recording.
        max_bytes: the longest file that is decoded at all.
        max_target_tokens: tokens of a window, those before the answer included; at most the decoder's positions.
        slots: beams that decode at once.
        max_beams: the most beams of one search.
        max_waiting: recordings that may wait to be read, and windows that may wait for slots.
        timeout: seconds that a request may take, waiting included; then it fails with DEADLINE_EXCEEDED. A request may
            ask for less.
        threads: ONNX Runtime's intra-op threads.
    """

    max_seconds: int = 1800
    max_bytes: int = 25165824
    max_target_tokens: int = 448
    slots: int = 8
    max_beams: int = 5
    max_waiting: int = 16
    timeout: int = 300
    threads: int = 2

    def __post_init__(self) -> None:
        if self.max_beams > self.slots:
            raise ReadingError(
                f"max_beams ({type(self).max_beams} where it is not set) must be at most slots ({self.slots}), "
                f"found {self.max_beams}"
            )
        if self.max_target_tokens < 8:
            raise ReadingError(f"max_target_tokens must be at least 8, found {self.max_target_tokens}")


@dataclass(frozen=True, kw_only=True)
class TemplateLimits:
    """A task in front of a generator, whose limits hold.

    Attributes:
        generator: the public name of the generator that answers.
        template: the message that it gets, in Jinja; see `trident_serving.templates.FIELDS` for what it may use.
        max_tokens: length of an answer where the request names none.
        max_waiting: requests that may be answered or wait at once.
        timeout: seconds that a request may take, waiting included; then it fails with DEADLINE_EXCEEDED. A request may
            ask for less.
        chat_template_kwargs: options of the generator's chat template for this task, such as
            `{ enable_thinking = false }`.
    """

    generator: str
    template: str
    max_tokens: int = 128
    max_waiting: int = 64
    timeout: int = 300
    chat_template_kwargs: JsonObject = NO_OPTIONS

    def __post_init__(self) -> None:
        check_options(self.chat_template_kwargs)


@dataclass(frozen=True, kw_only=True)
class ExplanationLimits:
    """Limits of explanations of a model.

    Attributes:
        max_runs: texts without one of their parts that the model reads for one request.
        max_waiting: requests that may be answered or wait at once; two are answered at a time.
        timeout: seconds that a request may take, waiting included; then it fails with DEADLINE_EXCEEDED. A request may
            ask for less.
    """

    max_runs: int = 512
    max_waiting: int = 16
    timeout: int = 300


Limits = GenerationLimits | VllmLimits | EncoderLimits | ImageLimits | Seq2SeqLimits | SpeechLimits | TemplateLimits
LIMITS: dict[str, type[Limits]] = {
    "text-generation": GenerationLimits,
    "translation": Seq2SeqLimits,
    "summarization": Seq2SeqLimits,
    "automatic-speech-recognition": SpeechLimits,
    "feature-extraction": EmbeddingLimits,
    "text-classification": LabelLimits,
    "token-classification": EntityLimits,
    "question-answering": AnswerLimits,
    "text-ranking": LabelLimits,
    "fill-mask": FillMaskLimits,
    "zero-shot-classification": ZeroShotLimits,
    "sparse-embedding": SparseLimits,
    "hybrid-embedding": EmbeddingLimits,
    "image-classification": ImageLabelLimits,
    "image-feature-extraction": ImageEmbeddingLimits,
    "zero-shot-image-classification": ImageZeroShotLimits,
}
