"""Triton sources of PocketLLM's kernels; imported where a kernel is launched or compiled, never before."""
