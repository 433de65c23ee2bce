"""Steps of training replayed as CUDA graphs: a step of the paper's recipe is over a hundred small kernels, and sending
these one by one takes several times as long as running them.

For benchmarks, on a machine with torch and Triton alone:

    time_training(out_features, in_features, settings=None, *, device="cuda", epochs=(1, 3), seed=0) -> TrainingTime

trains on a random matrix (settings None: the paper's recipe, d = 8, K = 2^15; `settings.recipe("paper", d=4, ...)` for
others) for so few epochs, takes the difference, and extrapolates to those of the settings. The seconds of a block are
the sum of `TrainingTime.seconds` over its matrices, those of a model that times its blocks: matrices are independent,
and trained one after the other.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evenbits_pocketllm.layout import cut, order
from evenbits_pocketllm.pools import steps_of
from evenbits_pocketllm.settings import recipe
from evenbits_pocketllm.step import find, searched

if TYPE_CHECKING:
    from evenbits_pocketllm.settings import PlainSettings
    from evenbits_pocketllm.step import Met, Step

logger = logging.getLogger(__name__)

# of each shape, taken one by one before it is captured: they set up cuBLAS and choose Triton configurations, neither of
# which a capture allows
WARM_STEPS = 3
_WORTH = 16  # steps of a training from which on a capture, about a tenth of a second, is worth it
_SEARCHES = 20  # timed, for their share of a step


class StaticStep:
    """A step fed through contiguous buffers of fixed address, as a CUDA graph needs it; runs on any device."""

    def __init__(self, step: Step, batch: Tensor, rates: Tensor) -> None:
        """batch, rates: like those to come."""
        self._step = step
        # sub-vectors along the outputs are views of a transposed matrix, which each kernel would read in strides
        self._batch = torch.empty_like(batch, memory_format=torch.contiguous_format)
        self._rates = torch.empty_like(rates)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._met: Met | None = None

    def __call__(self, batch: Tensor, rates: Tensor) -> Met | None:
        """As the step itself; what is returned is overwritten by the next call."""
        self._batch.copy_(batch)
        self._rates.copy_(rates)
        if self._graph is None:
            self._met = self._step(self._batch, self._rates)
        else:
            self._graph.replay()
        return self._met

    def capture(self) -> None:
        """Record the step on the current stream, which must not be the default one; nothing is computed.

        Raises RuntimeError where the step reads a value on the host, or does what else a capture does not allow.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            self._met = self._step(self._batch, self._rates)
        self._graph = graph


class Runner:
    """Steps of a training, replayed where they can be.

    Batches take few shapes: whole groups in steps of even size are of two sizes at most for each length of groups.
    """

    def __init__(self, step: Step, device: torch.device, steps: int) -> None:
        """steps: of the whole training."""
        self._step, self._device = step, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._shapes: dict[torch.Size, tuple[StaticStep, int]] = {}
        self.captured = 0  # graphs
        self.eager = ""  # why steps are sent kernel by kernel; "" where they are not
        if device.type != "cuda":
            self.eager = f"CUDA graphs do not exist on {device.type}"
        elif steps < _WORTH:
            self.eager = f"{steps} steps are too few to be worth a capture"

    @property
    def road(self) -> str:
        """How steps were run, for records."""
        steps = f"step by step: {self.eager}" if self.eager else f"{self.captured} CUDA graphs replayed"
        units = "Triton's" if self._step.refusal is None else f"torch's: {self._step.refusal}"
        return f"{steps}; units are {units}"

    @contextmanager
    def running(self) -> Iterator[None]:
        """All steps, and what else reads or writes their tensors meanwhile, belong inside: a stream of its own."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device):
            outer = torch.cuda.current_stream()
            self._stream.wait_stream(outer)
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                outer.wait_stream(self._stream)

    def __call__(self, batch: Tensor, rates: Tensor) -> Met | None:
        """One step; what it returns is the caller's."""
        if self.eager:
            return self._step(batch, rates)
        static, taken = self._shapes.get(batch.shape) or (StaticStep(self._step, batch, rates), 0)
        if taken == WARM_STEPS:
            try:
                static.capture()
                self.captured += 1
            except RuntimeError as error:  # whatever is wrong with the step itself comes again right below
                self.eager = f"a step of {tuple(batch.shape)} cannot be captured ({_reason(error)})"
                logger.warning("pocketllm trains step by step, several times as slowly: %s", self.eager)
                return self._step(batch, rates)
        self._shapes[batch.shape] = static, taken + 1
        met = static(batch, rates)
        return met.clone() if met is not None else None


