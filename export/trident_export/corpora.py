"""The texts that the gate, the evaluation and calibration read: packaged ones, see corpus/README.md, or a user's file.

What calibrates a variant is never what the variant is measured with.
"""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np

from trident_export.errors import TextError


def held_out() -> list[str]:
    """Prose in several languages, verse and code, which nothing is calibrated on."""
    return _texts("")


def calibration(file: str, samples: int, seed: int) -> list[str]:
    """Some texts to calibrate with, drawn by a seed.

    Args:
        file: of representative text, its paragraphs parted by blank lines; "": the packaged texts.
        samples: how many; all of them where there are fewer.

    Raises:
        TextError: the file has no text.
    """
    found = read(Path(file)) if file else _texts("calibration")
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[place] for place in order[:samples]]


def passages() -> list[str]:
    """Short passages on many subjects, for a measure of retrieval."""
    return _texts("retrieval", "passages.txt")


def questions() -> list[str]:
    """Questions that some of the passages answer."""
    return _texts("retrieval", "questions.txt")


def sentences() -> list[str]:
    """English sentences that are said to speech models."""
    return _texts("speech", "sentences.txt")


def read(file: Path) -> list[str]:
    """Paragraphs of a user's file.

    Raises:
        TextError: it can't be read as UTF-8 or has no text.
    """
    try:
        found = _paragraphs(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TextError(f"{file} can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise TextError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    if not found:
        raise TextError(f"{file} has no text: it needs paragraphs, parted by blank lines")
    return found


def _texts(folder: str, only: str = "") -> list[str]:
    root: Traversable = resources.files("trident_export") / "corpus"
    root = root / folder if folder else root
    files = sorted((file for file in root.iterdir() if file.name.endswith(".txt")), key=lambda file: file.name)
    chosen = [file for file in files if only in ("", file.name)]
    return [block for file in chosen for block in _paragraphs(file.read_text(encoding="utf-8"))]


def _paragraphs(text: str) -> list[str]:
    return [block.strip("\n") for block in text.split("\n\n") if block.strip()]
