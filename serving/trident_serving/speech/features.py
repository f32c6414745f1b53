"""Log-mel features, as transformers' `WhisperFeatureExtractor` computes them.

Magnitudes of a short-time Fourier transform (Hann window, the signal reflected at its ends), through the mel filters
that the export has written, as logarithms no lower than eight decades under the loudest of the whole recording.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trident_serving.schema import reading
from trident_serving.speech.audio import Samples

Floats = NDArray[np.float32]

_SETTINGS, _FILTERS = "features.json", "mel_filters.npy"
_FRAMES = 2048  # transformed at once
_FLOOR = 1e-10
_DECADES = 8.0


@dataclass(frozen=True)
class FeatureSettings:
    """How a model's features are computed; `features.json`, which the export writes.

    Attributes:
        rate: samples a second.
        n_fft: samples in a frame.
        hop_length: samples between two frames.
        frames: of a window of the model.
    """

    rate: int
    n_fft: int
    hop_length: int
    frames: int

    @classmethod
    def load(cls, folder: Path) -> FeatureSettings:
        """Read `folder/features.json`."""
        return reading.load(cls, folder / _SETTINGS)

    def save(self, folder: Path, filters: Floats) -> None:
        """Write `folder/features.json` and the filters, float32 [n_fft / 2 + 1, mels]."""
        reading.save(self, folder / _SETTINGS)
        np.save(folder / _FILTERS, filters)


class LogMel:
    """Computes features.

    Args:
        filters: float32 [n_fft / 2 + 1, mels].
    """

    def __init__(self, settings: FeatureSettings, filters: Floats) -> None:
        self.settings = settings
        self._filters = filters.astype(np.float64)
        # The periodic form, as torch.hann_window gives it.
        self._window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(settings.n_fft) / settings.n_fft)

    @classmethod
    def load(cls, folder: Path) -> LogMel:
        """Read a version folder."""
        return cls(FeatureSettings.load(folder), np.load(folder / _FILTERS))

    def frames(self, samples: int) -> int:
        """Frames of so many samples, without padding."""
        return samples // self.settings.hop_length

    def __call__(self, samples: Samples) -> Floats:
        """The features of a recording, float32 [mels, frames]; one that is shorter than a window is padded to it."""
        settings = self.settings
        least = settings.frames * settings.hop_length
        padded = np.pad(samples, (0, max(least - len(samples), 0)))
        count = self.frames(len(padded))
        reflected = np.pad(padded, settings.n_fft // 2, mode="reflect")
        every = np.lib.stride_tricks.sliding_window_view(reflected, settings.n_fft)[:: settings.hop_length]
        found = np.empty((self._filters.shape[1], count), np.float32)
        for start in range(0, count, _FRAMES):
            part = slice(start, min(start + _FRAMES, count))
            spectrum = np.fft.rfft(every[part] * self._window)
            power = spectrum.real**2 + spectrum.imag**2
            found[:, part] = np.log10(np.maximum(power @ self._filters, _FLOOR)).T
        np.maximum(found, found.max() - _DECADES, out=found)
        found += 4.0
        found /= 4.0
        return found
