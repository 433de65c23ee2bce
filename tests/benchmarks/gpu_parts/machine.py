"""What this machine can do: the ceilings that the other parts are held against."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from gpu_parts.part import Column, Item, Part, Row, Setting
from gpu_parts.timing import alone, captured

# dense rates and bandwidth by the vendor's datasheets, for the SXM parts that nvidia-smi names so
_DATASHEET = {
    "NVIDIA H200": {
        "copy": 4.8e12, "read": 4.8e12, "float16": 989e12, "bfloat16": 989e12, "tf32": 494e12, "float32": 67e12,
    },
    "NVIDIA H100 80GB HBM3": {
        "copy": 3.35e12, "read": 3.35e12, "float16": 989e12, "bfloat16": 989e12, "tf32": 494e12, "float32": 67e12,
    },
    "NVIDIA A100-SXM4-80GB": {
        "copy": 2.04e12, "read": 2.04e12, "float16": 312e12, "bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12,
    },
}  # fmt: skip
_LAUNCHES = 500


def items(setting: Setting) -> Iterable[Item]:
    made: list[tuple[str, Callable[[Setting], Row]]] = [("copy", _copy), ("read", _read)]
    made += [(f"matmul {kind}", lambda s, kind=kind: _matmul(s, kind)) for kind in _KINDS]  # type: ignore[misc]
    made += [("launch", lambda s: _launch(s, graph=False)), ("launch in a graph", lambda s: _launch(s, graph=True))]
    return [Item(name, lambda run=run: [run(setting)]) for name, run in made]  # type: ignore[misc]


def _row(setting: Setting, what: str, kind: str, rate: float, unit: str, seconds: float) -> Row:
    name = torch.cuda.get_device_name(setting.device) if setting.cuda else ""
    promised = _DATASHEET.get(name, {}).get(kind)
    scale = 1e12
    return {
        "what": what, "kind": kind, "rate": rate, "unit": unit, "shown": rate / scale, "ms": seconds * 1e3,
        "datasheet": promised / scale if promised else None, "fraction": rate / promised if promised else None,
    }  # fmt: skip


def _copy(setting: Setting) -> Row:
    count = 1 << (16 if setting.small else 30)  # float32: 4 GiB read and 4 GiB written
    source = setting.normal(count)
    target = torch.empty_like(source)
    seconds = alone(setting, lambda: target.copy_(source)).seconds
    return _row(
        setting, f"copy, {_size(source)}", "copy", 2 * source.nbytes / seconds, "TB/s, read and written", seconds
    )


def _read(setting: Setting) -> Row:
    source = setting.normal(1 << (16 if setting.small else 30))
    out = torch.empty((), device=setting.device)
    seconds = alone(setting, lambda: torch.sum(source, dim=0, out=out)).seconds
    return _row(setting, f"sum, {_size(source)}", "read", source.nbytes / seconds, "TB/s, read", seconds)


_KINDS = ("float16", "bfloat16", "tf32", "float32")


def _matmul(setting: Setting, kind: str) -> Row:
    size = 64 if setting.small else 4096 if kind == "float32" else 8192
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    left, right = (setting.normal(size, size, dtype=dtype, seed=seed) for seed in (1, 2))
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        seconds = alone(setting, lambda: left @ right).seconds
    finally:
        torch.set_float32_matmul_precision("highest")
    return _row(setting, f"matmul {kind}, {size} cubed", kind, 2 * size**3 / seconds, "TFLOP/s", seconds)


def _launch(setting: Setting, graph: bool) -> Row:
    """Microseconds of an empty launch: an addition to one number."""
    count = 5 if setting.small else _LAUNCHES
    number = torch.zeros(1, device=setting.device)

    def many() -> Tensor:
        for _ in range(count):
            number.add_(1)
        return number

    run, note = captured(setting, many) if graph else (many, "")
    if run is None:
        return {"what": f"an empty launch in a graph: {note}", "kind": "launch in a graph"}
    seconds = alone(setting, run, calls=count).seconds
    kind = "launch in a graph" if graph else "launch"
    return {
        "what": f"an empty {kind}", "kind": kind, "rate": seconds, "unit": "µs", "shown": seconds * 1e6,
        "ms": seconds * 1e3,
    }  # fmt: skip


def _size(tensor: Tensor) -> str:
    size = float(tensor.nbytes)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.0f} GiB"


PART = Part(
    "machine",
    "What the machine can do",
    "Medians. The copy and the matrix products, on random data, are the rooflines of the parts below.",
    20,
    (
        Column("what", "measured"),
        Column("shown", "rate", ".3g"),
        Column("unit", "unit"),
        Column("ms", "ms", ".4g"),
        Column("datasheet", "datasheet", ".3g"),
        Column("fraction", "of it", ".0%"),
    ),
    items,
)
