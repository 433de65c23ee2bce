"""Exact nearest codeword in squared Euclidean distance, by the fastest exhaustive search for the device and shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from evenbits.kernels.nearest import Codebook

# below this many numbers faiss takes a path tens of times slower than torch's matrix product (measured)
FAISS_NUMBERS = 131_072
# zeros up to that many cost less than the slow path, from a quarter on (measured: 16,384 vectors of d = 4 to
# 32,768 centres take 0.055 s so, 1.8 s otherwise); past d = 24, or to few centres, they do not
_PADDED_NUMBERS, _PADDED_LENGTH, _PADDED_CENTRES = FAISS_NUMBERS // 4, 24, 256
# distances held at a time: 1 MiB stays in the cache (64 MiB took four times as long), a GPU wants more at once
_CHUNK_DISTANCES, _CHUNK_DISTANCES_GPU = 1 << 18, 1 << 24
_RUN = 64  # centres whose least distance is found together


def nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre of each vector: int64 (n,).

    vectors (n, d), centres (k, d): one floating dtype, one device; computed in float32. All centres are compared,
    so the answer is exact up to the float32 rounding of |c|^2 - 2 v.c.
    In one dimension the centres are sorted and searched; ties go to the lower value, equal centres to the lowest index.
    Else on the CPU, from 131,072 numbers on (from 32,768 to at least 256 centres in up to 24 dimensions), faiss
    searches, and which of tied centres it takes is its own; on CUDA `kernels.nearest` does where Triton runs (with the
    rounding stated there past d = 32); otherwise torch, in chunks. Both give ties to the lowest index.
    Raises ValueError for shapes that do not match, or no centre.
    """
    if vectors.ndim != 2 or centres.ndim != 2 or vectors.shape[1] != centres.shape[1] or not centres.shape[0]:
        raise ValueError(f"vectors (n, d) and centres (k > 0, d), not {tuple(vectors.shape)}, {tuple(centres.shape)}")
    vectors, centres = vectors.detach().float(), centres.detach().float()
    if vectors.shape[1] == 1:
        return _nearest_value(vectors[:, 0], centres[:, 0])
    if vectors.device.type == "cpu" and vectors.numel() >= FAISS_NUMBERS:
        return _nearest_faiss(vectors, centres)
    if vectors.device.type == "cpu" and _worth_padding(vectors, centres):
        missing = -(-FAISS_NUMBERS // vectors.shape[1]) - vectors.shape[0]
        return _nearest_faiss(functional.pad(vectors, (0, 0, 0, missing)), centres)[: vectors.shape[0]]
    if vectors.device.type == "cuda":
        from evenbits.kernels.nearest import Codebook, fits

        if fits(centres):
            return Codebook(centres).search(vectors)
    return _nearest_chunked(vectors, centres)


def squared_distances(vectors: Tensor, centres: Tensor, codes: Tensor) -> Tensor:
    """|v - c|^2 of each vector to the centre its code names: float32 (n,), without cancellation."""
    return (vectors.float() - centres.float()[codes]).square().sum(1)


def _nearest_value(values: Tensor, centres: Tensor) -> Tensor:
    ordered, order = torch.sort(centres, stable=True)
    borders = (ordered[:-1] + ordered[1:]) / 2
    place = torch.bucketize(values.contiguous(), borders)  # a value on a border goes below
    first = torch.searchsorted(ordered, ordered)  # the first of each run of equal centres
    return order[first[place]]


def _worth_padding(vectors: Tensor, centres: Tensor) -> bool:
    few = centres.shape[0] < _PADDED_CENTRES
    return vectors.numel() >= _PADDED_NUMBERS and vectors.shape[1] <= _PADDED_LENGTH and not few


def _nearest_faiss(vectors: Tensor, centres: Tensor) -> Tensor:
    import faiss

    _, codes = faiss.knn(vectors.contiguous().numpy(), centres.contiguous().numpy(), 1)
    return torch.from_numpy(codes[:, 0])


def _nearest_chunked(vectors: Tensor, centres: Tensor) -> Tensor:
    codes = torch.empty(vectors.shape[0], dtype=torch.int64, device=vectors.device)
    square = centres.square().sum(1)
    doubled = (-2 * centres).t().contiguous()
    held = _CHUNK_DISTANCES if vectors.device.type == "cpu" else _CHUNK_DISTANCES_GPU
    step = max(1, held // centres.shape[0])
    for start in range(0, vectors.shape[0], step):
        codes[start : start + step] = torch.addmm(square, vectors[start : start + step], doubled).argmin(1)
    return codes


class Searcher:
    """`nearest` for one set of centres that is asked many times, with few vectors each: what depends on the centres
    alone is computed once. Exact up to float32 rounding.

    centres: (k, d), any floating dtype; computed in float32.
    """

    def __init__(self, centres: Tensor) -> None:
        wide = centres.detach().float()
        self._centres = wide
        self._square = wide.square().sum(1)
        self._doubled = (-2 * wide).t().contiguous()
        self._both: Tensor | None = None  # (2 d, k), for weighted distances
        # the least of each run of centres, then the place in that run: twice as fast as one argmin over all
        self._run = _RUN if wide.shape[0] % _RUN == 0 and wide.shape[0] > 4 * _RUN else 0
        held = _CHUNK_DISTANCES if wide.device.type == "cpu" else _CHUNK_DISTANCES_GPU
        self._step = max(1, held // wide.shape[0])
        self._codebooks: dict[bool, Codebook] = {}  # by whether there are weights; on CUDA, where the kernel runs

    def __call__(self, vectors: Tensor, weights: Tensor | None = None) -> Tensor:
        """int64 (n,) for vectors (n, d) on the centres' device. weights: (n, d), not negative, of the squared
        differences; None: ones."""
        vectors = vectors.float()
        if vectors.shape[1] == 1:  # one number: a weight does not change which is nearest
            return _nearest_value(vectors[:, 0], self._centres[:, 0])
        if self._centres.device.type == "cuda":
            from evenbits.kernels.nearest import Codebook, fits

            if fits(self._centres, weighted=weights is not None):
                if (weights is not None) not in self._codebooks:
                    self._codebooks[weights is not None] = Codebook(self._centres, weights is not None)
                return self._codebooks[weights is not None].search(vectors, weights)
        matrix, square = self._doubled, self._square
        if weights is not None:
            if self._both is None:
                self._both = torch.cat([self._centres.t().square(), self._doubled]).contiguous()
            vectors = torch.cat([weights, weights * vectors], dim=1)
            matrix, square = self._both, self._square.new_zeros(1)
        if vectors.shape[0] <= self._step:
            return self._least(torch.addmm(square, vectors, matrix))
        starts = range(0, vectors.shape[0], self._step)
        return torch.cat([self._least(torch.addmm(square, vectors[s : s + self._step], matrix)) for s in starts])

    def _least(self, distances: Tensor) -> Tensor:
        if not self._run:
            return distances.argmin(1)
        runs = distances.view(distances.shape[0], -1, self._run)
        run = runs.amin(2).argmin(1)
        within = runs.gather(1, run[:, None, None].expand(-1, 1, self._run))[:, 0].argmin(1)
        return run * self._run + within
