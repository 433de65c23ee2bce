"""The hardware profiler on a random Llama: real timings, real peaks, and fingerprints that say what ran."""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from evenbits.errors import SuiteError, TrialFailed
from evenbits.measure import Finding, Measurement, Remark, Weights
from evenbits.suite import check_options
from evenbits_hardware import memory, provide_profilers
from evenbits_hardware.latency import bootstrap_median, drift, time_and_rate
from evenbits_hardware.options import HardwareOptions
from evenbits_hardware.workload import Workload, fit_lengths

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
    compress_device_peak_bytes: int | None = None
    compress_seconds: float | None = 1.5
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 3
    facts: Mapping[str, Any] = field(
        default_factory=lambda: {"model": "tiny", "dtype": "float32", "attention": "sdpa", "kernel": "restored dense"}
    )
    sizes: Mapping[str, int] = field(default_factory=lambda: {"linear": 1000, "model": 1500, "dense_model": 9000})
    ticks: int = 0
    total: int = 0

    def load(self, weights: Weights = "restored") -> tuple[nn.Module, Any]:
        if self.ballast:
            torch.ones(self.ballast, dtype=torch.uint8)
        return self.build(), None

    def progress(self, total: int, what: str) -> Callable[[int], None]:
        self.total = total

        def tick(steps: int) -> None:
            self.ticks += steps

        return tick


def findings(subject: LlamaSubject, **options: Any) -> Sequence[Finding]:
    (profiler,) = (p for p in provide_profilers() if p.name == "hardware")
    found: Sequence[Finding] = profiler.make(HardwareOptions(**{**QUICK, **options})).profile(subject)
    return found


def profile(subject: LlamaSubject, **options: Any) -> dict[str, Measurement]:
    return {m.name: m for m in findings(subject, **options) if isinstance(m, Measurement)}


def test_every_metric_is_measured() -> None:
    subject = LlamaSubject()
    found = profile(subject)
    assert list(found) == [
        "size_linear_bytes",
        "size_model_bytes",
        "latency_prefill_ms",
        "prefill_tokens_per_second",
        "latency_decode_ms_per_token",
        "decode_tokens_per_second",
        "memory_load_bytes",
        "memory_compress_bytes",
        "memory_inference_bytes",
    ]
    assert subject.ticks == subject.total == 7
    for name, m in found.items():
        assert m.better == ("higher" if name.endswith("per_second") else "lower")
        assert m.volatile is not name.startswith("size_")
        json.dumps([m.fingerprint, m.details])  # both end in record.json
    assert found["size_linear_bytes"].value == 1000
    assert found["size_model_bytes"].value == 1500
    assert found["memory_compress_bytes"].value == 7 * MEBIBYTE
    assert found["memory_compress_bytes"].details["compress_seconds"] == 1.5


def test_timings_are_kept_and_summarised() -> None:
    found = profile(LlamaSubject(), batch_sizes=[2])
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
        assert m.details["p90_over_p50"] == pytest.approx(m.details["p90"] / m.details["p50"])
        rate = found[f"{m.name.split('_')[1]}_tokens_per_second"]
        assert rate.value == pytest.approx(1000 * tokens / m.value)
        assert (rate.low, rate.high) == pytest.approx((1000 * tokens / m.high, 1000 * tokens / m.low))
        assert rate.unit == "tokens/s"
        assert rate.fingerprint == m.fingerprint  # what ran is said of both


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
    for name in (name for name in dense if not name.startswith("size_")):
        print_ = dense[name].fingerprint
        assert print_ != other[name].fingerprint  # simulated and fused never share a column
        assert print_["kernel"] == "restored dense"
        assert print_["threads"] == torch.get_num_threads()
        assert print_["device"] == "cpu"
        assert print_["device_name"]
        assert {"torch", "transformers", "attention", "dtype"} <= print_.keys()
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


