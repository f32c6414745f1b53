"""A run of transformers' Trainer: its checkpoints, its progress, its processes, and DeepSpeed.

One process is the usual case. Under torchrun or DeepSpeed's launcher each process runs the whole command on its share
of the examples; the first writes and says everything. The package deepspeed is imported only where a run asks for it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import socket
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from trident_export.errors import NoSpace, UsageError
from trident_export.huggingface.folder import HuggingFaceFolder

LOG_EVERY = 10
_SETTINGS = "settings.json"
_LARGEST_SEED = 2**32 - 1
_FREE = ("minutes", "save_every")  # these may change when a run goes on
# What a configuration leaves to the Trainer where it does not say it.
_AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def first() -> bool:
    """Whether this process is the first of its run, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_seed(seed: int) -> None:
    """Refuse a seed that numpy does not take.

    Raises:
        UsageError: it is below 0 or above 2³² - 1.
    """
    if not 0 <= seed <= _LARGEST_SEED:
        raise UsageError(f"--seed must be between 0 and {_LARGEST_SEED}, found {seed}")


def said_by_first(progress: Callable[[str], None]) -> Callable[[str], None]:
    """The same in the first process, silence in the others."""
    return progress if first() else lambda line: None


def described(source: HuggingFaceFolder, settings: Any, examples: Sequence[object], **more: str) -> dict[str, Any]:
    """What decides a run, so that another one does not go on from its checkpoints.

    Args:
        settings: a dataclass.
        examples: what is learned from.
    """
    digest = hashlib.sha256(repr(list(examples)).encode("utf-8", "surrogatepass")).hexdigest()[:16]
    settings = dataclasses.asdict(settings)
    return {**more, "source": source.path.name, **settings, "examples": digest, "processes": processes()}


def folder_of(output: Path) -> Path:
    """Where the checkpoints of a run lie until its output is written."""
    return output.with_name(f"{output.name}.training")


def begin(work: Path, asked: Mapping[str, Any]) -> None:
    """Make the folder of a run, or take up that of the same run; the first process does it.

    Raises:
        UsageError: the folder has the checkpoints of another run.
    """
    if not first():
        return
    check_same_run(work, asked)
    work.mkdir(parents=True, exist_ok=True)
    partial = work / f".{_SETTINGS}"
    partial.write_text(json.dumps(asked, indent=2) + "\n", encoding="utf-8")
    partial.replace(work / _SETTINGS)
    for path in _checkpoints(work):
        if not _complete(path):
            shutil.rmtree(path)


def check_same_run(work: Path, asked: Mapping[str, Any]) -> None:
    """Checkpoints that are there must be of a run with the same settings.

    Raises:
        UsageError: they are not, or what is there is no folder of a run.
    """
    file = work / _SETTINGS
    if not first():
        return
    if work.exists() and not work.is_dir():
        raise UsageError(f"{work} is no folder, and checkpoints go there: choose another --output, or remove it")
    if not file.exists() or last_checkpoint(work) is None:
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise UsageError(
            f"{work} holds checkpoints, and {file.name} beside them does not say of which run: choose another "
            "--output, or remove it"
        )
    different = [
        f"{key} was {before.get(key)!r}" for key in asked if before.get(key) != asked[key] and key not in _FREE
    ]
    if different:
        raise UsageError(
            f"{work} holds the checkpoints of another run ({', '.join(different)}): ask for the same, choose "
            "another --output, or remove it"
        )


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint that is complete."""
    complete = [path for path in _checkpoints(work) if _complete(path)]
    return str(complete[-1]) if complete else None


def _checkpoints(work: Path) -> list[Path]:
    numbered = [path for path in work.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name.rpartition("-")[2]))


def _complete(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: its state is written last, and no file was cut."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return isinstance(state, dict) and all(
            _whole_weights(path) if path.suffix == ".safetensors" else zipfile.is_zipfile(path)
            for path in checkpoint.rglob("*")
            if path.suffix in (".safetensors", ".pt", ".pth", ".bin")
        )
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return False


def _whole_weights(file: Path) -> bool:
    """Whether a file of safetensors has the size that its header says."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(min(size, file.stat().st_size)))
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return bool(file.stat().st_size == 8 + size + max(ends, default=0))


