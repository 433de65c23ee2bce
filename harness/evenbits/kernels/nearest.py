"""Nearest centre of each vector, exactly and without the matrix of distances: a Triton kernel and its torch twin.

Notable: one instruction a (vector, centre) pair for the minimum, see nearest.md. Unlike faiss, ties always go to the
lowest index. Gradients do not flow.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from evenbits.kernels.launch import TUNER, Backend, Choice, Config, triton_refusal

Precision = Literal["auto", "fma", "tf32x3"]

LONGEST = 64  # numbers a vector
_TILE, _TENSOR_TILE = 16, 64  # centres; the table is filled up to the larger
_WIDEST_FMA, _WIDEST_TENSOR = 32, 64  # factors a pair: past the first "auto" takes the matrix unit
_CHUNK, _CHUNK_GPU = 1 << 18, 1 << 24  # distances held at a time by the twin: 1 MiB stays in a CPU's cache
# programs wanted for each multiprocessor, which holds three at a time, and the least tiles worth a program
_PROGRAMS, _SHORTEST = 32, 4


class Codebook:
    """Centres as the kernels read them: made once, searched many times.

    centres: (k, d), any strides; k from 1, d from 1 to 64; computed in float32 (float64 stays so for the twin).
    weighted: for searches with weights (a table of twice the length). A centre that is not finite is never nearest.
    Nothing here waits for the device: making one, `update` and `search` may stand in a captured CUDA graph.
    """

    def __init__(self, centres: Tensor, weighted: bool = False) -> None:
        if centres.ndim != 2 or not centres.shape[0] or not 1 <= centres.shape[1] <= LONGEST:
            raise ValueError(f"centres (k > 0, d from 1 to {LONGEST}), not {tuple(centres.shape)}")
        self.count, self.length = centres.shape
        self.weighted = weighted
        self.width = 2 * self.length if weighted else self.length
        if _numbers(self.count, self.width) >= 2**31:
            raise ValueError(f"{self.count} centres of {self.length}: a table of 2^31 numbers or more")
        tiles = -(-self.count // _TENSOR_TILE) * (_TENSOR_TILE // _TILE)
        kind = centres.dtype if centres.dtype == torch.float64 else torch.float32
        self.table = centres.new_empty((tiles, self.width + 1, _TILE), dtype=kind)
        self._lines = self.table.new_zeros((tiles * _TILE, self.width + 1))
        self._lines[self.count :, 0] = torch.inf  # centres that only fill the tile
        self.update(centres)

    def update(self, centres: Tensor) -> None:
        """Other centres (k, d) in place of those there are, in the same memory.

        |c|^2 is summed in float64 and rounded once; 2 c and c^2 carry no rounding or one.
        """
        if centres.shape != (self.count, self.length):
            raise ValueError(f"centres ({self.count}, {self.length}), not {tuple(centres.shape)}")
        if centres.device != self.table.device:
            raise ValueError(f"centres on {centres.device}, the codebook on {self.table.device}")
        wide = centres.detach().to(self.table.dtype)
        lines = self._lines[: self.count]
        head = wide.double().square().sum(1)  # finite if and only if the centre is
        if self.weighted:
            head.mul_(0)  # zero, or NaN
            torch.mul(wide, wide, out=lines[:, 1 : self.length + 1]).nan_to_num_()
        # of a centre that is not finite: infinity, and factors that cannot make a NaN of it
        lines[:, 0] = head.nan_to_num_(torch.inf, torch.inf)
        torch.mul(wide, -2, out=lines[:, self.width - self.length + 1 :]).nan_to_num_(0, 0, 0)
        self.table.copy_(self._lines.view(-1, _TILE, self.width + 1).transpose(1, 2))

    def search(
        self,
        vectors: Tensor,
        weights: Tensor | None = None,
        *,
        precision: Precision = "auto",
        backend: Backend = "auto",
    ) -> Tensor:
        """As `search`, for these centres; weights are given if and only if the codebook is weighted."""
        _check(self, vectors, weights)
        choice = choose(self, vectors.device, precision, backend)
        if choice.kernel.startswith("torch"):
            return _search_torch(self, vectors, weights)
        precision = "tf32x3" if choice.kernel.endswith("tf32x3") else "fma"
        # Triton launches on the current device, which need not be the vectors'
        with torch.cuda.device(vectors.device) if vectors.is_cuda else nullcontext():
            return _search_triton(self, vectors, weights, precision)


def search(
    vectors: Tensor,
    centres: Tensor,
    weights: Tensor | None = None,
    *,
    precision: Precision = "auto",
    backend: Backend = "auto",
) -> Tensor:
    """Index of the nearest centre of each vector: int64 (n,), ties to the lowest index.

    vectors (n, d), centres (k, d), weights (n, d) or None: any strides, one device; d up to 64. Computed in float32.
    weights, not negative, are those of the squared differences.
    precision: "fma" plain float32 sums; "tf32x3" the matrix unit, products in three tf32 parts (relative error 2^-20
    of |v||c|; d up to 64, with weights 32), the tile that wins searched in float32; "auto" fma up to d = 32 (16 with
    weights), then tf32x3 where it can. backend: "auto" is Triton on CUDA, torch elsewhere.
    A vector with NaN gets index 0; one that is infinite some index in range. Centres that are not finite are passed by.
    Raises ValueError for shapes that do not match, no centre, or a backend or precision that cannot run here.
    """
    return Codebook(centres, weights is not None).search(vectors, weights, precision=precision, backend=backend)


def choose(
    codebook: Codebook, device: torch.device, precision: Precision = "auto", backend: Backend = "auto"
) -> Choice:
    """What computes a search on this device, and why. Raises ValueError for what is asked for and cannot run."""
    if precision not in ("auto", "fma", "tf32x3"):
        raise ValueError(f"precision {precision!r}: there are auto, fma, tf32x3")
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend {backend!r} has no codeword search: there are auto, triton, torch")
    twin_only = codebook.table.dtype == torch.float64
    refusal = triton_refusal(device) or ("float64 centres are for the torch twin" if twin_only else None)
    if backend == "triton" and refusal:
        raise ValueError(f"backend triton on {device}: {refusal}; torch runs everywhere")
    if backend == "torch" or (backend == "auto" and (device.type == "cpu" or refusal)):
        if precision == "tf32x3":
            raise ValueError(f"precision tf32x3 is Triton's, and here torch computes: {refusal or 'as was asked for'}")
        return Choice("torch-nearest", "asked for" if backend == "torch" else refusal or "a CPU")
    if precision == "tf32x3" and codebook.width > _WIDEST_TENSOR:
        raise ValueError(f"precision tf32x3 takes d up to {_WIDEST_TENSOR} (half with weights); fma takes all")
    pair = f"{codebook.width} products a pair"
    if precision != "auto":
        return Choice(f"triton-nearest-{precision}", "asked for")
    if codebook.width <= _WIDEST_FMA:
        return Choice("triton-nearest-fma", f"{pair}: float32 sums in registers")
    if codebook.width <= _WIDEST_TENSOR:
        return Choice("triton-nearest-tf32x3", f"{pair}: past {_WIDEST_FMA} float32 sums wait for their loads")
    return Choice("triton-nearest-fma", f"{pair}: more than the {_WIDEST_TENSOR} that tf32x3 takes")


def warm(codebook: Codebook, rows: int, *, precision: Precision = "auto") -> Choice:
    """Time the configurations for so many vectors, so that a later captured search finds the fastest one.

    Searches before any such call take the first configuration while a graph is captured, and tune otherwise.
    """
    generator = torch.Generator(device=codebook.table.device).manual_seed(0)
    vectors = torch.randn(rows, codebook.length, device=codebook.table.device, generator=generator)
    codebook.search(vectors, vectors.square() if codebook.weighted else None, precision=precision)
    return choose(codebook, vectors.device, precision)


def fits(centres: Tensor, weighted: bool = False) -> bool:
    """Whether Triton can search these centres where they are."""
    count, length = centres.shape
    small = 1 <= length <= LONGEST and count >= 1 and _numbers(count, length * (1 + weighted)) < 2**31
    return small and triton_refusal(centres.device) is None


def _numbers(count: int, width: int) -> int:
    return -(-count // _TENSOR_TILE) * _TENSOR_TILE * (width + 1)


def _check(codebook: Codebook, vectors: Tensor, weights: Tensor | None) -> None:
    if vectors.ndim != 2 or vectors.shape[1] != codebook.length:
        raise ValueError(f"vectors (n, {codebook.length}) for these centres, not {tuple(vectors.shape)}")
    if (weights is not None) != codebook.weighted:
        raise ValueError(
            f"weights are {'missing' if codebook.weighted else 'given'}: Codebook(..., weighted=) must agree"
        )
    if weights is not None and weights.shape != vectors.shape:
        raise ValueError(f"weights {tuple(vectors.shape)}, the shape of the vectors, not {tuple(weights.shape)}")
    for name, given in (("vectors", vectors), ("weights", weights)):
        if given is not None and given.device != codebook.table.device:
            raise ValueError(f"{name} on {given.device}, centres on {codebook.table.device}")


def _search_torch(codebook: Codebook, vectors: Tensor, weights: Tensor | None) -> Tensor:
    """The twin: the same formula by matrix products, in the table's type; about a chunk of distances at a time."""
    table = codebook.table.transpose(0, 1).reshape(codebook.width + 1, -1)[:, : codebook.count]
    base, factors = table[:1], table[1:]
    left = vectors.detach().to(table.dtype)
    if weights is not None:
        wide = weights.detach().to(table.dtype)
        left = torch.cat([wide, wide * left], dim=1)
    codes = torch.empty(vectors.shape[0], dtype=torch.int64, device=vectors.device)
    step = max(1, (_CHUNK if vectors.device.type == "cpu" else _CHUNK_GPU) // codebook.count)
    for start in range(0, vectors.shape[0], step):
        scores = torch.addmm(base, left[start : start + step], factors)
        codes[start : start + step] = scores.nan_to_num_(torch.inf, torch.inf, -torch.inf).argmin(1)
    return codes


def _search_triton(codebook: Codebook, vectors: Tensor, weights: Tensor | None, precision: str) -> Tensor:
    from evenbits.kernels.gpu import nearest as gpu

    n, device = vectors.shape[0], vectors.device
    out = torch.empty(n, dtype=torch.int64, device=device)
    if not n:
        return out
    vectors = vectors.detach().float()
    weights = vectors if weights is None else weights.detach().float()  # not read where there are none
    strides = (*vectors.stride(), *weights.stride())
    fma = precision == "fma"
    centres = _TILE if fma else _TENSOR_TILE
    tiles = -(-codebook.count // centres)
    more = {"LENGTH": codebook.length, "WEIGHTED": codebook.weighted}
    if not fma:
        more |= {"CENTRES": centres, "PADDED": gpu.padded(codebook.width)}

    def scan(config: Config) -> tuple[Tensor, Tensor]:
        blocks = -(-n // config.tiles["ROWS"])
        parts, span = share(blocks, tiles, _processors(device))
        least = torch.empty((parts, n), dtype=torch.float32, device=device)
        where = torch.empty((parts, n), dtype=torch.int32, device=device)
        kernel = gpu.scan_fma if fma else gpu.scan_tensor
        arguments = (vectors, weights, codebook.table, least, where, n, tiles, span, *strides)
        kernel[(blocks, parts)](
            *arguments, **more, **config.tiles, num_warps=config.num_warps, num_stages=config.num_stages
        )
        return least, where

    fitting = gpu.fma_configs(codebook.width) if fma else gpu.tensor_configs(codebook.width)
    configs = tuple(config for config in fitting if config.tiles["ROWS"] < 2 * n) or fitting[-1:]
    key = ("nearest", precision, str(device), codebook.width, codebook.weighted, tiles, n.bit_length())
    least, where = scan(TUNER.choose(key, configs, scan, device))
    pick = gpu.PICK[0]
    gpu.pick[(-(-n // pick.tiles["ROWS"]),)](
        *(vectors, weights, codebook.table, least, where, out, n, least.shape[0], *strides),
        LENGTH=codebook.length,
        WEIGHTED=codebook.weighted,
        CENTRES=centres,
        **pick.tiles,
        num_warps=pick.num_warps,
        num_stages=pick.num_stages,
    )
    return out


def share(blocks: int, tiles: int, processors: int) -> tuple[int, int]:
    """Parts that the tiles are cut into, and tiles a part: few vectors alone would leave most of the device idle.

    The answer does not depend on it: a minimum over parts in their order is the minimum over all.
    """
    wanted = -(-processors * _PROGRAMS // blocks)
    span = max(min(_SHORTEST, tiles), -(-tiles // wanted))
    return -(-tiles // span), span


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
