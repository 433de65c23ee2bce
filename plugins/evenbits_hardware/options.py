"""What one may ask of the two profilers."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, field_validator

from evenbits.compressor import Options
from evenbits.measure import Weights
from evenbits.plugins import did_you_mean

AUTO = "auto"
METERS = ("nvml", "nvml-power", "rapl", "codecarbon")


def _different(sizes: tuple[int, ...]) -> tuple[int, ...]:
    if twice := sorted({size for size in sizes if sizes.count(size) > 1}):
        raise ValueError(f"{twice[0]} stands here twice; each batch size is measured once")
    return sizes


class WorkloadOptions(Options):
    """One repeat is a prefill of the prompt followed by `decode_tokens` single-token steps on its KV cache."""

    prompt_tokens: int = Field(default=128, ge=1, description="length of the prompt; cut where the model's context is")
    decode_tokens: int = Field(default=32, ge=1, description="tokens decoded one by one after each prefill")
    weights: Weights = Field(
        default="restored",
        description="restored: every layer on its restored dense weight, which says nothing about a method's speed. "
        "packed: each layer by its method's packed path where there is one, the dense model by torch's matmul. "
        "approximate: by what the method offers as faster and near that. To have several, use the profiler again "
        "with a label; sizes and the memory of compressing, which are the same for all, come with restored alone",
    )


class HardwareOptions(WorkloadOptions):
    """`repeats = 8` and `decode_tokens = 16` take about a second on a model of some million parameters."""

    repeats: int = Field(default=20, ge=2, description="timed repeats of each batch size")
    warmup: int = Field(default=3, ge=1, description="repeats before the timed ones; memory peaks are of these")
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(_different)] = Field(
        default=(1,),
        min_length=1,
        description="sequences that run together; metrics of the second and later sizes end in _bSIZE",
    )


class EnergyOptions(WorkloadOptions):
    """Each stretch lasts `seconds` and `updates`, whichever ends later: a meter tells little between two updates."""

    meter: str = Field(
        default=AUTO,
        description='"auto" takes the best there is: nvml or nvml-power where the model runs on a GPU, rapl where it '
        "runs on the CPU, else codecarbon; a trial fails where a meter asked for by name is not there",
    )
    batch_size: int = Field(default=1, ge=1, description="sequences that run together")
    warmup: int = Field(default=3, ge=1, description="repeats before the first reading")
    seconds: float = Field(default=2.0, gt=0, description="length of each stretch: rest, prefill, prefill and decode")
    updates: int = Field(default=10, ge=2, description="changes of the meter's reading that a stretch must see")

    @field_validator("meter")
    @classmethod
    def _known(cls, meter: str) -> str:
        if meter not in (AUTO, *METERS):
            raise ValueError(f"unknown meter {meter!r}{did_you_mean(meter, (AUTO, *METERS))}")
        return meter
