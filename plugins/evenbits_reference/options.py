"""What a suite may say about the reference corpus."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evenbits.compressor import Options


class ReferenceOptions(Options):
    split: Literal["train", "validation", "test"] = Field(
        default="test",
        description="train for calibration, test for perplexity; splits differ by the combinations that they tell",
    )
    documents: int = Field(default=2000, ge=1, description="how many texts, of about 200 characters each")
    seed: int = Field(default=0, ge=0, description="another seed tells other texts; the model was trained on train, 0")
