"""Kernels that compute from packed weights: each Triton kernel beside its torch twin and, where it helps, a CPU one.

    nearest      nearest codeword, distances and argmin fused
    integer      grids of integer codes: round-to-nearest, GPTQ, AWQ
    codebook     gathered codewords: k-means, AQLM, VPTQ, PocketLLM's tables
    weights      packed weights as kernels are given them
    launch       named configurations, and which of them runs
    gpu/         the Triton sources; `cpu_*` modules are numba's

These modules import torch and nothing else of what evenbits depends on, at module level: Triton and numba come in
where they are used, so that a machine with torch and Triton alone can run and measure them.
"""
