"""What one may ask of the hardware profiler."""

from __future__ import annotations

from pydantic import Field

from evenbits.compressor import Options


class HardwareOptions(Options):
    """One repeat is a prefill of the prompt followed by `decode_tokens` single-token steps on its KV cache."""

    prompt_tokens: int = Field(default=128, ge=1, description="length of the prompt; cut where the model's context is")
    decode_tokens: int = Field(default=32, ge=1, description="tokens decoded one by one after each prefill")
    repeats: int = Field(default=20, ge=2, description="timed repeats")
    warmup: int = Field(default=3, ge=1, description="repeats before the timed ones; memory peaks are of these")
    batch_size: int = Field(default=1, ge=1, description="sequences that run together")