def _reason(error: BaseException) -> str:
    """In one line; of a capture, what spoilt it: its end fails as well, and says only that it was spoilt before."""
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class TrainingTime:
    """What one matrix takes to train, and what that is made of; by the wall clock, the device idle at both ends."""

    seconds: float  # of the whole training, extrapolated: fixed_seconds + epochs * epoch_seconds
    fixed_seconds: float  # start, capture, codes and error at the end
    epoch_seconds: float
    epochs: int  # of the settings
    steps_per_epoch: int
    vectors_per_step: int  # most of any step
    codewords: int
    seconds_per_step: float
    search_seconds: float  # of the search of the nearest codewords in one step, measured by itself
    road: str  # how steps were run: as CUDA graphs, or why not

    @property
    def search_share(self) -> float:
        """Of a step's time."""
        return self.search_seconds / self.seconds_per_step

    @property
    def steps(self) -> int:
        """Of the whole training."""
        return self.epochs * self.steps_per_epoch


def time_training(
    out_features: int,
    in_features: int,
    settings: PlainSettings | None = None,
    *,
    device: torch.device | str = "cuda",
    epochs: tuple[int, int] = (1, 3),
    seed: int = 0,
) -> TrainingTime:
    """Train twice on one random matrix, for so many epochs each, and extrapolate; see the top of the module.

    The weights are normal, of deviation 0.02. One training of one epoch comes before, untimed: Triton compiles in it.
    Raises ValueError for epochs that do not grow.
    """
    from evenbits_pocketllm.autoencoder import train

    few, more = epochs
    if not 0 < few < more:
        raise ValueError(f"two rising numbers of epochs are needed, not {epochs}")
    settings = recipe("paper") if settings is None else settings
    device = torch.device(device)
    weight = 0.02 * torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))
    vectors = order(cut(weight.to(device), settings.axis, settings.d), settings.rln).contiguous()

    def run(count: int) -> tuple[float, str]:
        wait(device)
        start = time.perf_counter()
        trained = train(vectors, replace(settings, epochs=count), torch.Generator().manual_seed(seed))
        wait(device)
        return time.perf_counter() - start, trained.road

    run(few)
    short, _ = run(few)
    long, road = run(more)
    epoch = max(0.0, long - short) / (more - few)
    fixed = max(0.0, short - few * epoch)
    steps = steps_of(vectors, settings)
    most = -(-vectors.shape[0] // steps) * vectors.shape[1]
    return TrainingTime(
        seconds=fixed + settings.epochs * epoch,
        fixed_seconds=fixed,
        epoch_seconds=epoch,
        epochs=settings.epochs,
        steps_per_epoch=steps,
        vectors_per_step=most,
        codewords=settings.codebook_size,
        seconds_per_step=epoch / steps,
        search_seconds=time_search(most, settings, device, seed),
        road=road,
    )


def time_search(count: int, settings: PlainSettings, device: torch.device, seed: int = 0) -> float:
    """Seconds to find the nearest codewords of so many latents, as a step of training does, in a row of searches."""
    generator = torch.Generator().manual_seed(seed)
    numbers = settings.latent or settings.d
    latents = torch.randn(count, numbers, generator=generator).to(device)
    codebook = (torch.randn(settings.codebook_size, numbers, generator=generator) * (2 / math.sqrt(numbers))).to(device)
    table = searched(codebook)
    find(latents, codebook, table)
    times = []
    for _ in range(3):
        wait(device)
        start = time.perf_counter()
        for _ in range(_SEARCHES if device.type == "cuda" else 1):
            find(latents, codebook, table)
        wait(device)
        times.append((time.perf_counter() - start) / (_SEARCHES if device.type == "cuda" else 1))
    return min(times)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was sent."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