def test_what_a_first_load_makes_once_is_not_its_memory() -> None:
    """Not only imports: threads and tables of libraries, some 20 MB for the first model that a process opens."""
    kept: list[torch.Tensor] = []

    def build() -> LlamaForCausalLM:
        if not kept:
            kept.append(torch.ones(128 * MEBIBYTE, dtype=torch.uint8))
        return tiny_llama()

    found = profile(LlamaSubject(build=build))
    assert found["memory_load_bytes"].value < 64 * MEBIBYTE
    assert found["memory_inference_bytes"].value < 64 * MEBIBYTE


def test_what_a_first_run_makes_once_is_not_its_memory() -> None:
    """Workspaces of matrix products, compiled kernels: a model of 13 MB seemed to take 22."""
    kept: list[torch.Tensor] = []

    def build() -> LlamaForCausalLM:
        model = tiny_llama()
        model.register_forward_pre_hook(
            lambda *_: kept.append(torch.ones(128 * MEBIBYTE, dtype=torch.uint8)) if not kept else None
        )
        return model

    assert profile(LlamaSubject(build=build))["memory_inference_bytes"].value < 64 * MEBIBYTE


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"repeats": 1}, {"warmup": 0}, {"promt_tokens": 3},
        {"batch_sizes": [0]}, {"batch_sizes": [1, -2]}, {"batch_sizes": []}, {"batch_sizes": [4, 4]},
    ],
)  # fmt: skip
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        HardwareOptions(**wrong)


def test_a_wrong_batch_size_is_named() -> None:
    with pytest.raises(SuiteError, match=r"profiler hardware.batch_sizes.1: .*greater than or equal to 1 \(got -2\)"):
        check_options(HardwareOptions, {"batch_sizes": [1, -2]}, "profiler hardware")
    with pytest.raises(SuiteError, match=r"batch_sizes: 4 stands here twice"):
        check_options(HardwareOptions, {"batch_sizes": [4, 1, 4]}, "profiler hardware")
    with pytest.raises(SuiteError, match='batch_size: unknown option; did you mean "batch_sizes"'):
        check_options(HardwareOptions, {"batch_size": 4}, "profiler hardware")


def test_each_batch_size_is_measured() -> None:
    model = tiny_llama().eval()
    seen: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    subject = LlamaSubject(build=lambda: model)
    found = profile(subject, batch_sizes=[1, 4])
    assert subject.ticks == subject.total == 14
    assert (seen.count(1), seen.count(4)) == (48, 48)  # a prefill and 5 steps, 7 times and once on the first model
    for name in ("latency_prefill_ms", "decode_tokens_per_second", "memory_inference_bytes"):
        assert found[name].fingerprint["batch_size"] == 1
        assert found[f"{name}_b4"].fingerprint["batch_size"] == 4
    four = found["latency_decode_ms_per_token_b4"]
    assert found["decode_tokens_per_second_b4"].value == pytest.approx(4000 / four.value)
    assert found["prefill_tokens_per_second_b4"].value == pytest.approx(
        4 * 12 * 1000 / found["latency_prefill_ms_b4"].value
    )
    assert len(found) == 14
    assert list(profile(LlamaSubject(), batch_sizes=[4])) == list(profile(LlamaSubject()))  # the only one has no suffix


