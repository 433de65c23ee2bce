"""A method whose work another library does: `gauge`, a wheel of a few lines that the tests build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from evenbits.compressor import Compressor, Estimate, LayerShape, ModelShapes, Needs, Options, Role
from evenbits.hookspecs import hookimpl

WORKER = Path(__file__).parent / "worker.py"


class GaugeOptions(Options):
    what: Literal["work", "raise", "sleep"] = "work"
    environment: str = "gauge"


def make(options: GaugeOptions) -> Any:
    from safetensors.torch import load_file
    from torch import Tensor

    from evenbits.compressor import PackedLayer, Shared
    from evenbits.foreign import Bench, CheckpointCompressor

    class Rows:
        """Codes and a scale for each row, as the worker's file has them."""

        shared = None

        def __init__(self, file: Path, versions: Mapping[str, str]) -> None:
            self.tensors, self.versions = load_file(file), versions

        def layer(self, shape: LayerShape) -> PackedLayer:
            stored = {role: self.tensors[f"{shape.name}.{role}"] for role in ("code", "scale")}
            return PackedLayer(stored, {"code": Role.CODE, "scale": Role.SCALE})

        def check(self, shape: LayerShape, weight: Tensor, restored: Tensor, moment: Tensor | None) -> None:
            assert float((weight - restored).abs().max()) <= float(weight.abs().max()) / 200

        def rest(self) -> Mapping[str, Tensor]:
            return {}

    class Gauge(CheckpointCompressor):
        def open(self, bench: Bench) -> Rows:
            produced = bench.run(WORKER, options.model_dump())
            return Rows(produced.folder / "rows.safetensors", produced.facts["versions"])

        def restore(self, packed: PackedLayer, layer: LayerShape, shared: Shared | None) -> Tensor:
            return packed.tensors["code"].float() * packed.tensors["scale"][:, None]

    return Gauge()


def predict(options: GaugeOptions, shapes: ModelShapes) -> Estimate:
    rows = sum(layer.out_features for layer in shapes.layers)
    bits = 8 + 32 * rows / shapes.weights
    return Estimate(8.0, bits, {Role.CODE: shapes.weights, Role.SCALE: 4 * rows})


@hookimpl
def provide_compressors() -> Sequence[Compressor]:
    return [
        Compressor(
            name="gauge",
            summary="eight bits a weight by another library",
            paper="none",
            options=GaugeOptions,
            make=make,
            predict=predict,
            fit=lambda budget, shapes, fixed: GaugeOptions.model_validate(dict(fixed)),
            needs=lambda options: Needs(statistics="tokens", environment=options.environment),
        )
    ]
