"""English sentences that espeak-ng says: what a speech model hears of them, in wrong words.

The voice is a synthetic one, which is hard to hear: the figure tells variants apart, and little of people's voices.
espeak-ng is a program beside this package. Where it is not installed, nothing is measured.
"""

from __future__ import annotations

import shutil
import subprocess
import unicodedata
from collections.abc import Sequence

from trident_export import corpora

PROGRAM = "espeak-ng"


def installed() -> bool:
    """Whether there is somebody to say the sentences."""
    return shutil.which(PROGRAM) is not None


def sentences() -> list[str]:
    """What is said."""
    return corpora.sentences()


def spoken(text: str) -> bytes:
    """A WAV file in which a text is said.

    Raises:
        OSError: the program can't be started.
        subprocess.CalledProcessError: it failed.
    """
    command = [PROGRAM, "-v", "en-us", "-s", "140", "--stdout", text]
    return subprocess.run(command, capture_output=True, check=True).stdout


def error_rate(said: Sequence[str], heard: Sequence[str]) -> float:
    """Words that were left out, put in or exchanged, by words that were said; without case and punctuation."""
    import jiwer

    return float(jiwer.wer([_words(text) for text in said], [_words(text) for text in heard]))


def _words(text: str) -> str:
    kept = (character for character in text.lower() if unicodedata.category(character)[0] != "P")
    return " ".join("".join(kept).split())
