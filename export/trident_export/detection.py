"""Whether a text carries the watermark of a model: `trident-export detect`."""

from __future__ import annotations

import json
from pathlib import Path

from trident_export.errors import TextError, UsageError
from trident_serving.artefacts import VERSION
from trident_serving.errors import InvalidRequest
from trident_serving.runtime.sampling.watermark import Detection, Watermark, detect
from trident_serving.runtime.tokenizer import TextTokenizer


def examine(model: Path, text: str, settings: dict[str, float | int], *, unique: bool) -> Detection:
    """Look for a watermark in a text.

    Args:
        model: the folder of a generator's variant in a repository.
        settings: of the watermark; see `Watermark.from_config`.
        unique: see `detect`.

    Raises:
        UsageError: the model is not exported, or a setting is impossible.
        TextError: the text is too short.
    """
    folder = model / VERSION
    if not (folder / "model.onnx").is_file() or not (folder / "tokenizer.json").is_file():
        raise UsageError(f"{model.name} is no exported text generator")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config.get("vocab_size") or config["text_config"]["vocab_size"]
    try:
        watermark = Watermark.from_config(settings, size)
    except InvalidRequest as error:
        raise UsageError(str(error)) from None
    tokens = TextTokenizer.load(folder).encode(text, add_special_tokens=False)
    try:
        return detect(tokens, watermark, unique=unique)
    except InvalidRequest as error:
        raise TextError(str(error)) from None
