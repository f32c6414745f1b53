"""A head for a task on an encoder that has none, by transformers' Trainer.

Every weight is trained, the encoder's too. Every fifth example is held out: the model never learns from it, and is
measured on it. A run that was cut off goes on from its last checkpoint when it is started again.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    set_seed,
)

from trident_export.compression import models
from trident_export.errors import TextError, UsageError
from trident_export.evaluation import measures
from trident_export.huggingface.folder import HuggingFaceFolder, reading
from trident_export.training import run
from trident_export.training.examples import Labelled, Question

HELD_OUT_EVERY = 5
FEWEST = 2 * HELD_OUT_EVERY
_WARM_UP = 10
# What says that the folder is an embedder's.
_SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_*_config.json", "[0-9]_*")
Run = dict[str, Any]
Row = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """How a head is trained.

    Attributes:
        epochs: how often each example is seen.
        batch_size: examples in a step, of each process.
        length: tokens of an example at most, special ones included; more are cut, of a question's context.
        learning_rate: of AdamW, at its highest.
        save_every: steps between checkpoints.
        seed: of the head's first weights and the order of the examples.
        deepspeed: a DeepSpeed configuration file; "": none.
    """

    epochs: float = 3.0
    batch_size: int = 16
    length: int = 128
    learning_rate: float = 1e-4
    save_every: int = 200
    seed: int = 0
    deepspeed: str = ""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "length", "learning_rate", "save_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} must be above 0, found {getattr(self, name)}")
        run.check_seed(self.seed)


@dataclass(frozen=True)
class Trained:
    """What came out.

    Attributes:
        measures: of the examples that were held out, by `evaluation.measures`: `accuracy` and `macro_f1`, or SQuAD's
            `exact_match` and `f1`.
        held_out: how many these are.
        labels: of a classifier; 0 for others.
    """

    measures: Row
    held_out: int
    labels: int = 0


def train(
    task: str,
    source: HuggingFaceFolder,
    examples: Sequence[Labelled] | Sequence[Question],
    output: Path,
    settings: Settings,
    progress: Callable[[str], None],
) -> Trained | None:
    """Train a head on an encoder, the encoder too, and write the Hugging Face folder.

    Args:
        task: "text-classification", whose examples are `Labelled`, or "question-answering", whose are questions.
        output: of the folder; checkpoints lie in `<output>.training` until it is done.

    Returns:
        What came out; None in every process but the first.

    Raises:
        TextError: there are too few examples, a class has none to learn from, or a question leaves no room for its
            context.
        UsageError: the length is impossible for the model, checkpoints of another run are there, or DeepSpeed's
            configuration can't be used.
        UnsupportedArchitecture: the model has no such head.
        NoSpace, NotWritable: the folder can't be written.
    """
    work, deepspeed = run.folder_of(output), run.deepspeed_configuration(settings.deepspeed)
    asked = run.described(source, settings, examples, task=task)
    run.check_same_run(work, asked)
    models.check_output(output)
    if len(examples) < FEWEST:
        raise TextError(f"there are {len(examples)} examples, and {FEWEST} are the fewest: give more")
    learned = [example for number, example in enumerate(examples) if (number + 1) % HELD_OUT_EVERY]
    held_out = examples[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    made: _Classifier | _Answerer = (_Classifier if task == "text-classification" else _Answerer)(
        source, examples, settings
    )
    made.check(learned)
    _check_length(source, settings, examples)
    if run.first():
        run.check_room(made.model, output.parent)
    trainer = _trainer(made, [made.run(example) for example in learned], work, settings, deepspeed, progress)
    run.begin(work, asked)
    trainer.train(resume_from_checkpoint=run.last_checkpoint(work))
    trained = run.whole(trainer)
    if trained is None:
        return None
    made.model = trained
    with torch.inference_mode():
        figures = made.measure(held_out)
    _save(trained, source, output)
    shutil.rmtree(work, ignore_errors=True)
    return Trained(figures, len(held_out), len(getattr(made, "labels", ())))


def _check_length(
    source: HuggingFaceFolder, settings: Settings, examples: Sequence[Labelled] | Sequence[Question]
) -> None:
    """Refuse examples that can't be cut to the length, and a length that the model has no positions for."""
    tokenizer, length, most = source.tokenizer, settings.length, source.positions
    if most is not None and length > most:
        raise UsageError(f"--length is {length}, and {source} takes {most} tokens at most")
    pair = any(isinstance(example, Question) for example in examples)
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if length <= special:
        raise UsageError(f"--length is {length}, and {special} of that are special tokens: raise it")
    for number, example in enumerate(examples, start=1):
        if not isinstance(example, Question):
            continue
        count = len(tokenizer(example.question, add_special_tokens=False).input_ids)
        if count + special >= length:
            raise TextError(
                f"the question of example {number} has {count} tokens, which leaves none of --length {length} for its "
                f"context ({special} are special tokens): shorten it, or raise --length"
            )


