"""The packed formats that are timed: how a random weight of each is made, and the module that multiplies by it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from evenbits.kernels.weights import CodebookWeight, IntegerWeight
from gpu_parts.packed import Format, bit_stream, codebook, integer
from gpu_parts.part import Setting
from gpu_parts.torch_roads import codes_of

if TYPE_CHECKING:
    from evenbits_pocketllm.kernels import PocketWeight

FOLDED, EXACT = "PocketLLM folded", "PocketLLM exact"
_AT_ONCE = 1 << 20  # sub-vectors whose statistics are computed together


def _integer(weight: IntegerWeight, setting: Setting) -> nn.Module:
    from evenbits.kernels.integer import IntegerLinear

    return IntegerLinear(weight, backend=setting.backend)


def _codebook(weight: CodebookWeight, setting: Setting, table: Any = "exact") -> nn.Module:
    from evenbits.kernels.codebook import CodebookLinear

    return CodebookLinear(weight, backend=setting.backend, table=table)


def _make(setting: Setting, out: int, into: int, seed: int, maker: Any, bits: tuple[int, ...], **more: Any) -> Any:
    if setting.small:  # tables of a few entries: Triton's interpreter is slow
        bits = tuple(min(width, 5) for width in bits)
    return maker(setting, out, into, seed, bits=bits, **more)


def _codes(name: str, shown: str, bits: tuple[int, ...], table: str = "exact", **more: Any) -> Format:
    return Format(name, shown, partial(_make, maker=codebook, bits=bits, **more), partial(_codebook, table=table))


def _grid(bits: int) -> Format:
    def make(setting: Setting, out: int, into: int, seed: int) -> IntegerWeight:
        return integer(setting, out, into, seed, bits=bits, group=8 if setting.small else 128)

    return Format(
        f"integer {bits} bits", f"groups of 128, a float16 scale and a zero point each, {bits} bits", make, _integer
    )


@torch.no_grad()
def pocket(
    setting: Setting, out: int, into: int, seed: int = 0, *, d: int = 8, latent: int | None = None, hidden: int = 16,
    units: int = 3, bits: int = 15, axis: Any = "out", code_order: bool = False, affine: bool = False,
    row_scale: bool = False,
) -> PocketWeight:  # fmt: skip
    """As the paper's recipe leaves a matrix, with a network as training starts it; statistics are the true ones."""
    from evenbits_pocketllm.kernels import PocketWeight, padded
    from evenbits_pocketllm.network import Network, decode_statistics, initial

    if setting.small:
        bits = min(bits, 6)
    latent = latent or d
    lines, length = (out, into) if axis == "in" else (into, out)
    chunks = -(-length // d)
    network = Network(latent, d, hidden, units, "code" if code_order else "row", affine, chunks * latent)
    codebook = setting.normal(1 << bits, latent, seed=seed + 1) * (2 / latent**0.5)
    flat = initial(network, torch.Generator().manual_seed(seed)).to(setting.device)
    if affine:  # training starts at gains of one and biases of zero, which would hide a mistake
        flat = flat + setting.normal(flat.numel(), seed=seed + 2) / 20
    stream = bit_stream(setting, lines * chunks, bits, seed)
    codes = _in_groups(stream, bits, lines, chunks, code_order)
    step = max(1, _AT_ONCE // chunks)
    statistics = [decode_statistics(codebook[part], flat, network) for part in torch.split(codes, step)]
    scale = 1 + setting.normal(out, seed=seed + 3) / 4 if row_scale else None
    return PocketWeight(
        padded(stream), bits, codebook, flat, network, torch.cat(statistics), out, into, axis, code_order, scale
    )


def _in_groups(stream: torch.Tensor, bits: int, lines: int, chunks: int, code_order: bool) -> torch.Tensor:
    """(lines, chunks) int32 or int64: the indices in the order in which they are normalised together."""
    codes = codes_of(stream, bits, lines * chunks).view(lines, chunks)
    return codes.t().reshape(lines, chunks) if code_order else codes


def exact(weight: PocketWeight, setting: Setting) -> nn.Module:
    from evenbits_pocketllm.exact import ExactLinear

    return ExactLinear(weight, backend=setting.backend)


# as `evenbits_pocketllm.folding` leaves a matrix of the paper's recipe, each line with a gain and an offset by number
_POCKET: dict[str, Any] = {"axis": "out", "gain": "number", "offset": "number"}

TIMED: tuple[Format, ...] = (
    _codes(FOLDED, "d = 8, K = 2^15, lines along the outputs, gain and offset by number", (15,), **_POCKET),
    _grid(4),
    Format(EXACT, "d = 8, K = 2^15, three units of 16, each line's statistics", pocket, exact, False),
    _codes(f"{FOLDED}, 8-bit table", "the same, the table rounded to 8 bits a number", (15,), "int8", **_POCKET),
    _codes("AQLM 1x16", "one codebook of 2^16 for 8 weights, row scales", (16,), row_scale=True),
    _codes("AQLM 2x8", "two codebooks of 2^8 for 8 weights, row scales", (8, 8), row_scale=True, interleaved=True),
    _codes(
        "VPTQ", "v = 8 along the outputs, 2^12 and 2^8 residual, a scale and a bias a column", (12, 8),
        axis="out", gain="line", offset="line",
    ),
    _grid(3),
    _grid(2),
)  # fmt: skip


def named(name: str) -> Format:
    return next(kind for kind in TIMED if kind.name == name)
