"""Sounds that are made by a formula: what gates and tests of speech listen to. They are like speech, and say nothing.

A source of pulses with a melody goes through three resonances, another set for each syllable, between pauses and hiss.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]

# Resonances of vowels, in Hz: a, e, i, o, u.
_VOWELS = ((730, 1090, 2440), (530, 1840, 2480), (270, 2290, 3010), (570, 840, 2410), (300, 870, 2240))
_WIDTHS = (80, 100, 140)
_SYLLABLE = 0.22  # seconds


def spoken(seconds: float, seed: int, rate: int = 16000) -> Samples:
    """Syllables in a row, float32 [samples] in -0.5 to 0.5, always the same for a seed."""
    random = np.random.default_rng(seed)
    found, length = [], int(_SYLLABLE * rate)
    frequencies = np.fft.rfftfreq(length, 1 / rate)
    for _ in range(int(np.ceil(seconds / _SYLLABLE))):
        kind = random.integers(0, 8)
        if kind == 0:
            found.append(np.zeros(length))
            continue
        if kind == 1:
            source = 0.2 * random.standard_normal(length)
        else:
            phase = np.cumsum(random.uniform(90, 220) * np.linspace(1.0, random.uniform(0.85, 1.15), length) / rate)
            source = np.diff(np.floor(phase), prepend=0.0) + 0.002 * random.standard_normal(length)
        spectrum = np.fft.rfft(source)
        for resonance, width in zip(_VOWELS[random.integers(len(_VOWELS))], _WIDTHS, strict=True):
            spectrum *= resonance**2 / (resonance**2 - frequencies**2 + 1j * width * frequencies)
        found.append(np.fft.irfft(spectrum, length) * np.hanning(length))
    samples = np.concatenate(found)[: int(seconds * rate)]
    scaled: Samples = (0.5 * samples / max(np.abs(samples).max(), 1e-9)).astype(np.float32)
    return scaled
