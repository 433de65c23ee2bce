"""The methods of this plugin: a module of `libraries/` per library with `descriptor() -> Compressor`; torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from evenbits.compressor import Compressor

LIBRARIES = (
    "gptqmodel", "llmcompressor", "autoround", "hqq", "bitsandbytes", "torchao", "autoawq", "autogptq", "checkpoint",
)  # fmt: skip


def descriptors() -> Sequence[Compressor]:
    return [import_module(f"evenbits_backends.libraries.{name}").descriptor() for name in LIBRARIES]
