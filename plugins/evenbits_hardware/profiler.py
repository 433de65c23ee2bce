"""What a restored model costs on this machine: bytes, milliseconds, memory.

What ran is part of each fingerprint (device, threads, kernel, meter), so that a method which runs on its restored
dense weights is never compared with a fused one, nor two machines with each other. It makes no claim about hardware
that it did not run on.
"""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evenbits.environment import describe_environment
from evenbits.errors import TrialFailed
from evenbits.measure import Measurement, ProfileSubject
from evenbits_hardware.memory import DevicePeak
from evenbits_hardware.options import HardwareOptions

BOOTSTRAP_DRAWS = 2000


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(describe_environment()["processor"])


def bootstrap_median(timings: np.ndarray[Any, Any], seed: int) -> tuple[float, float]:
    """95 % percentile interval of the median of `timings` (repeats, steps).

    Whole repeats are drawn: the steps of one repeat share what disturbed it, so they are not independent.
    """
    generator = np.random.default_rng(seed)
    repeats = timings.shape[0]
    drawn = generator.integers(repeats, size=(BOOTSTRAP_DRAWS, repeats))
    medians = np.median(timings[drawn].reshape(BOOTSTRAP_DRAWS, -1), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def fit_lengths(model: nn.Module, prompt: int, decode: int) -> tuple[int, int]:
    """(prompt, decode) tokens that together fit the model's positions; the prompt keeps at least half of these."""
    limit = getattr(_text_config(model), "max_position_embeddings", None)
    if limit is None:
        return prompt, decode
    if limit < 2:
        raise TrialFailed(f"the model has {limit} positions: too few for one prompt token and one decoded token")
    decode = min(decode, max(1, limit // 2))
    return min(prompt, limit - decode), decode


def load_metered(subject: ProfileSubject) -> tuple[nn.Module, DevicePeak]:
    """The model, and the memory it took to load it.

    A first load also imports the architecture's code, which dwarfs a small model and depends on what this process
    did before. So where a load has imported anything, it is done again and only the second one counts.
    """
    known = set(sys.modules)
    with DevicePeak(subject.device) as first:
        model, _ = subject.load()
    if known.issuperset(sys.modules):
        return model, first
    del model
    with DevicePeak(subject.device) as second:
        model, _ = subject.load()
    return model, second


class Workload:
    """A prefill and the decoding that follows, timed step by step with greedy choice of the next token."""

    def __init__(self, model: nn.Module, prompt: Tensor, decode_tokens: int) -> None:
        """prompt: (batch, tokens) int64 on the model's device."""
        self.model = model
        self.prompt = prompt
        self.decode_tokens = decode_tokens
        self.device = prompt.device
        # serving needs the last position's logits only; all of them would bill a large vocabulary to the prefill
        self.last_only = "logits_to_keep" in inspect.signature(model.forward).parameters

    def _timed(self, tokens: Tensor, cache: Any) -> tuple[float, Any]:
        extra = {"logits_to_keep": 1} if self.last_only else {}
        self._wait()
        start = time.perf_counter()
        output = self.model(input_ids=tokens, past_key_values=cache, use_cache=True, **extra)
        self._wait()
        return time.perf_counter() - start, output

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def repeat(self) -> tuple[float, list[float]]:
        """Seconds of the prefill, and of each decoding step (which yields one token per sequence)."""
        with torch.inference_mode():
            prefill, output = self._timed(self.prompt, None)
            steps = []
            for _ in range(self.decode_tokens):
                cache = getattr(output, "past_key_values", None)
                if cache is None:
                    raise TrialFailed("the model returns no KV cache: decoding with a cache cannot be timed")
                following = output.logits[:, -1:].argmax(dim=-1)
                seconds, output = self._timed(following, cache)
                steps.append(seconds)
        return prefill, steps


class HardwareProfiler:
    """Opens the model under a memory meter, warms up under another, then times without any."""

    def __init__(self, options: HardwareOptions) -> None:
        self.options = options

    def profile(self, subject: ProfileSubject) -> Sequence[Measurement]:
        """Raises TrialFailed on a device other than CPU and CUDA, or for a model without KV cache."""
        options, device = self.options, subject.device
        if device.type not in {"cpu", "cuda"}:
            raise TrialFailed(f"the hardware profiler has no meter for device {device}; use cpu or cuda")
        model, loading = load_metered(subject)
        model.eval()
        prompt_tokens, decode_tokens = fit_lengths(model, options.prompt_tokens, options.decode_tokens)
        work = Workload(model, self._prompt(model, prompt_tokens, subject), decode_tokens)
        tick = subject.progress(options.warmup + options.repeats, "hardware")
        warming = DevicePeak(device)
        with warming:
            for _ in range(options.warmup):
                work.repeat()
                tick(1)
        prefill, decode = [], []
        for _ in range(options.repeats):
            first, steps = work.repeat()
            prefill.append([first])
            decode.append(steps)
            tick(1)

        ran = {
            "profiler": "hardware",
            **subject.facts,
            "kernel": subject.facts.get("kernel"),
            "device": device.type,
            "device_name": device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": version("transformers"),
        }
        asked = {
            "prompt_tokens": prompt_tokens,
            "decode_tokens": decode_tokens,
            "cut_to_context": (prompt_tokens, decode_tokens) != (options.prompt_tokens, options.decode_tokens),
            "batch_size": options.batch_size,
        }
        timed = {**ran, **asked, "warmup": options.warmup, "logits": "last" if work.last_only else "all"}
        return [
            *_sizes(subject),
            _latency("latency_prefill_ms", "ms", prefill, options.batch_size * prompt_tokens, timed, subject.seed),
            _latency("latency_decode_ms_per_token", "ms/token", decode, options.batch_size, timed, subject.seed),
            _memory("memory_load_bytes", loading, loading, ran),
            *_compression(subject, ran),
            _memory("memory_inference_bytes", warming, loading, {**ran, **asked}),
        ]

    def _prompt(self, model: nn.Module, tokens: int, subject: ProfileSubject) -> Tensor:
        """(batch, tokens) random ids: a matrix product takes as long whatever it is fed."""
        generator = torch.Generator().manual_seed(subject.seed)
        shape = (self.options.batch_size, tokens)
        return torch.randint(_text_config(model).vocab_size, shape, generator=generator).to(subject.device)


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def _sizes(subject: ProfileSubject) -> list[Measurement]:
    """Bytes on disk do not depend on what ran: their fingerprint names the model and dtype alone."""
    fingerprint = {
        "profiler": "hardware",
        "counted": "bytes on disk",
        "model": subject.facts.get("model"),
        "dtype": subject.facts.get("dtype"),
    }
    return [
        Measurement(
            name=f"size_{part}_bytes",
            value=float(subject.sizes[part]),
            unit="bytes",
            better="lower",
            fingerprint=fingerprint,
            details={"sizes": dict(subject.sizes)},
        )
        for part in ("linear", "model")
    ]


def _latency(
    name: str, unit: str, seconds: list[list[float]], tokens: int, fingerprint: Mapping[str, Any], seed: int
) -> Measurement:
    """seconds: (repeats, steps); the value is the median over all of them, in milliseconds. tokens: per step."""
    timings = 1000 * np.asarray(seconds, dtype=np.float64)
    low, high = bootstrap_median(timings, seed)
    p50, p90, p99 = (float(value) for value in np.percentile(timings, [50, 90, 99]))
    return Measurement(
        name=name,
        value=p50,
        unit=unit,
        better="lower",
        low=low,
        high=high,
        fingerprint=fingerprint,
        details={
            "p50": p50,
            "p90": p90,
            "p99": p99,
            "mean": float(timings.mean()),
            "repeats": timings.shape[0],
            "tokens_per_second": 1000 * tokens / p50,
            "interval": "95 % bootstrap of the median over repeats",
        },
        items=timings.reshape(-1),
        volatile=True,
    )


def _memory(name: str, peak: DevicePeak, loading: DevicePeak, fingerprint: Mapping[str, Any]) -> Measurement:
    """Growth over what was held before the model was loaded: the process brings torch along, which is no method's."""
    return Measurement(
        name=name,
        value=float(max(0, peak.value - loading.baseline)),
        unit="bytes",
        better="lower",
        fingerprint={**fingerprint, "meter": peak.meter},
        details={
            "peak_bytes": peak.value,
            "baseline_bytes": loading.baseline,
            "host_peak_bytes": peak.host.peak,
            "host_baseline_bytes": loading.host.baseline,
            "host_meter": peak.host.meter,
        },
        volatile=True,
    )


def _compression(subject: ProfileSubject, fingerprint: Mapping[str, Any]) -> list[Measurement]:
    """What the executor saw of the compress stage's own process, above its start; the dense model has none."""
    if subject.compress_peak_bytes is None:
        return []
    return [
        Measurement(
            name="memory_compress_bytes",
            value=float(subject.compress_peak_bytes),
            unit="bytes",
            better="lower",
            fingerprint={**fingerprint, "meter": "host RSS of the compress stage"},
            details={} if subject.compress_seconds is None else {"compress_seconds": subject.compress_seconds},
            volatile=True,
        )
    ]
