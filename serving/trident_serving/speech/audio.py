"""The bytes of an audio file to samples: one channel, at the model's rate. libsndfile decodes, soxr resamples.

A file is decoded in blocks, and no more of it than the limit, so that neither what its header says nor how well it is
compressed decides how much memory it takes.
"""

from __future__ import annotations

import ctypes
import io
from collections.abc import Callable

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from trident_serving.errors import InvalidRequest

Samples = NDArray[np.float32]

FORMATS = "WAV, FLAC, MP3 or Ogg"
LOWEST_RATE, HIGHEST_RATE = 4000, 192000  # Hz
MOST_CHANNELS = 16
_BLOCK = 2**16  # frames that are decoded at once
_LOUDEST = 1000.0  # of a file of floating-point numbers, where 1 is full scale


def decode(content: bytes, rate: int, max_seconds: int, check: Callable[[], None] = lambda: None) -> Samples:
    """The samples of an audio file, float32 [samples] in -1 to 1; its channels are averaged.

    Args:
        content: the file.
        rate: of the result, in Hz.
        max_seconds: the longest that is taken.
        check: called before each block; what it raises ends the decoding.

    Raises:
        InvalidRequest: it is no audio file of a known format, is broken, empty or too long, or has an impossible rate.
    """
    if not known(content):
        raise InvalidRequest(f"audio is no {FORMATS} file: it begins with {content[:12]!r}")
    try:
        file = soundfile.SoundFile(io.BytesIO(content))
    except soundfile.LibsndfileError as error:
        raise _broken(error) from None
    with file:
        if not LOWEST_RATE <= file.samplerate <= HIGHEST_RATE:
            raise InvalidRequest(
                f"audio has a sample rate of {file.samplerate} Hz, it must be between {LOWEST_RATE} and {HIGHEST_RATE}"
            )
        if file.channels > MOST_CHANNELS:
            raise InvalidRequest(f"audio has {file.channels} channels, the limit is {MOST_CHANNELS}")
        try:
            return _samples(file, rate, max_seconds, check)
        except soundfile.LibsndfileError as error:
            raise _broken(error) from None


def _samples(file: soundfile.SoundFile, rate: int, max_seconds: int, check: Callable[[], None]) -> Samples:
    most = max_seconds * file.samplerate
    # A header may say anything: what is said to be too long is refused, and what is read is counted.
    if file.frames > most and file.format != "MP3":
        raise _too_long(file.frames / file.samplerate, max_seconds)
    resampler = None
    if file.samplerate != rate:
        resampler = soxr.ResampleStream(file.samplerate, rate, 1, dtype="float32", quality="HQ")
    found: list[Samples] = []
    read = 0
    while True:
        check()
        block = file.read(_BLOCK, dtype="float32", always_2d=True)
        read += len(block)
        if read > most:
            raise _too_long(read / file.samplerate, max_seconds, at_least=True)
        mixed = block.mean(axis=1, dtype=np.float32)
        if not (np.abs(mixed) <= _LOUDEST).all():
            raise InvalidRequest(f"audio holds samples that are no numbers, or beyond {_LOUDEST:g} times full scale")
        last = len(block) < _BLOCK
        found.append(mixed if resampler is None else resampler.resample_chunk(mixed, last=last))
        if last:
            break
    if not read:
        raise InvalidRequest("audio is empty: the file holds no samples")
    return np.concatenate(found)


def silence() -> None:
    """Let nothing that C code of this process prints to its `stderr` come out.

    libmpg123, which libsndfile offers no way to silence, prints two lines there for each broken frame of an MP3: a
    caller would fill the server's log. Python's own standard error, C++'s and crash reports stay.
    """
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    nowhere = libc.fopen(b"/dev/null", b"w")
    if nowhere:
        ctypes.c_void_p.in_dll(libc, "stderr").value = nowhere


def known(content: bytes) -> bool:
    """Whether a file begins as one of the formats does; libsndfile has parsers for two dozen more."""
    head = content[:12]
    if head[:4] in (b"RIFF", b"RF64") and head[8:] == b"WAVE":
        return True
    mpeg = len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0
    return head[:4] in (b"fLaC", b"OggS") or head[:3] == b"ID3" or mpeg


def _broken(error: soundfile.LibsndfileError) -> InvalidRequest:
    return InvalidRequest(f"audio can't be decoded: {error.error_string.strip().rstrip('.')}")


def _too_long(seconds: float, limit: int, *, at_least: bool = False) -> InvalidRequest:
    more = "at least " if at_least else ""
    return InvalidRequest(f"audio has {more}{seconds:.0f} seconds, the limit is {limit}: send it in parts")
