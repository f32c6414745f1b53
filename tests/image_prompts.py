"""What tests of prompts with images share: two tiny models behind one server, and requests to them.

`vlm` is of SmolVLM's class, `qwen` of Qwen2.5-VL's.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests import tiny_models
from trident_export import install, models_file

ANSWER = 12  # tokens
LIMITS = {"context": 512, "slots": 4, "prefill_chunk": 48, "default_max_tokens": ANSWER, "threads": 1, "images": 3}


def table(folder: Path, *variants: str, **limits: Any) -> dict[str, Any]:
    """Of models.toml."""
    return {
        "task": "text-generation",
        "source": {"path": str(folder)},
        "variants": list(variants or ["fp32"]),
        "limits": LIMITS | limits,
        # Random weights have likeliest tokens that are little likelier than others.
        "gates": {name: {"top1": 0.5 if "int4" in name else 0.9} for name in variants if name != "fp32"},
    }


def export_models(root: Path) -> Path:
    """Both models, from folders of their names; the repository."""
    folders = {"vlm": tiny_models.make_vlm(root / "vlm"), "qwen": tiny_models.make_qwen_vl(root / "qwen")}
    tables = {"vlm": table(folders["vlm"], "fp32", "int8"), "qwen": table(folders["qwen"], "fp32", "int8")}
    tables["qwen"]["limits"]["prefill_chunk"] = 16  # fewer than an image has
    specs = [models_file.parse(name, each) for name, each in tables.items()]
    install.export(specs, root / "repository", root, root / "cache", lambda message: None)
    return root / "repository"


def message(*parts: str | None) -> dict[str, Any]:
    """A message of the user; None is an image."""
    said = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": said}


def url(content: bytes, kind: str = "image/png") -> str:
    """A data URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


class Channel:
    """Takes the one response of a request."""

    def __init__(self) -> None:
        self.done = threading.Event()
        self.chunk: Any = None

    def send(self, chunk: Any) -> None:
        self.chunk = chunk
        self.done.set()

    def fail(self, error: Exception) -> None:
        self.send(error)

    def is_cancelled(self) -> bool:
        return False


def compare(
    conversations: Sequence[tuple[Any, Sequence[bytes]]],
    expected: Callable[[Any, Sequence[bytes]], tuple[list[int], list[int]]],
    asked: Callable[[Any, Sequence[bytes]], Any],
) -> None:
    """Prompts and answers are those of `generate`, token for token, and no two answers are the same.

    Args:
        conversations: messages and their images.
        expected: gives the tokens of a prompt and of its answer.
        asked: gives the answer of the server.
    """
    answers = set()
    for messages, files in conversations:
        prompt, answer = expected(messages, files)
        found = asked(messages, files)
        assert list(found.prompt_token_ids) == prompt
        assert list(found.token_ids) == answer
        answers.add(tuple(answer))
    assert len(answers) == len(conversations)
