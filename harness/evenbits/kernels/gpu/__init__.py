"""Triton sources: what runs on a GPU, in Triton's interpreter, and in the ahead-of-time compilation of the tests."""
