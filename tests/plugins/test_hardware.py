"""The hardware profiler on a random Llama: real timings, real peaks, and fingerprints that say what ran."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from evenbits.errors import TrialFailed
from evenbits.measure import Measurement
from evenbits_hardware import memory, provide_profilers
from evenbits_hardware.options import HardwareOptions
from evenbits_hardware.profiler import Workload, bootstrap_median, fit_lengths

MEBIBYTE = 1 << 20
QUICK: dict[str, Any] = {"prompt_tokens": 12, "decode_tokens": 5, "repeats": 6, "warmup": 1}


def tiny_llama(*, hidden: int = 32, positions: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
    )
    return LlamaForCausalLM(config)


@dataclass
class LlamaSubject:
    """A subject whose `load` builds the model anew, holding `ballast` more bytes for a moment."""

    build: Callable[[], nn.Module] = tiny_llama
    ballast: int = 0
    compress_peak_bytes: int | None = 7 * MEBIBYTE
    compress_seconds: float | None = 1.5
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 3
    facts: Mapping[str, Any] = field(
        default_factory=lambda: {"model": "tiny", "dtype": "float32", "attention": "sdpa", "kernel": "restored dense"}
    )
    sizes: Mapping[str, int] = field(default_factory=lambda: {"linear": 1000, "model": 1500, "dense_model": 9000})
    ticks: int = 0
    total: int = 0

    def load(self) -> tuple[nn.Module, Any]:
        if self.ballast:
            torch.ones(self.ballast, dtype=torch.uint8)
        return self.build(), None

    def progress(self, total: int, what: str) -> Callable[[int], None]:
        self.total = total

        def tick(steps: int) -> None:
            self.ticks += steps

        return tick


def profile(subject: LlamaSubject, **options: Any) -> dict[str, Measurement]:
    (profiler,) = provide_profilers()
    measured: Sequence[Measurement] = profiler.make(HardwareOptions(**{**QUICK, **options})).profile(subject)
    return {m.name: m for m in measured}


def test_every_metric_is_measured() -> None:
    subject = LlamaSubject()
    found = profile(subject)
    assert list(found) == [
        "size_linear_bytes",
        "size_model_bytes",
        "latency_prefill_ms",
        "latency_decode_ms_per_token",
        "memory_load_bytes",
        "memory_compress_bytes",
        "memory_inference_bytes",
    ]
    assert subject.ticks == subject.total == 7
    for name, m in found.items():
        assert m.better == "lower"
        assert m.volatile is not name.startswith("size_")
        json.dumps([m.fingerprint, m.details])  # both end in record.json
    assert found["size_linear_bytes"].value == 1000
    assert found["size_model_bytes"].value == 1500
    assert found["memory_compress_bytes"].value == 7 * MEBIBYTE
    assert found["memory_compress_bytes"].details["compress_seconds"] == 1.5


def test_timings_are_kept_and_summarised() -> None:
    found = profile(LlamaSubject(), batch_size=2)
    prefill, decode = found["latency_prefill_ms"], found["latency_decode_ms_per_token"]
    assert prefill.items is not None
    assert decode.items is not None
    assert prefill.items.shape == (6,)
    assert decode.items.shape == (30,)
    for m, tokens in ((prefill, 2 * 12), (decode, 2)):
        assert m.items is not None
        assert m.low is not None
        assert m.high is not None
        assert (m.items > 0).all()
        assert m.value == pytest.approx(float(np.median(m.items)))
        assert m.items.min() <= m.low <= m.value <= m.high <= m.items.max()
        assert m.value == m.details["p50"] <= m.details["p90"] <= m.details["p99"] <= m.items.max()
        assert m.details["tokens_per_second"] == pytest.approx(1000 * tokens / m.value)


def test_timings_follow_the_work() -> None:
    class Slow(nn.Module):
        """Sleeps a fixed time for each token, around a real model."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_llama()
            self.config = self.inner.config

        def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
            time.sleep(0.002 * input_ids.shape[1])
            return self.inner(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    found = profile(LlamaSubject(build=Slow), repeats=3)
    assert found["latency_prefill_ms"].value >= 24
    assert 2 <= found["latency_decode_ms_per_token"].value < found["latency_prefill_ms"].value
    assert found["latency_prefill_ms"].fingerprint["logits"] == "all"  # its forward has no logits_to_keep


def test_decoding_runs_on_the_cache() -> None:
    model = tiny_llama().eval()
    lengths: list[tuple[int, int]] = []

    def seen(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        lengths.append((kwargs["input_ids"].shape[1], output.past_key_values.get_seq_length()))

    model.register_forward_hook(seen, with_kwargs=True)
    Workload(model, torch.arange(10)[None], 3).repeat()
    assert lengths == [(10, 10), (1, 11), (1, 12), (1, 13)]


def test_a_model_without_cache_is_refused() -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny_llama()
            self.config = self.inner.config

        def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, use_cache: bool = True) -> Any:
            return self.inner(input_ids=input_ids, use_cache=False)

    with pytest.raises(TrialFailed, match="no KV cache"):
        profile(LlamaSubject(build=Forgetful))


def test_a_device_without_meter_is_refused() -> None:
    with pytest.raises(TrialFailed, match="meta"):
        profile(LlamaSubject(device=torch.device("meta")))


def test_what_ran_is_in_the_fingerprint() -> None:
    fused = {"model": "tiny", "dtype": "float32", "attention": "sdpa", "kernel": "fused"}
    dense, other = profile(LlamaSubject()), profile(LlamaSubject(facts=fused))
    for name in ("latency_prefill_ms", "latency_decode_ms_per_token", "memory_load_bytes", "memory_inference_bytes"):
        print_ = dense[name].fingerprint
        assert print_ != other[name].fingerprint  # simulated and fused never share a column
        assert print_["kernel"] == "restored dense"
        assert print_["threads"] == torch.get_num_threads()
        assert print_["device"] == "cpu"
        assert print_["device_name"]
    # bytes on disk are the same whatever ran
    assert dense["size_linear_bytes"].fingerprint == other["size_linear_bytes"].fingerprint
    assert "device_name" not in dense["size_linear_bytes"].fingerprint
    assert dense["latency_prefill_ms"].fingerprint["logits"] == "last"


@pytest.mark.parametrize(
    ("positions", "asked", "expected"),
    [(64, (128, 32), (32, 32)), (64, (16, 8), (16, 8)), (64, (128, 200), (32, 32)), (3, (9, 9), (2, 1))],
)
def test_lengths_are_cut_to_the_context(positions: int, asked: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit_lengths(tiny_llama(positions=positions), *asked) == expected


def test_the_cut_is_stated() -> None:
    long = profile(LlamaSubject(), prompt_tokens=500)["latency_prefill_ms"].fingerprint
    assert (long["prompt_tokens"], long["cut_to_context"]) == (59, True)
    assert profile(LlamaSubject())["latency_prefill_ms"].fingerprint["cut_to_context"] is False


def test_one_position_is_too_few() -> None:
    with pytest.raises(TrialFailed, match="1 positions"):
        fit_lengths(tiny_llama(positions=1), 4, 4)


@pytest.mark.parametrize("refused", [False, True])
def test_the_load_peak_sees_what_was_held_for_a_moment(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if refused:
        monkeypatch.setattr(memory, "reset_high_water", lambda: False)
    ballast = 256 * MEBIBYTE
    found = profile(LlamaSubject(ballast=ballast))
    load, inference = found["memory_load_bytes"], found["memory_inference_bytes"]
    assert 0.9 * ballast < load.value < 2 * ballast
    assert inference.value < 0.5 * ballast  # the ballast is gone by then, and the mark was reset
    assert load.details["peak_bytes"] - load.details["baseline_bytes"] == load.value
    if refused:
        assert "sampled" in load.fingerprint["meter"]


def test_code_that_a_load_imports_is_not_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ballast = 256 * MEBIBYTE
    (tmp_path / "heavy_architecture.py").write_text(f"import torch\nheld = torch.ones({ballast}, dtype=torch.uint8)\n")
    monkeypatch.syspath_prepend(tmp_path)

    def build() -> LlamaForCausalLM:
        importlib.import_module("heavy_architecture")
        return tiny_llama()

    try:
        found = profile(LlamaSubject(build=build))
    finally:
        del sys.modules["heavy_architecture"]
    assert found["memory_load_bytes"].value < 0.5 * ballast
    assert found["memory_inference_bytes"].value < 0.5 * ballast


def test_memory_counts_the_weights() -> None:
    small = profile(LlamaSubject())["memory_inference_bytes"]
    large = profile(LlamaSubject(build=lambda: tiny_llama(hidden=1024)))["memory_inference_bytes"]
    weights = sum(p.nbytes for p in tiny_llama(hidden=1024).parameters())
    assert large.value - small.value > 0.8 * weights


def test_the_dense_model_has_no_compression_peak() -> None:
    assert "memory_compress_bytes" not in profile(LlamaSubject(compress_peak_bytes=None, compress_seconds=None))


def test_a_mark_that_does_not_fall_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Some sandboxes accept the reset and do nothing."""
    status = tmp_path / "status"
    status.write_text("VmHWM:\t  900000 kB\nVmRSS:\t  100000 kB\n")
    monkeypatch.setattr(memory, "STATUS", status)
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "clear_refs")
    assert memory.reset_high_water() is False
    status.write_text("VmHWM:\t  100000 kB\nVmRSS:\t  100000 kB\n")
    assert memory.reset_high_water() is True
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    assert memory.reset_high_water() is False


def test_the_interval_draws_whole_repeats() -> None:
    generator = np.random.default_rng(0)
    level = generator.normal(10, 1, size=(20, 1))
    clustered = level + generator.normal(0, 0.01, size=(20, 50))
    low, high = bootstrap_median(clustered, 0)
    assert low < np.median(clustered) < high
    assert high - low > 0.3  # steps taken for independent would give about 0.1
    assert bootstrap_median(np.full((4, 3), 2.0), 0) == (2.0, 2.0)
    assert bootstrap_median(clustered, 0) == (low, high)


@pytest.mark.parametrize("wrong", [{"repeats": 1}, {"warmup": 0}, {"batch_size": 0}, {"promt_tokens": 3}])
def test_wrong_options_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValidationError):
        HardwareOptions(**wrong)
