"""What a suite may say of the evaluator and of the profiler."""

from __future__ import annotations

from typing import Any

from evenbits.compressor import Options
from pydantic import Field


class NextTokenOptions(Options):
    corpus: dict[str, Any] = Field(description='the text: {name = "...", and that corpus\'s options}')
    context: int = Field(default=256, ge=2, description="tokens a window; windows do not overlap, the tail is dropped")
    k: int = Field(default=1, ge=1, description="how many of the likeliest tokens count as a hit")


class LoadTimeOptions(Options):
    repeats: int = Field(default=3, ge=2, description="how often the model is opened, after once that does not count")