def out_of_memory_at(sizes: set[int]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model: nn.Module = tiny_llama()

        def refuse(module: nn.Module, args: Any, kwargs: Any) -> None:
            if len(kwargs["input_ids"]) in sizes:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")

        model.register_forward_pre_hook(refuse, with_kwargs=True)
        return model

    return build


@pytest.mark.parametrize(("full", "left"), [({4}, ["", "_b2"]), ({1}, ["_b4", "_b2"]), ({1, 2, 4}, [])])
def test_a_batch_that_does_not_fit_the_gpu_is_a_remark(full: set[int], left: list[str]) -> None:
    found = findings(LlamaSubject(build=out_of_memory_at(full)), batch_sizes=[1, 4, 2])
    names = [m.name for m in found if isinstance(m, Measurement)]
    assert [name.removeprefix("latency_prefill_ms") for name in names if "latency_prefill" in name] == left
    assert [name.removeprefix("memory_inference_bytes") for name in names if "inference" in name] == left
    assert {"size_model_bytes", "memory_load_bytes"} <= set(names)
    remarks = [m.text for m in found if isinstance(m, Remark)]
    for size, text in zip([size for size in (1, 4, 2) if size in full], remarks, strict=True):
        assert f"batch size {size}" in text


def test_other_errors_are_not_taken_for_a_full_gpu() -> None:
    def build() -> nn.Module:
        model: nn.Module = tiny_llama()
        model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
        return model

    with pytest.raises(MemoryError):
        profile(LlamaSubject(build=build))


def test_a_kernel_that_is_not_said_is_refused() -> None:
    with pytest.raises(TrialFailed, match="which kernel"):
        profile(LlamaSubject(facts={"model": "tiny", "dtype": "float32"}))


def test_a_device_peak_of_compression_goes_first() -> None:
    @dataclass
    class OnDevice(LlamaSubject):
        compress_device_peak_bytes: int | None = 3 * MEBIBYTE

    found = profile(OnDevice())["memory_compress_bytes"]
    assert found.value == 3 * MEBIBYTE
    assert "cuda" in found.fingerprint["meter"]
    assert found.details["host_peak_bytes"] == 7 * MEBIBYTE
    assert (
        "host RSS" in profile(OnDevice(compress_device_peak_bytes=None))["memory_compress_bytes"].fingerprint["meter"]
    )


def test_rates_and_drift_are_arithmetic() -> None:
    seconds = [[0.001], [0.001], [0.002], [0.004], [0.004]]
    assert drift(1000 * np.array(seconds)) == 4.0  # the middle repeat belongs to neither half
    latency, rate = time_and_rate("prefill", "ms", seconds, 256, {"a": 1}, 0, "_b2")
    assert (latency.name, latency.value) == ("latency_prefill_ms_b2", 2.0)
    assert (rate.name, rate.value) == ("prefill_tokens_per_second_b2", 128000.0)
    assert (latency.low, latency.high) == (1.0, 4.0)
    assert (rate.low, rate.high) == (64000.0, 256000.0)
    assert latency.details["ms_per_token_over_batch"] == 2.0 / 256
    flat, _ = time_and_rate("decode", "ms/token", [[0.5, 0.5], [0.5, 0.5]], 1, {}, 0)
    assert (flat.details["p90_over_p50"], flat.details["drift"], flat.name) == (1, 1, "latency_decode_ms_per_token")


def test_the_collector_is_left_as_it_was() -> None:
    frozen = gc.get_freeze_count()
    profile(LlamaSubject())
    assert gc.get_freeze_count() == frozen


def test_many_steps_take_no_memory() -> None:
    """2000 draws of these timings at once would be 160 MB."""
    timings = np.random.default_rng(0).normal(10, 1, size=(20, 500))
    tracemalloc.start()
    low, high = bootstrap_median(timings, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert low < np.median(timings) < high
    assert peak < 8 * MEBIBYTE


def test_what_torch_keeps_of_an_earlier_stretch_is_given_back_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML counts it: it would stand in the baseline of a second load, and in the peak of a smaller batch."""
    held = {"kept": 900, "allocated": 100}
    cuda = {
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: None,
        "memory_allocated": lambda device: held["allocated"],
        "max_memory_allocated": lambda device: held["allocated"],
        "empty_cache": lambda: held.update(kept=0),
    }
    for name, replacement in cuda.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    board = SimpleNamespace(held_bytes=lambda: held["kept"] + held["allocated"], tells_own=True)
    with memory.DevicePeak(torch.device("cuda"), cast(Any, board)) as peak:
        held["allocated"] = 500
    assert peak.nvml is not None
    assert (peak.nvml.baseline, peak.nvml.peak) == (100, 500)
    assert (peak.baseline, peak.value) == (100, 500)
