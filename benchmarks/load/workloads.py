"""What each task is asked, over each door, and how an answer becomes something that can be compared with `==`.

All doors ask the same, and get the same to the last bit: texts, and numbers of 32 bits.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from trident_client import AsyncClient

SENTENCE = "the server answers many questions about models that it holds in memory every day and every night"
WORDS = SENTENCE.split()
# Few, for a fast model that repeats them; a generator has more, see `prompts`.
TEXTS = 14
GENERATION: Literal["text-generation"] = "text-generation"
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Workload:
    """The requests of a model.

    Attributes:
        task: of the model.
        items: what is asked, one after the other; whoever has asked the last goes on with the first.
        call: asks our client.
        path: of the gateway's endpoint; "": it has none for this task.
        body: what is sent there, without the name of the model.
        read: the answer in what comes from there.
        tensors: the inputs, as perf_analyzer reads them.
    """

    task: str
    items: Sequence[Any]
    call: Callable[[AsyncClient, str, Any], Awaitable[Any]]
    path: str
    body: Callable[[Any], dict[str, Any]]
    read: Callable[[Json], Any]
    tensors: Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Generation:
    """The requests of a generator, whose answers are streamed.

    They take the likeliest token each time, so that an answer is the greedy one. `temperature` 1 with `top_k` 1 says
    so: the engine drafts requests with `temperature` 0 from other answers, and a load repeats its prompts, so it would
    measure the drafts.

    Attributes:
        items: the prompts.
        tokens: of each answer.
        greedy: `temperature` is 0.
    """

    items: Sequence[str]
    tokens: int
    greedy: bool = False
    task: Literal["text-generation"] = GENERATION

    def options(self) -> dict[str, Any]:
        """Fields of a request, by the names that the client, the gateway and the model share."""
        likeliest = {"temperature": 0.0} if self.greedy else {"temperature": 1.0, "top_k": 1}
        return {"max_tokens": self.tokens, "ignore_eos": True, **likeliest}

    def tensors(self, prompt: str) -> dict[str, Any]:
        """The inputs, as perf_analyzer reads them."""
        fields = {"text_input": prompt, "stream": True, **self.options()}
        return {name: [value] for name, value in fields.items()}


def prompts(slots: int, streams: int) -> list[str]:
    """So many that a slot has lost the content of a prompt before it comes again; no two begin alike."""
    count = slots + streams
    return [
        f"{number}: " + " ".join(WORDS[(number + place) % len(WORDS)] for place in range(24)) for number in range(count)
    ]


def candidates(task: str, parameters: Mapping[str, str], streams: int, tokens: int) -> list[Workload | Generation]:
    """The requests for a model of a task; the first that it accepts is taken. None for a task that is not known here.

    Args:
        parameters: of the model's config.
        streams: the most requests at a time.
        tokens: of an answer, where it is generated.
    """
    if task == GENERATION:
        return [Generation(prompts(int(parameters.get("slots", "8")), streams), tokens)]
    if task == "fill-mask":
        return [_fill_mask(mask) for mask in ("[MASK]", "<mask>")]
    made = _MAKERS.get(task)
    return [made(tokens)] if made else []


def _texts() -> list[str]:
    """Texts of 4 to 69 words."""
    return [" ".join((WORDS * 5)[place : place + 4 + 5 * place]) for place in range(TEXTS)]


def _number(value: float) -> float:
    """As the 32 bits that the server sends hold it; JSON may write it with more digits."""
    return float(np.float32(value))


def _embedding(tokens: int) -> Workload:
    async def call(client: AsyncClient, model: str, text: str) -> bytes:
        return (await client.embed(text, model=model, truncate=True)).tobytes()

    return Workload(
        "feature-extraction",
        _texts(),
        call,
        "/v1/embeddings",
        lambda text: {"input": text, "truncate": True},
        lambda answer: np.array(answer["data"][0]["embedding"], np.float32).tobytes(),
        _text_input,
    )


def _text_input(text: str) -> dict[str, Any]:
    return {"text_input": [text], "truncate": [True]}


def _of_shape(shape: list[int], **fields: list[Any]) -> dict[str, Any]:
    """Inputs of models that do not say how long theirs are."""
    return {name: {"content": content, "shape": shape} for name, content in fields.items()}


def _sparse(tokens: int) -> Workload:
    async def call(client: AsyncClient, model: str, text: str) -> Any:
        return await client.embed_sparse(text, model=model, truncate=True)

    return Workload("sparse-embedding", _texts(), call, "", _no_body, _no_answer, _text_input)


def _no_body(item: Any) -> dict[str, Any]:
    raise NotImplementedError


def _no_answer(answer: Json) -> Any:
    raise NotImplementedError


def _classification(tokens: int) -> Workload:
    async def call(client: AsyncClient, model: str, text: str) -> Any:
        (best,) = await client.classify(text, model=model, truncate=True)
        return best.label, best.score

    def read(answer: Json) -> Any:
        return answer["data"][0]["label"], _number(answer["data"][0]["score"])

    def body(text: str) -> dict[str, Any]:
        return {"input": text, "truncate": True}

    return Workload("text-classification", _texts(), call, "/v1/classify", body, read, _text_input)


LABELS = ["computers", "weather", "animals"]


def _zero_shot(tokens: int) -> Workload:
    async def call(client: AsyncClient, model: str, text: str) -> Any:
        found = await client.classify_zero_shot(text, LABELS, model=model, truncate=True)
        return [(each.label, each.score) for each in found]

    def read(answer: Json) -> Any:
        return [(each["label"], _number(each["score"])) for each in answer["data"][0]["predictions"]]

    def body(text: str) -> dict[str, Any]:
        return {"input": text, "labels": LABELS, "truncate": True}

    def tensors(text: str) -> dict[str, Any]:
        labels = _of_shape([len(LABELS)], candidate_labels=LABELS)
        return {**_of_shape([1], text_input=[text]), **labels, "truncate": [True]}

    return Workload("zero-shot-classification", _texts(), call, "/v1/classify", body, read, tensors)


def _entities(tokens: int) -> Workload:
    async def call(client: AsyncClient, model: str, text: str) -> Any:
        return [asdict(each) for each in await client.entities(text, model=model, truncate=True)]

    def read(answer: Json) -> Any:
        return [each | {"score": _number(each["score"])} for each in answer["data"][0]["entities"]]

    def body(text: str) -> dict[str, Any]:
        return {"input": text, "truncate": True}

    def tensors(text: str) -> dict[str, Any]:
        return _of_shape([1, 1], text_input=[text], truncate=[True])

    return Workload("token-classification", _texts(), call, "/v1/entities", body, read, tensors)


PASSAGES = 4  # of one request to a ranker


def _ranking(tokens: int) -> Workload:
    texts = _texts()
    items = [(texts[place][:60], texts[place : place + PASSAGES]) for place in range(TEXTS - PASSAGES)]

    async def call(client: AsyncClient, model: str, item: tuple[str, list[str]]) -> Any:
        return [(each.index, each.score) for each in await client.rank(*item, model=model, truncate=True)]

    def read(answer: Json) -> Any:
        return [(each["index"], _number(each["relevance_score"])) for each in answer["results"]]

    def body(item: tuple[str, list[str]]) -> dict[str, Any]:
        return {"query": item[0], "documents": item[1], "truncate": True, "return_documents": False}

    def tensors(item: tuple[str, list[str]]) -> dict[str, Any]:
        return {"query": [item[0]], **_text_input(item[1][0])}

    return Workload("text-ranking", items, call, "/v1/rerank", body, read, tensors)


def _translation(tokens: int) -> Workload:
    async def call(client: AsyncClient, model: str, text: str) -> str:
        return (await client.translate(text, model=model, max_tokens=tokens)).text

    def body(text: str) -> dict[str, Any]:
        return {"input": text, "max_tokens": tokens}

    def tensors(text: str) -> dict[str, Any]:
        return {"text_input": [text], "max_tokens": [tokens]}

    def read(answer: Json) -> str:
        text: str = answer["data"][0]["text"]
        return text

    return Workload("translation", _sentences(), call, "/v1/translate", body, read, tensors)


def _sentences() -> list[str]:
    return [" ".join((WORDS * 2)[place : place + 5 + place]) for place in range(TEXTS)]


def _summarization(tokens: int) -> Workload:
    async def call(client: AsyncClient, model: str, text: str) -> str:
        return (await client.summarize(text, model=model, max_tokens=tokens)).text

    def tensors(text: str) -> dict[str, Any]:
        return {"text_input": [text], "max_tokens": [tokens]}

    return Workload("summarization", _sentences(), call, "", _no_body, _no_answer, tensors)


def _question_answering(tokens: int) -> Workload:
    async def call(client: AsyncClient, model: str, text: str) -> Any:
        return await client.answer("What does it hold in memory?", text, model=model)

    def tensors(text: str) -> dict[str, Any]:
        return _of_shape([1], question=["What does it hold in memory?"], context=[text])

    return Workload("question-answering", _sentences(), call, "", _no_body, _no_answer, tensors)


def _fill_mask(mask: str) -> Workload:
    async def call(client: AsyncClient, model: str, text: str) -> Any:
        return await client.fill_mask(text, model=model)

    texts = [f"{text} {mask} ." for text in _sentences()]
    return Workload("fill-mask", texts, call, "", _no_body, _no_answer, _text_input)


_MAKERS: dict[str, Callable[[int], Workload]] = {
    "feature-extraction": _embedding,
    "hybrid-embedding": _embedding,
    "sparse-embedding": _sparse,
    "text-classification": _classification,
    "token-classification": _entities,
    "text-ranking": _ranking,
    "zero-shot-classification": _zero_shot,
    "translation": _translation,
    "summarization": _summarization,
    "question-answering": _question_answering,
}
