"""What a stored model costs on this machine: bytes, milliseconds, tokens per second, memory.

It makes no claim about hardware that it did not run on, nor about a kernel that did not run: both are part of each
fingerprint (see `workload.what_ran`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from evenbits.measure import Finding, Measurement, ProfileSubject, Remark
from evenbits_hardware.absent import NoMeter
from evenbits_hardware.latency import time_and_rate
from evenbits_hardware.memory import ALLOCATOR, DevicePeak, set_aside
from evenbits_hardware.nvml import Board
from evenbits_hardware.options import HardwareOptions
from evenbits_hardware.workload import (
    check_device,
    left_dense,
    open_subject,
    prepare,
    was_cut,
    what_ran,
    which_kernels,
)

BEFORE = "one load and run"  # of what a process does before its memory is metered


def load_metered(
    subject: ProfileSubject, options: HardwareOptions, board: Board | None = None
) -> tuple[nn.Module, DevicePeak]:
    """The model, and the memory it took to load it.

    A first load also imports code and makes what libraries make once (threads, tables), and so does a first run
    (workspaces of matrix products, kernels of packed layers, which are compiled then), which dwarfs a small model and
    depends on what this process did before. So a model is loaded and run, and only the second one counts.
    """
    model = open_subject(subject, options.weights)
    for size in options.batch_sizes:
        with contextlib.suppress(torch.cuda.OutOfMemoryError):  # said when this size is measured
            prepare(model, options, size, subject).repeat()
    del model
    with DevicePeak(subject.device, board) as peak:
        model = open_subject(subject, options.weights)
    return model, peak


class HardwareProfiler:
    """Opens the model under a memory meter; for each batch size warms up under another, then times without any."""

    def __init__(self, options: HardwareOptions) -> None:
        self.options = options

    def profile(self, subject: ProfileSubject) -> Sequence[Finding]:
        """A batch size that does not fit the GPU's memory is a remark, and the others stay.

        Raises TrialFailed on a device other than CPU and CUDA, or for a model without KV cache.
        """
        check_device(subject, "hardware")
        with set_aside():
            return self._profile(subject)

    def _profile(self, subject: ProfileSubject) -> Sequence[Finding]:
        options = self.options
        remarks: list[Finding] = []
        board = _board(subject, remarks)
        model, loading = load_metered(subject, options, board)
        ran = what_ran("hardware", subject, options.weights)
        repeats = len(options.batch_sizes) * (options.warmup + options.repeats)
        tick = subject.progress(repeats, "hardware")
        timed: list[Finding] = []
        memory: list[Finding] = []
        for index, size in enumerate(options.batch_sizes):
            suffix = f"_b{size}" if index else ""
            out_of_memory = False
            try:
                times, warming = self._batch(model, size, suffix, loading, board, subject, ran, tick)
            except torch.cuda.OutOfMemoryError:
                out_of_memory = True
            if out_of_memory:  # not in the handler: its traceback still holds the tensors that did not fit
                torch.cuda.empty_cache()
                text = f"{ran['device_name']} has too little memory for batch size {size}: it is not measured"
                remarks.append(Remark(text))
                continue
            timed += times
            memory += warming
        stored = options.weights == "restored"  # what does not depend on how the model is opened is said there alone
        return [
            *(_sizes(subject) if stored else ()),
            *timed,
            *_memory("memory_load", loading, loading, ran),
            *(_compression(subject, ran) if stored else ()),
            *memory,
            *remarks,
            *left_dense(model),
        ]

    def _batch(
        self,
        model: nn.Module,
        size: int,
        suffix: str,
        loading: DevicePeak,
        board: Board | None,
        subject: ProfileSubject,
        ran: Mapping[str, Any],
        tick: Callable[[int], None],
    ) -> tuple[list[Finding], list[Finding]]:
        """Latency and rates, and the memory peak of inference, of one batch size."""
        options = self.options
        work = prepare(model, options, size, subject)
        warming = DevicePeak(subject.device, board)
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
        asked = {**ran, **work.facts, "cut_to_context": was_cut(work, options)}
        timed = {**asked, "warmup": options.warmup}
        kernels = which_kernels(model, work)
        times: list[Finding] = [
            *time_and_rate("prefill", "ms", prefill, work.prompt.numel(), timed, subject.seed, suffix, kernels),
            *time_and_rate("decode", "ms/token", decode, size, timed, subject.seed, suffix, kernels),
        ]
        return times, _memory("memory_inference", warming, loading, asked, suffix, kernels)


def _board(subject: ProfileSubject, remarks: list[Finding]) -> Board | None:
    """NVML's view of the GPU; without it a remark says why, and the allocator's figures stay."""
    if subject.device.type != "cuda":
        return None
    try:
        return Board(subject.device)
    except NoMeter as error:
        remarks.append(Remark(f"no memory was measured by NVML: {error}"))
        return None


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


def _memory(
    name: str,
    peak: DevicePeak,
    loading: DevicePeak,
    fingerprint: Mapping[str, Any],
    suffix: str = "",
    more: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """Growth over what was held before the model was loaded: the process brings torch along, which is no method's."""

    def grown(label: str, value: int, baseline: int, meter: str) -> Measurement:
        return Measurement(
            name=f"{name}{label}_bytes{suffix}",
            value=float(max(0, value - baseline)),
            unit="bytes",
            better="lower",
            fingerprint={**fingerprint, "meter": meter, "before": BEFORE},
            details={
                "peak_bytes": value,
                "baseline_bytes": baseline,
                "host_peak_bytes": peak.host.peak,
                "host_baseline_bytes": loading.host.baseline,
                "host_meter": peak.host.meter,
                **(more or {}),
            },
            volatile=True,
        )

    found: list[Finding] = [grown("", peak.value, loading.baseline, peak.meter)]
    if peak.nvml is not None and loading.nvml is not None:
        failed = peak.nvml.failed or loading.nvml.failed
        if failed is None:
            found.append(grown("_nvml", peak.nvml.peak, loading.nvml.baseline, peak.nvml.meter))
        else:
            found.append(Remark(f"{name} was not measured by NVML: {failed}"))
    return found


def _compression(subject: ProfileSubject, fingerprint: Mapping[str, Any]) -> list[Measurement]:
    """What the harness saw of the compress stage's own process, above its start; the dense model has none."""
    seconds = {} if subject.compress_seconds is None else {"compress_seconds": subject.compress_seconds}
    host = subject.compress_peak_bytes
    device = subject.compress_device_peak_bytes
    if device is None:
        peak, meter = host, "host RSS of the compress stage"
    else:
        peak, meter = device, f"{ALLOCATOR} of the compress stage"
    if peak is None:
        return []
    return [
        Measurement(
            name="memory_compress_bytes",
            value=float(peak),
            unit="bytes",
            better="lower",
            fingerprint={**fingerprint, "meter": meter},
            details={**seconds, "host_peak_bytes": host},
            volatile=True,
        )
    ]
