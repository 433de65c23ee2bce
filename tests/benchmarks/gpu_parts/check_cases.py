"""What is checked: searches, and packed layers of every format, width, shape and type."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_parts import formats
from gpu_parts.check import TOLERANCE, Judge, compare, linear, of_products
from gpu_parts.formats import EXACT, TIMED
from gpu_parts.linear import DECODE, PREFILL
from gpu_parts.packed import Format, codebook, dense, integer
from gpu_parts.part import Item, Row, Setting

TYPES = (torch.float16, torch.bfloat16, torch.float32)
_ROWS = (1, 3, 17, 130)  # one row, few, a tile of the matrix unit with a rest, beyond what is fused
# of those of the part "linear" a large one of Llama's, the longest sums, and one too narrow to fill the GPU: these
# compile nearly all that the others take
_TIMED_SHAPES = ((11008, 4096), (5120, 17408), (1024, 5120))
# vectors, centres, numbers: sizes that are timed, fewer of them; awkward ones
TIMED_SEARCHES = ((1 << 16, 1 << 15, 8), (1 << 14, 1 << 12, 4), (1 << 14, 1 << 15, 16))
SEARCHES = ((1, 1, 1), (33, 17, 4), (4099, 4096, 8), (513, 1000, 16), (130, 70, 33), (77, 129, 64))
_WEIGHTED = (33, 4099)  # the numbers of vectors of those that are also searched with weights
_SEARCH_TOLERANCE = {"fma": 2e-6, "tf32x3": 4e-6}


def cases(setting: Setting) -> Iterator[Item]:
    """Those of most weight first: where time runs out, what comes last is left out, and named.

    The shapes that are timed come first. With them every kernel of the parts that follow is compiled here, where
    processes share the work, and lies in Triton's cache when these parts look for it.
    """
    if not setting.small:
        yield from _searches(setting, TIMED_SEARCHES)
        yield from _timed(setting)
    yield from _integers(setting)
    yield from _codebooks(setting)
    yield from _pockets(setting)
    yield from _units(setting)
    yield from _searches(setting, ((33, 17, 4), (514, 3, 2)) if setting.small else SEARCHES)
    for precision in ("fma", "tf32x3"):
        yield Item(f"search ties {precision}", partial(_ties, setting, precision))


def _timed(setting: Setting) -> Iterator[Item]:
    """Layers of the part "linear", an item for each format and number of rows: what it compiles is no other item's."""
    for rows in (PREFILL, *DECODE):
        for kind in TIMED:
            yield Item(f"{kind.name} as timed, {rows} rows", partial(_at, setting, kind, rows))


def _at(setting: Setting, kind: Format, rows: int) -> list[Row]:
    from evenbits_pocketllm.kernels import weight as twin

    found: list[Row] = []
    for out, into in _TIMED_SHAPES:
        packed = kind.make(setting, out, into, 0)
        reference = twin(packed) if kind.name == EXACT else dense(packed)
        module = kind.build(packed, setting)
        found += linear(setting, kind.name, f"{out}x{into}", torch.float16, module, reference, [rows])
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- searches


def _searches(setting: Setting, sizes: Iterable[tuple[int, int, int]]) -> Iterator[Item]:
    for n, k, d in sizes:
        for precision in ("fma", "tf32x3"):
            for weighted in (False, True) if n in _WEIGHTED else (False,):
                if precision == "tf32x3" and (2 * d if weighted else d) > 64:
                    continue
                shown = f"n={n} K={k} d={d} {precision}{' weighted' if weighted else ''}"
                yield Item(f"search {shown}", partial(_search, setting, n, k, d, precision, weighted, shown))


def _search(setting: Setting, n: int, k: int, d: int, precision: Any, weighted: bool, case: str) -> list[Row]:
    from evenbits.kernels.nearest import search

    vectors, centres = setting.normal(n, d, seed=n), setting.normal(k, d, seed=k + 1)
    weights = setting.normal(n, d, seed=n + 2).square() if weighted else None
    run = partial(search, vectors, centres, weights, precision=precision, backend="triton")
    return compare(
        setting, f"search {precision}", case, torch.float32, run, _farther(vectors, centres, weights),
        _SEARCH_TOLERANCE[precision],
    )  # fmt: skip


