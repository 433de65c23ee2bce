"""A plugin that misbehaves on demand: what the harness must survive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from evenbits.compressor import Compressor, Estimate, Options, Role
from evenbits.hookspecs import hookimpl
from evenbits.measure import Evaluator, Measurement, Profiler

What = Literal[
    "nothing", "kill", "segfault", "raise", "sleep", "memory", "exit", "print", "linger", "offspring", "odd-details",
    "nan", "wrong-shape",
]  # fmt: skip


class TroubleOptions(Options):
    what: What = "nothing"
    count: str | None = None  # a file that gets a line for each call


class SpanOptions(Options):
    file: str
    kind: str
    seconds: float = 0.3


def trouble(what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "raise":
        raise RuntimeError("first line\nsecond line")
    elif what == "sleep":
        time.sleep(600)
    elif what == "memory":
        kept = []
        for _ in range(64):
            kept.append(bytearray(os.urandom(1024)) * (32 * 1024))  # 32 MiB of touched pages
            time.sleep(0.03)
        time.sleep(600)
    elif what == "exit":
        os._exit(3)
    elif what == "print":
        print("hello from print")
        sys.stderr.write("hello from stderr\n")
        os.write(1, b"hello from the descriptor\n")
    elif what == "linger":
        threading.Thread(target=time.sleep, args=(600,), daemon=False).start()
    elif what == "offspring":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # evenbits-offspring"])
        time.sleep(600)


def make(options: TroubleOptions) -> Any:
    import torch
    from torch import Tensor

    from evenbits.compressor import Layer, LayerCompressor, LayerShape, PackedLayer, Shared

    class HalfPrecision(LayerCompressor):
        """Stores float16 weights."""

        def compress(
            self, weight: Tensor, layer: Layer, shared: Shared | None, generator: torch.Generator
        ) -> PackedLayer:
            if layer.shape.block == 1 and layer.shape.kind == "mlp.down_proj":  # the last layer: all else was done
                if options.count is not None:
                    with Path(options.count).open("a") as file:
                        file.write("compressed\n")
                trouble(options.what)
            return PackedLayer({"code": weight.half()}, {"code": Role.CODE})

        def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
            weight = packed.tensors["code"].float()
            return weight.T.contiguous()[:1] if options.what == "wrong-shape" else weight

    return HalfPrecision()


class TroubleEvaluator:
    def __init__(self, options: TroubleOptions) -> None:
        self.options = options

    def evaluate(self, subject: Any) -> Sequence[Measurement]:
        trouble(self.options.what)
        details = {"object": object()} if self.options.what == "odd-details" else {}
        value = float("nan") if self.options.what == "nan" else 1.0
        return [Measurement("trouble", value, "points", "higher", details=details)]


class Span:
    """Writes when it began and ended."""

    def __init__(self, options: SpanOptions) -> None:
        self.options = options

    def evaluate(self, subject: Any) -> Sequence[Measurement]:
        begun = time.time()
        time.sleep(self.options.seconds)
        with Path(self.options.file).open("a") as file:
            file.write(f"{self.options.kind} {begun} {time.time()}\n")
        return []

    profile = evaluate


@hookimpl
def provide_compressors() -> Sequence[Compressor]:
    return [
        Compressor(
            name="trouble",
            summary="float16, with trouble",
            paper="none",
            options=TroubleOptions,
            make=make,
            predict=lambda options, shapes: Estimate(16.0, 16.0, {Role.CODE: 2 * shapes.weights}),
            fit=lambda budget, shapes, fixed: TroubleOptions.model_validate(dict(fixed)),
        )
    ]


@hookimpl
def provide_evaluators() -> Sequence[Evaluator]:
    return [
        Evaluator("trouble-eval", "misbehaves", TroubleOptions, TroubleEvaluator),
        Evaluator("span-eval", "takes its time", SpanOptions, Span),
    ]


@hookimpl
def provide_profilers() -> Sequence[Profiler]:
    return [Profiler("span-profile", "takes its time, alone", SpanOptions, Span)]
