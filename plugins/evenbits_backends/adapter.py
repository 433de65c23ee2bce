"""A library as a compressor: a worker runs it in an environment of its own, and its checkpoint is stored verbatim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from evenbits.compressor import LayerShape, Options, PackedLayer, Shared
from evenbits.errors import TrialFailed
from evenbits.foreign import Bench, Checkpoint, CheckpointCompressor
from evenbits_backends.opened import StoredCheckpoint, decode
from evenbits_backends.trust import Claim

WORKERS = Path(__file__).parent / "workers"
PROBES = "probes.safetensors"  # beside result.json: what the library's own layers gave, (rows, out) by layer's name
PROBE_ROWS = 8


class Adapter(CheckpointCompressor):
    """worker: a file of workers/ without its ending; options go to it as they are.

    objection: (options, layer) -> why the library does not take that layer, known before it is started.
    """

    def __init__(
        self,
        worker: str,
        options: Options,
        claim: Claim,
        objection: Callable[[Any, LayerShape], str | None] = lambda options, layer: None,
    ) -> None:
        self.worker, self.options, self.claim, self.objection = worker, options, claim, objection

    def request(self) -> dict[str, Any]:
        return self.options.model_dump(mode="json")

    def open(self, bench: Bench) -> Checkpoint:
        for layer in bench.shapes.layers:
            if why := self.objection(self.options, layer):
                raise TrialFailed(why)
        probes = make_probes(bench)
        named = {f"probe/{width}": probe for width, probe in probes.items()}
        produced = bench.run(WORKERS / f"{self.worker}.py", self.request(), named)
        path = produced.folder.parent / PROBES
        if not path.is_file():
            raise TrialFailed(f"{self.worker}: its own layers gave no outputs to check against ({PROBES} is missing)")
        outputs = load_file(path)
        if missing := [layer.name for layer in bench.shapes.layers if layer.name not in outputs]:
            raise TrialFailed(f"{self.worker}: no output of its own layer {missing[0]!r} to check against")
        return StoredCheckpoint(
            produced.folder, bench.model, bench.dtype, self.claim,
            versions=produced.facts.get("versions", {}), probes=probes, outputs=outputs,
        )  # fmt: skip

    def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
        return decode(packed, layer, shared)


def make_probes(bench: Bench) -> dict[int, Tensor]:
    """(PROBE_ROWS, in) float32 Gaussians for every width of input, the same for every library."""
    widths = sorted({layer.in_features for layer in bench.shapes.layers})
    return {width: torch.randn(PROBE_ROWS, width, generator=torch.Generator().manual_seed(width)) for width in widths}