def _farther(vectors: Tensor, centres: Tensor, weights: Tensor | None) -> Judge:
    """How much farther the found centres are than the nearest, over (|v| + |c|)^2, at most; all in float64."""
    v, c = vectors.double(), centres.double()
    w = torch.ones_like(v) if weights is None else weights.double()

    def judge(found: Tensor) -> float:
        if found.shape != (len(v),) or found.dtype != torch.int64 or not bool(((found >= 0) & (found < len(c))).all()):
            return math.inf
        worst = 0.0
        for at in range(0, len(v), 4096):
            part, weight = v[at : at + 4096], w[at : at + 4096]
            # not by the formula of the kernel: the differences themselves, for the centre found and the nearest
            least = (
                torch.cdist(part, c, compute_mode="donot_use_mm_for_euclid_dist").square().amin(1)
                if weights is None
                else _least_weighted(part, weight, c)
            )
            chosen = c[found[at : at + 4096]]
            distance = (weight * (part - chosen).square()).sum(1)
            size = ((weight * part.square()).sum(1).sqrt() + (weight * chosen.square()).sum(1).sqrt()).square()
            worst = max(worst, float(((distance - least) / size.clamp_min(1e-30)).max()))
        return worst

    return judge


def _least_weighted(vectors: Tensor, weights: Tensor, centres: Tensor) -> Tensor:
    step = max(1, (1 << 24) // vectors.numel())
    parts = [
        (weights[:, None] * (vectors[:, None] - part[None]).square()).sum(2).amin(1)
        for part in torch.split(centres, step)
    ]
    return torch.stack(parts).amin(0)


def _ties(setting: Setting, precision: Any) -> list[Row]:
    """Whole numbers, many of them equal: sums are exact, and the lowest of the nearest must be found."""
    from evenbits.kernels.nearest import search

    n, k = (70, 100) if setting.small else (5000, 1500)
    vectors = setting.normal(n, 3, seed=1).mul(2).round()
    centres = setting.normal(k, 3, seed=2).mul(2).round()
    distances = (vectors[:, None].double() - centres[None].double()).square().sum(2)
    first = torch.arange(k, device=setting.device)
    # argmin promises no order among equals
    expected = torch.where(distances == distances.amin(1, keepdim=True), first, k).amin(1)
    run = partial(search, vectors, centres, precision=precision, backend="triton")

    def judge(found: Tensor) -> float:
        return float((found != expected).double().mean()) if found.shape == expected.shape else math.inf

    return compare(setting, f"search {precision}", f"ties, n={n} K={k} d=3", torch.float32, run, judge, 0.0)


# --- integers


def _integers(setting: Setting) -> Iterator[Item]:
    shapes = [((33, 200), {"group": 128}), ((65, 96), {"group": 32, "zero": False})]
    extra = [
        ((64, 144), {"group": 48}), ((40, 70), {"group": 70}), ((96, 256), {"group": 64, "order": True}),
        ((96, 130), {"group": 64, "levels": True}), ((17, 1), {"group": 1}), ((1, 300), {"group": 100}),
    ]  # fmt: skip
    if setting.small:
        yield _integer(setting, (24, 40), 2, torch.float32, {"group": 20, "order": True})
        yield Item("integer every configuration", partial(_every_configuration, setting, 3, torch.float16))
        return
    for bits in (4, 3, 2, 8, 5, 6, 7):
        common = bits in (2, 3, 4)
        for dtype in TYPES if common else TYPES[:1]:
            for shape, more in shapes if common else shapes[:1]:
                yield _integer(setting, shape, bits, dtype, more)
    for dtype in TYPES:
        for bits in (4, 3, 2, 8) if dtype == torch.float16 else (4,):
            name = f"integer every configuration, {bits} bits {_short(dtype)}"
            yield Item(name, partial(_every_configuration, setting, bits, dtype))
    for place, (shape, more) in enumerate(extra):
        yield _integer(setting, shape, 3 + place % 2, TYPES[place % 3], more)


def _integer(setting: Setting, shape: tuple[int, int], bits: int, dtype: torch.dtype, more: dict[str, Any]) -> Item:
    words = " ".join(f"{key} {value}" for key, value in more.items())
    case = f"{shape[0]}x{shape[1]}, {bits} bits, {words}"

    def run() -> list[Row]:
        from evenbits.kernels.integer import IntegerLinear

        weight = integer(setting, *shape, seed=bits, bits=bits, **more)
        module = IntegerLinear(weight, backend="triton")
        return linear(setting, "integer", case, dtype, module, dense(weight), (17,) if setting.small else _ROWS)

    return Item(f"integer {case} {_short(dtype)}", run)


def _every_configuration(setting: Setting, bits: int, dtype: torch.dtype) -> list[Row]:
    """Those too that the layer takes at shapes of its own choosing only: by the functions below it."""
    from evenbits.kernels import integer_launch
    from evenbits.kernels.gpu import integer as gpu
    from evenbits.kernels.integer import IntegerLinear

    out, into, rows = (17, 130, 3) if setting.small else (200, 700, 21)
    weight = integer(setting, out, into, seed=9, bits=bits)
    layer = IntegerLinear(weight, backend="triton")
    inputs = setting.normal(rows, into, dtype=dtype, seed=rows)
    judge = of_products(inputs, dense(weight))

    def product(way: str, name: str) -> Tensor:
        found = torch.empty(rows, out, dtype=dtype, device=setting.device)
        integer_launch.product(layer, inputs, found, way, name)
        return found

    found: list[Row] = []
    for way, kernel in (("matmul", gpu.MATMUL), ("gemv", gpu.GEMV)):
        for config in kernel.configs:
            run = partial(product, way, config.name)
            case = f"{out}x{into}, {bits} bits, {rows} rows, {way} {config.name}"
            found += compare(setting, "integer", case, dtype, run, judge, TOLERANCE[dtype])
    return found


# --- units of PocketLLM's networks, in training


def _units(setting: Setting) -> Iterator[Item]:
    sizes = [(70, 8, 16, 8)] if setting.small else [(20_000, 8, 16, 8), (1, 4, 16, 4), (131, 3, 5, 7), (64, 16, 32, 16)]
    for count, *widths in sizes:
        yield Item(f"unit of {widths}, {count} vectors", partial(_unit, setting, count, *widths))


def _unit(setting: Setting, count: int, inputs: int, hidden: int, outputs: int) -> list[Row]:
    """Outputs, and gradients of inputs and parameters, against autograd in float64."""
    from evenbits_pocketllm.unit import fused_unit, unit_numbers

    numbers = setting.normal(count, inputs, seed=1)
    flat = setting.normal(unit_numbers(inputs, hidden, outputs), seed=2) / 2
    slope = setting.normal(count, outputs, seed=3)

    def plain(numbers: Tensor, flat: Tensor) -> Tensor:
        enter, shift, leave, rest = torch.split(flat, [hidden * inputs, hidden, outputs * hidden, outputs])
        inner = torch.nn.functional.gelu(numbers @ enter.view(hidden, inputs).t() + shift)
        out: Tensor = inner @ leave.view(outputs, hidden).t() + rest
        return out

    def passed(unit: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [part.detach().to(dtype).requires_grad_() for part in (numbers, flat)]
        out = unit(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, slope.to(dtype))]

    exact = passed(plain, torch.float64)
    scales = [part.square().mean().sqrt() for part in exact]

    def run() -> Tensor:
        found = passed(lambda numbers, flat: fused_unit(numbers, flat, hidden, outputs), torch.float32)
        return torch.cat([part.flatten() for part in found])

    def judge(found: Tensor) -> float:
        parts = torch.split(found.double(), [part.numel() for part in exact])
        errors = [
            (part - one.flatten()).abs().max() / scale for part, one, scale in zip(parts, exact, scales, strict=True)
        ]
        return float(torch.stack(errors).max())

    case = f"{count} vectors, {inputs} - {hidden} - {outputs}"
    return compare(setting, "PocketLLM unit", case, torch.float32, run, judge, TOLERANCE[torch.float32])


# --- codebooks


def _codebooks(setting: Setting) -> Iterator[Item]:
    named: list[tuple[str, dict[str, Any]]] = [
        ("folded", {"bits": (15,), "axis": "out", "gain": "number", "offset": "number"}),
        ("folded along inputs", {"bits": (15,), "gain": "number", "offset": "number", "row_scale": True}),
        ("1x16", {"bits": (16,), "row_scale": True}),
        ("2x8", {"bits": (8, 8), "row_scale": True, "interleaved": True}),
        ("residual", {"bits": (12, 8), "axis": "out", "gain": "line", "offset": "line"}),
        ("window", {"bits": (2,), "window": 12, "d": 1, "axis": "out", "row_scale": True}),
        ("window of 4", {"bits": (4,), "window": 14, "d": 4}),
        ("several books", {"bits": (9,), "d": 4, "several": 5, "gain": "line"}),
        ("several books along outputs", {"bits": (6,), "d": 4, "several": 3, "axis": "out", "table": torch.float32}),
        ("threes", {"bits": (5,), "d": 3, "gain": "line"}),
        ("sixes along outputs", {"bits": (10, 7), "d": 6, "axis": "out", "offset": "number"}),
        ("sixteens", {"bits": (11,), "d": 16}),
    ]
    shape = 67, 93  # round ones are the timed ones
    if setting.small:
        named = [(name, _fewer(more)) for name, more in named if name in ("folded", "2x8")]
        shape = 9, 13
    for dtype in TYPES[:1] if setting.small else TYPES:
        for name, more in named if dtype == torch.float16 else named[:6]:
            yield _codebook(setting, name, shape, dtype, more)
    if setting.small:
        yield _codebook(setting, "2x8", shape, torch.float16, named[1][1], rows=(40, 70))
        yield _codebook(setting, "2x8", shape, torch.bfloat16, named[1][1], rows=(5,))
        yield _codebook(setting, "2x8", shape, torch.float32, named[1][1], rows=(5,))
        yield _codebook(setting, "2x8", shape, torch.float16, named[1][1], "int8", rows=(17,))
        return
    for name, more in (named[0], named[2], named[4]):
        yield _codebook(setting, name, shape, torch.float16, more, table="int8")
    for width in range(1, 17):
        more = {"bits": (width,), "axis": ("in", "out")[width % 2]}
        yield _codebook(setting, "width", shape, torch.float16, more, rows=(1, 70), configurations=1)


def _fewer(more: dict[str, Any]) -> dict[str, Any]:
    """Smaller tables, for the interpreter."""
    found = more | {"bits": tuple(min(width, 5) for width in more["bits"])}
    if len(more["bits"]) == 2 and more.get("interleaved"):
        found["bits"] = (5, 5)
    return found | ({"window": min(more["window"], 8)} if "window" in more else {})


def _codebook(
    setting: Setting, name: str, shape: tuple[int, int], dtype: torch.dtype, more: dict[str, Any],
    table: Any = "exact", rows: tuple[int, ...] = (), configurations: int = 32,
) -> Item:  # fmt: skip
    widths = "+".join(map(str, more["bits"]))
    case = f"{name}, {shape[0]}x{shape[1]}, {widths} bits {more.get('axis', 'in')}, table {table}"

    def run() -> list[Row]:
        from evenbits.kernels.codebook import CodebookLinear

        weight = codebook(setting, *shape, seed=3, **more)
        module = CodebookLinear(weight, backend="triton", table=table)
        counts = rows or ((1,) if setting.small else _ROWS)
        return linear(setting, f"codebook {table}", case, dtype, module, dense(weight), counts, configurations)

    return Item(" ".join(["codebook", case, _short(dtype), *map(str, rows)]), run)


# --- PocketLLM's exact decoding


def _pockets(setting: Setting) -> Iterator[Item]:
    named: list[tuple[str, dict[str, Any]]] = [
        ("paper", {}),
        ("paper, row scales", {"row_scale": True}),
        ("along inputs", {"axis": "in", "row_scale": True, "d": 4}),
        ("the code's order", {"axis": "in", "d": 4, "code_order": True, "affine": True}),
        ("two units", {"units": 2, "hidden": 32, "d": 6, "latent": 5}),
        ("wide", {"units": 2, "hidden": 24, "d": 20}),
    ]
    if setting.small:  # groups long enough for every configuration
        yield _pocket(setting, "along inputs", (1, 1040), torch.float16, {"axis": "in"})
        yield _pocket(setting, named[3][0], (8, 16), torch.float16, named[3][1], rows=(3,))
        yield _pocket(setting, named[5][0], (20, 3), torch.float16, named[5][1], rows=(3,))
        return
    for dtype in TYPES:
        for name, more in named if dtype == torch.float16 else named[1:4]:
            yield _pocket(setting, name, (67, 93), dtype, more)
    yield _pocket(setting, "long groups", (33, 1100), torch.float16, {"axis": "in"})
    # as wide as the kernels take
    yield _pocket(setting, "widest", (128, 70), torch.float16, {"d": 64, "hidden": 256, "units": 2, "bits": 9})


def _pocket(
    setting: Setting, name: str, shape: tuple[int, int], dtype: torch.dtype, more: dict[str, Any],
    rows: tuple[int, ...] = (),
) -> Item:  # fmt: skip
    case = f"{name}, {shape[0]}x{shape[1]}"
    run = partial(_exact, setting, case, shape, dtype, more, rows or ((1, 17) if setting.small else _ROWS))
    return Item(f"PocketLLM exact {case} {_short(dtype)}", run)


def _exact(
    setting: Setting, case: str, shape: tuple[int, int], dtype: torch.dtype, more: dict[str, Any],
    rows: tuple[int, ...],
) -> list[Row]:  # fmt: skip
    from evenbits_pocketllm.kernels import weight as twin

    packed = formats.pocket(setting, *shape, 5, **more)
    module = formats.exact(packed, setting)
    return linear(setting, "PocketLLM exact", case, dtype, module, twin(packed), rows)