class _Classifier:
    def __init__(self, source: HuggingFaceFolder, examples: Sequence[Any], settings: Settings) -> None:
        self.labels = sorted({example.label for example in examples})
        names = dict(enumerate(self.labels))
        config = {"num_labels": len(names), "id2label": names, "label2id": {name: i for i, name in names.items()}}
        self.model = _begun(source, AutoModelForSequenceClassification, settings, **config)
        self.tokenizer, self._length = source.tokenizer, settings.length

    def check(self, learned: Sequence[Any]) -> None:
        seen = {example.label for example in learned}
        if len(self.labels) < 2:
            raise TextError(f"all examples are of the class {self.labels[0]!r}: give examples of two or more")
        if missing := sorted(set(self.labels) - seen):
            raise TextError(
                f"the class {missing[0]!r} has examples to measure with and none to learn from: give more of it"
            )

    def run(self, example: Any) -> Run:
        return {**self._tokenize(example), "labels": self.labels.index(example.label)}

    def measure(self, held_out: Sequence[Any]) -> Row:
        batches = [self._tokenize(example, return_tensors="pt") for example in held_out]
        found = [self.labels[int(self.model(**batch).logits.argmax())] for batch in batches]
        return _figures(measures.labels([example.label for example in held_out], found))

    def _tokenize(self, example: Any, **options: Any) -> Any:
        return self.tokenizer(example.text, truncation=True, max_length=self._length, **options)


class _Answerer:
    def __init__(self, source: HuggingFaceFolder, examples: Sequence[Any], settings: Settings) -> None:
        self.model = _begun(source, AutoModelForQuestionAnswering, settings)
        self.tokenizer, self._length = source.fast_tokenizer, settings.length

    def check(self, learned: Sequence[Any]) -> None:
        """Any examples will do."""

    def run(self, example: Any) -> Run:
        found = self._tokenize(example)
        first, last = tokens_of(example, found.pop("offset_mapping"), found.sequence_ids())
        return {**found, "start_positions": first, "end_positions": last}

    def measure(self, held_out: Sequence[Any]) -> Row:
        answers = []
        for example in held_out:
            batch = self._tokenize(example, return_tensors="pt")
            offsets, parts = batch.pop("offset_mapping")[0].tolist(), batch.sequence_ids()
            found = self.model(**batch)
            first, last = best_span(found.start_logits[0], found.end_logits[0], [part == 1 for part in parts])
            answers.append(example.context[offsets[first][0] : offsets[last][1]] if first else "")
        references = [[example.context[example.start : example.end]] for example in held_out]
        return _figures(measures.spans_of_text(references, answers))

    def _tokenize(self, example: Any, **options: Any) -> Any:
        options |= {"truncation": "only_second", "max_length": self._length, "return_offsets_mapping": True}
        return self.tokenizer(example.question, example.context, **options)


def _figures(found: Sequence[measures.Measure]) -> Row:
    return {measure.name: measure.value for measure in found}


def best_span(start: torch.Tensor, end: torch.Tensor, allowed: Sequence[bool]) -> tuple[int, int]:
    """First and last token of the likeliest answer, within the context; (0, 0) where none is likelier."""
    count = len(allowed)
    scores = start[:, None] + end[None]
    inside = torch.tensor(allowed)
    possible = (inside[:, None] & inside[None]).triu()
    possible[0, 0] = True
    first, last = divmod(int(scores.masked_fill(~possible, -torch.inf).argmax()), count)
    return first, last


def tokens_of(example: Question, offsets: Sequence[tuple[int, int]], parts: Sequence[int | None]) -> tuple[int, int]:
    """First and last token of an answer; (0, 0), the first special token, where it has none or was cut."""
    if example.end == example.start:
        return 0, 0
    held = [
        index
        for index, ((start, end), part) in enumerate(zip(offsets, parts, strict=True))
        if part == 1 and start < example.end and end > example.start
    ]
    whole = held and offsets[held[-1]][1] >= example.end
    return (held[0], held[-1]) if whole else (0, 0)


def _begun(source: HuggingFaceFolder, head: Any, settings: Settings, **config: Any) -> PreTrainedModel:
    source.check_head(head)
    set_seed(settings.seed)
    with reading(source.path, "the weights"):
        found: PreTrainedModel = head.from_pretrained(source.path, dtype=torch.float32, **config)
    return found


class _Runs(Dataset[Run]):
    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, index: int) -> Run:
        return self._runs[index]


def _trainer(
    made: _Classifier | _Answerer,
    runs: Sequence[Run],
    work: Path,
    settings: Settings,
    deepspeed: dict[str, Any] | None,
    progress: Callable[[str], None],
) -> Trainer:
    arguments = run.arguments(
        work,
        deepspeed,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=_WARM_UP,
        save_steps=settings.save_every,
        seed=settings.seed,
        data_seed=settings.seed,
    )
    trainer = Trainer(
        model=made.model.train(),
        args=arguments,
        train_dataset=_Runs(runs),
        data_collator=DataCollatorWithPadding(made.tokenizer),
        callbacks=[run.Progress(progress)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _save(model: PreTrainedModel, source: HuggingFaceFolder, output: Path) -> None:
    models.save(model, source, output)
    for pattern in _SENTENCE_FILES:
        for path in output.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def table(task: str, name: str, folder: Path, length: int, labels: int) -> str:
    """A table of models.toml for the trained model."""
    own = f"labels = {labels}, " if task == "text-classification" else f"stride = {length // 4}, "
    limits = f"{{ {own}max_tokens = {length} }}"
    return models.begin_of_table(name, task, folder) + f'variants = ["fp32", "int8"]\nlimits = {limits}\n'


def shown(row: Mapping[str, float]) -> str:
    """Measures as a line."""
    return ", ".join(f"{name} {value:.3f}" for name, value in row.items())
