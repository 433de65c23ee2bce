"""What a suite may say about the synthetic corpus and the distortion."""

from __future__ import annotations

from pydantic import Field

from evenbits.compressor import Options


class WordsOptions(Options):
    """Text without any order in it, for methods that must have calibration."""

    words: int = Field(default=1 << 14, ge=1, description="how many; a word is a token")
    seed: int = Field(default=0, ge=0, description="another number draws other words")


class DistortionOptions(Options):
    """Of all linear weights of the blocks together; there is nothing to choose."""
