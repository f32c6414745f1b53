"""Distillation: a smaller student learns to answer as its teacher, by transformers' Trainer on accelerate.

The student starts from the teacher's layers and is trained on two things: the teacher's distribution, softened by a
temperature (Hinton et al. 2015), and its hidden states: each of the student's layers learns to give what the next one
read in the teacher, and so to do the work of those that are gone. A run that was cut off goes on from its last
checkpoint when it is started again.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from trident_export import corpora
from trident_export.compression import layouts, models, pruning
from trident_export.errors import TextError, UsageError
from trident_export.huggingface.folder import HuggingFaceFolder
from trident_export.models_file import ModelSpec
from trident_export.training import run

Row = dict[str, float]
Run = dict[str, torch.Tensor]

# Of the text, what the student never sees and is evaluated on: every twentieth chunk, at most 32.
HELD_OUT_EVERY = 20
HELD_OUT_MOST = 32
_WARM_UP = 20


@dataclass(frozen=True)
class Settings:
    """How the student is trained.

    Attributes:
        steps: of the optimizer; 0: once through the text.
        minutes: after which training ends, whatever is left; 0: no limit. The learning rate falls to nothing by then.
        batch_size: texts or chunks in a step, of each process.
        length: tokens in a chunk.
        learning_rate: of AdamW, at its highest.
        temperature: by which both distributions are softened.
        hidden_weight: of the hidden states; the distribution has 1.
        save_every: steps between checkpoints.
        seed: of the order of the text.
        deepspeed: a DeepSpeed configuration file; "": none.
    """

    steps: int = 0
    minutes: float = 0.0
    batch_size: int = 8
    length: int = 128
    learning_rate: float = 2e-4
    temperature: float = 2.0
    hidden_weight: float = 1.0
    save_every: int = 200
    seed: int = 0
    deepspeed: str = ""

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "learning_rate", "temperature", "save_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} must be above 0, found {getattr(self, name)}")
        for name in ("steps", "minutes", "hidden_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} must not be negative, found {getattr(self, name)}")
        run.check_seed(self.seed)


def make_student(
    spec: ModelSpec, source: HuggingFaceFolder, student: str, calibration: str = ""
) -> tuple[PreTrainedModel, list[int]]:
    """A student that starts from its teacher, and the teacher's layer that each of its layers comes from.

    Args:
        student: the number of layers to keep (those that change their input's direction most); a Hugging Face folder,
            for example of a pruned model; or a config.json, whose matrices begin with what fits of the teacher's.
        calibration: text by which layers are chosen; "": the packaged texts.

    Raises:
        UsageError: it is none of these, or has more layers than the teacher.
    """
    teacher = models.load(spec, source)
    total = len(layouts.layers_of(teacher))
    if student.isdecimal():
        count = int(student)
        if not 0 < count < total:
            raise UsageError(f"a student has fewer layers than its teacher, 1 to {total - 1}: found {count}")
        runs = models.tokenize(source, corpora.calibration(calibration, samples=64, seed=0))
        with torch.no_grad():
            influence = pruning.layer_influence(teacher, runs)
        kept = sorted(influence.argsort(descending=True)[:count].tolist())
        pruning.keep_layers(teacher, kept)
        return teacher, kept
    check_student(student)
    path = Path(student)
    config = HuggingFaceFolder(path).config
    if config.model_type != teacher.config.model_type or config.vocab_size != teacher.config.vocab_size:
        raise UsageError(
            f"{path} is a {config.model_type} of {config.vocab_size} tokens, the teacher a {teacher.config.model_type} "
            f"of {teacher.config.vocab_size}: both must be of one kind and vocabulary"
        )
    if path.is_dir() and list(path.glob("*.safetensors")):
        made = models.load(spec, HuggingFaceFolder(path))
        return made, spread(len(layouts.layers_of(made)), total)
    torch.manual_seed(0)
    made = type(teacher)(config).eval()
    origin = spread(len(layouts.layers_of(made)), total)
    begin_like(made, teacher, origin)
    return made, origin


def check_student(student: str) -> None:
    """Check what can be checked of a student without its teacher; see `make_student`.

    Raises:
        UsageError: it is no number of layers, no Hugging Face folder and no config.json.
    """
    path = Path(student)
    if student.isdecimal() and int(student) > 0:
        return
    if not path.exists() or (path.is_dir() and not (path / "config.json").is_file()):
        raise UsageError(f"a student is a number of layers, a Hugging Face folder or a config.json: found {student!r}")


def spread(count: int, total: int) -> list[int]:
    """Layers of a teacher for a student's, evenly, the last for the last.

    Raises:
        UsageError: the student has more.
    """
    if count > total:
        raise UsageError(f"the student has {count} layers, its teacher {total}")
    return [math.ceil((layer + 1) * total / count) - 1 for layer in range(count)]


def begin_like(student: PreTrainedModel, teacher: PreTrainedModel, origin: Sequence[int]) -> None:
    """Copy the teacher's weights into the student's, as far as both reach."""
    prefix = next(name for name, module in teacher.named_modules() if module is layouts.layers_of(teacher))
    weights = dict(teacher.named_parameters())
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            given = name
            if name.startswith(f"{prefix}."):
                layer, _, rest = name.removeprefix(f"{prefix}.").partition(".")
                given = f"{prefix}.{origin[int(layer)]}.{rest}"
            found = weights.get(given)
            if found is None or found.dim() != parameter.dim():
                continue
            shared = tuple(slice(min(a, b)) for a, b in zip(parameter.shape, found.shape, strict=True))
            parameter[shared] = found[shared]


def distill(
    spec: ModelSpec,
    source: HuggingFaceFolder,
    student: str,
    texts: Sequence[str],
    output: Path,
    settings: Settings,
    progress: Callable[[str], None],
    calibration: str = "",
) -> dict[str, Row]:
    """Train a student and write its Hugging Face folder.

    Args:
        student: see `make_student`.
        texts: to learn from; some are held out to evaluate with.
        output: of the folder; checkpoints lie in `<output>.training` until it is done.
        calibration: see `make_student`.

    Returns:
        Measures of the teacher and of the student before and after, on the text that was held out; nothing in every
        process but the first.

    Raises:
        TextError, UsageError: the student or the text is impossible, or checkpoints of another run are there.
        NoSpace: the disk has no room for the student.
    """
    work, deepspeed = run.folder_of(output), run.deepspeed_configuration(settings.deepspeed)
    progress = run.said_by_first(progress)
    asked = run.described(source, settings, texts, student=student)
    run.check_same_run(work, asked)
    models.check_output(output)
    tokenizer: PreTrainedTokenizerBase = source.tokenizer
    data = chunks(spec, tokenizer, texts, settings.length)
    held_out = data[::HELD_OUT_EVERY][:HELD_OUT_MOST]
    seen = [run for n, run in enumerate(data) if n % HELD_OUT_EVERY or n // HELD_OUT_EVERY >= HELD_OUT_MOST]
    taken = settings.batch_size * run.processes()
    if len(seen) < taken:
        raise TextError(
            f"the text gives {len(seen)} chunks of {settings.length} tokens, one step takes {taken}: "
            "give more text, or lower --length or --batch-size"
        )
    teacher = models.load(spec, source)
    pupil, origin = make_student(spec, source, student, calibration)
    report = {}
    if run.first():
        run.check_room(pupil, output.parent)
        report = {"teacher": score(teacher, teacher, held_out), "before": score(pupil, teacher, held_out)}
        progress(f"teacher: {_shown(report['teacher'])}; student before: {_shown(report['before'])}")
    steps = settings.steps or len(seen) // taken
    trainer = _Distiller(pupil, teacher, origin, seen, tokenizer, work, settings, deepspeed, steps, progress)
    run.begin(work, asked)
    trainer.train(resume_from_checkpoint=run.last_checkpoint(work))
    trained = run.whole(trainer)
    if trained is None:
        return {}
    report["after"] = score(trained, teacher.cpu(), held_out)
    progress(f"student after {trainer.state.global_step} steps: {_shown(report['after'])}")
    report["after"]["steps"] = float(trainer.state.global_step)
    models.save(trained, source, output)
    shutil.rmtree(work, ignore_errors=True)
    return report


def chunks(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> list[Run]:
    """Runs of the model: of a decoder, chunks of `length` tokens of the running text; of an encoder, a text each."""
    if not spec.generation:
        found = [tokenizer(text, truncation=True, max_length=length, return_tensors="pt") for text in texts]
        return [{name: rows[0] for name, rows in run.items()} for run in found]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    stream = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False).input_ids, *end]]
    starts = range(0, len(stream) - length + 1, length)
    return [{"input_ids": torch.tensor(stream[start : start + length])} for start in starts]


def score(model: PreTrainedModel, teacher: PreTrainedModel, runs: Sequence[Run]) -> Row:
    """`kl` to the teacher's distribution (nats; 1 - cosine of hidden states where there is none), and `perplexity`."""
    divergence, surprise, count, predicted = 0.0, 0.0, 0, 0
    with torch.inference_mode():
        for run in runs:
            batch = {name: rows[None] for name, rows in run.items()}
            found, expected = model(**batch), teacher(**batch)
            rows = _distributions(found), _distributions(expected)
            if not rows[0]:
                states = found.last_hidden_state, expected.last_hidden_state
                divergence += float(1 - torch.cosine_similarity(*states, dim=-1).mean())
                count += 1
                continue
            for p, q in zip(rows[1], rows[0], strict=True):
                log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
                parts = (log_p.exp() * (log_p - log_q)).sum(-1)
                divergence += float(parts.sum())
                count += parts.numel()
            if _is_causal(model):
                ids = batch["input_ids"][:, 1:]
                chosen = rows[0][0].log_softmax(-1)[:, :-1].gather(-1, ids[..., None])
                surprise -= float(chosen.sum())
                predicted += ids.numel()
    measured = {"kl": divergence / max(1, count)}
    return measured | ({"perplexity": math.exp(surprise / predicted)} if predicted else {})


def write(title: str, report: Mapping[str, Row], folder: Path) -> str:
    """Write distill.md and distill.json; returns the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in report.values() for name in row))
    lines = [f"## {title}", "", "| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    for who, row in report.items():
        shown = [f"{row[name]:.4g}" if name in row else "" for name in names]
        lines.append(f"| {who} | " + " | ".join(shown) + " |")
    table = "\n".join(lines) + "\n"
    (folder / "distill.md").write_text(table, encoding="utf-8")
    (folder / "distill.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return table


def soft_divergence(found: torch.Tensor, expected: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL of the teacher's distribution and the student's, both softened, times the temperature's square; a row each."""
    log_p = functional.log_softmax(expected / temperature, dim=-1)
    log_q = functional.log_softmax(found / temperature, dim=-1)
    return temperature**2 * functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def state_distance(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The squared distance of hidden states as a share of the teacher's squared length; a token each.

    By token, because some tokens' states are a thousand times longer than others'.
    """
    return (found - expected).square().sum(-1) / expected.square().sum(-1).clamp_min(1e-6)


def targets(origin: Sequence[int], total: int) -> list[int]:
    """The teacher's layer whose output each of a student's layers learns to give: what the next one is used to read."""
    return [layer - 1 for layer in origin[1:]] + [total - 1]


class _Distiller(Trainer):
    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        origin: Sequence[int],
        data: Sequence[Run],
        tokenizer: PreTrainedTokenizerBase,
        work: Path,
        settings: Settings,
        deepspeed: dict[str, Any] | None,
        steps: int,
        progress: Callable[[str], None],
    ) -> None:
        arguments = run.arguments(
            work,
            deepspeed,
            max_steps=steps,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            save_steps=settings.save_every,
            seed=settings.seed,
            data_seed=settings.seed,
            remove_unused_columns=False,
        )
        self._settings, self._steps, self._origin = settings, steps, list(origin)
        self._watch = _Watch(settings, steps, progress)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        super().__init__(
            model=student.train(),
            args=arguments,
            train_dataset=_Runs(data),
            data_collator=DataCollatorWithPadding(tokenizer),
            callbacks=[self._watch],
        )
        self.remove_callback(PrinterCallback)  # its figures would go between the report's
        self._teacher = teacher.eval().to(arguments.device)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Up in a few steps, then down to nothing by the last step or minute, whichever comes first."""

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / _WARM_UP) * max(0.0, 1 - self._watch.share(step))

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def compute_loss(
        self, model: nn.Module, inputs: Mapping[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """The distribution and the hidden states; the last of these is all where a model has no distribution."""
        with torch.no_grad():
            expected = self._teacher(**inputs, output_hidden_states=True)
        found = model(**inputs, output_hidden_states=True)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        loss = torch.zeros((), device=mask.device)
        for mine, theirs in zip(_distributions(found), _distributions(expected), strict=True):
            parts = soft_divergence(mine, theirs, self._settings.temperature)
            loss = loss + (parts[mask] if parts.shape == mask.shape else parts).mean()
        pairs = [
            (found.hidden_states[own + 1], expected.hidden_states[layer + 1])
            for own, layer in enumerate(targets(self._origin, len(expected.hidden_states) - 1))
        ]
        if pairs[0][0].shape == pairs[0][1].shape:
            states = torch.stack([state_distance(mine, theirs)[mask].mean() for mine, theirs in pairs]).mean()
            loss = loss + self._settings.hidden_weight * states
        return (loss, found) if return_outputs else loss


class _Watch(run.Progress):
    """Says how far training is, and ends it when its time is over."""

    def __init__(self, settings: Settings, steps: int, progress: Callable[[str], None]) -> None:
        super().__init__(progress)
        self._settings, self._steps, self._progress = settings, steps, progress
        self._started = time.monotonic()
        self._first = 0
        self._minutes = 0.0  # since it began, by the first process's clock: all must end at the same step

    def share(self, step: int) -> float:
        """How much is done, of the steps or of the time."""
        return max(step / self._steps, self._minutes / self._settings.minutes if self._settings.minutes else 0.0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The clock starts."""
        self._started, self._first = time.monotonic(), state.global_step
        if self._first:
            self._progress(f"goes on behind step {self._first}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The end."""
        self._minutes = (time.monotonic() - self._started) / 60
        if self._settings.minutes:
            self._minutes = run.agreed(self._minutes, args.device)
            control.should_training_stop |= self._minutes >= self._settings.minutes

    def detail(self, state: TrainerState) -> str:
        """The pace and the clock."""
        pace = (state.global_step - self._first) / max(1e-9, 60 * self._minutes)
        limit = f" of {self._settings.minutes:g}" if self._settings.minutes else ""
        return f", {pace:.2f} steps/s, {self._minutes:.1f}{limit} min"


class _Runs(torch.utils.data.Dataset[Run]):
    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = runs

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, index: int) -> Run:
        return self._runs[index]


def _distributions(output: Any) -> list[torch.Tensor]:
    """Logits of a model's output, [..., classes] each; none where it has only hidden states."""
    names = ("logits", "start_logits", "end_logits")
    found = [getattr(output, name, None) for name in names]
    return [logits.float() for logits in found if logits is not None]


def _is_causal(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _shown(row: Row) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items())