def check_room(model: PreTrainedModel, folder: Path) -> None:
    """Two checkpoints, each of weights and AdamW's two averages, and the model itself must fit.

    Raises:
        NoSpace: they don't.
    """
    wanted = 7 * sum(p.numel() * p.element_size() for p in model.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(folder).free
    if room < wanted:
        raise NoSpace(f"training needs {wanted / 2**20:.0f} MiB in {folder}, {room / 2**20:.0f} MiB are free")


def deepspeed_configuration(file: str) -> dict[str, Any] | None:
    """A DeepSpeed configuration, and what the Trainer fills in; None for "".

    Raises:
        UsageError: the package is missing, or the file is none.
    """
    if not file:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        raise UsageError(
            "--deepspeed needs the package deepspeed: docs/how-to/train-on-several-devices.md says how it is installed"
        )
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is no DeepSpeed configuration: {error}") from None
    zero = found.get("zero_optimization") if isinstance(found, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in (0, 1, 2, 3):
        raise UsageError(f"{file} is no DeepSpeed configuration: zero_optimization.stage must be 0, 1, 2 or 3")
    configuration: dict[str, Any] = {**dict.fromkeys(_AUTO, "auto"), **found}
    if zero["stage"] == 3:  # or the weights can't be had whole
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    return configuration


def arguments(work: Path, deepspeed: dict[str, Any] | None, **settings: Any) -> TrainingArguments:
    """Arguments of a Trainer that says nothing itself. Models must be loaded before, or ZeRO 3 cuts them up.

    Raises:
        UsageError: DeepSpeed's configuration contradicts the settings.
    """
    gpu = torch.cuda.is_available()
    if deepspeed is not None and "RANK" not in os.environ:  # DeepSpeed wants what a launcher gives
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        if deepspeed is not None:
            _prepare(deepspeed, gpu)
        made = TrainingArguments(
            output_dir=str(work),
            save_total_limit=1,
            logging_steps=LOG_EVERY,
            report_to=[],
            disable_tqdm=True,
            use_cpu=not gpu,
            dataloader_pin_memory=gpu,
            deepspeed=deepspeed,
            **settings,
        )
    except (ImportError, ValueError) as error:
        if deepspeed is None:
            raise
        raise UsageError(f"DeepSpeed's configuration can't be used: {error}") from None
    if deepspeed is not None and (different := made.hf_deepspeed_config.mismatches):
        said = ", ".join(line.removeprefix("- ds ").replace(" vs hf ", " where the command has ") for line in different)
        raise UsageError(f"DeepSpeed's configuration can't be used: {said}")
    return made


def _prepare(configuration: Mapping[str, Any], gpu: bool) -> None:
    """Import DeepSpeed, and check what it can't check later with a sentence."""
    import deepspeed.ops
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    DeepSpeedZeroConfig(**configuration["zero_optimization"])
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)  # standard output is for reports
    if not gpu:  # it would be compiled now, and only inference uses it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def whole(trainer: Trainer) -> PreTrainedModel | None:
    """The trained model with all its weights, on the CPU; None in every process but the first. All must call it."""
    model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
    if not trainer.is_deepspeed_enabled:
        found = model.eval().cpu() if first() else None
    else:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        unset_hf_deepspeed_config()  # or ZeRO 3 cuts up what is made next
        found = _remade(model, weights) if first() else None
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return found


def end() -> int:
    """The status of a command that has trained. A process of a group ends here.

    Threads of the group that outlive the interpreter ended it by signal 6 once in 14 runs, and with it the others.
    """
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    return 0


def _remade(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A model of the same configuration that DeepSpeed does not hold."""
    made = type(model)(model.config)
    made.load_state_dict(weights)
    made.tie_weights()
    if made.can_generate():
        made.generation_config = model.generation_config
    return made.eval()


def agreed(value: float, device: torch.device) -> float:
    """The first process's value, in all."""
    if processes() == 1:
        return value
    told = torch.tensor([value], dtype=torch.float32, device=device)
    torch.distributed.broadcast(told, 0)
    return float(told)


class Progress(TrainerCallback):
    """Says how far training is, and the loss: the mean of the steps since it was said last, over all processes."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = said_by_first(say)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """A line."""
        if logs and "loss" in logs:
            self._say(f"step {state.global_step} of {state.max_steps}{self.detail(state)}, loss {logs['loss']:.5g}")

    def detail(self, state: TrainerState) -> str:
        """What else is worth a word."""
        return ""
